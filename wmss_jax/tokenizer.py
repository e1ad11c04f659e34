"""Tokenizers: load one, train a small one, tell two apart. They are always fast tokenizers of transformers.

tokenizer = tokenizer.load("Qwen/Qwen3-8B-Base")
tokenizer = tokenizer.train(texts, vocab_size=1024, out_dir="runs/tiny/tokenizer")
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a directory with none of them has no tokenizer
PAD, EOS = "<|pad|>", "<|eos|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# What `train` gives its tokenizers. An answer ends with EOS; other turns end where the next role marker begins.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('no such role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def load(path_or_hub_id: str | os.PathLike) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a local directory or a hub id; no code from there is run.

    Raises:
        FileNotFoundError: no such directory, and the hub has nothing under that name (or cannot be asked).
        ValueError: what is there cannot be read, or has no fast tokenizer (character offsets need one).
    """
    name = str(path_or_hub_id)
    local = Path(path_or_hub_id).is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise FileNotFoundError(f"{name}: no such directory, and not a hub id (owner/name)")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it says that PyTorch is missing
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # tokenizers itself raises bare Exceptions for a damaged file
        reason = " ".join(str(error).split())
        if local:
            raise ValueError(f"{name}: holds no usable tokenizer (tokenizer.json): {reason[:200]}") from error
        raise FileNotFoundError(f"{name}: no such directory, and the hub gave no tokenizer: {reason[:200]}") from error
    _require_fast(tokenizer)
    return tokenizer


def train(
    texts: Iterable[str], vocab_size: int, out_dir: str | os.PathLike, *, chats: bool = True
) -> "PreTrainedTokenizerFast":
    """Return a byte-level BPE tokenizer trained on `texts`, and write it to `out_dir`.

    Every text has tokens, whatever its script; each digit is a token of its own. The same texts in the same order give
    the same files. `<|pad|>` (0) and `<|eos|>` (1) differ, and the chat template is CHAT_TEMPLATE:

        <|system|>Be brief.<|user|>2 + 3?<|assistant|>5<|eos|>

    Args:
        vocab_size: most tokens it may have, special ones included; fewer if the texts give no more.
        out_dir: must not exist, or be empty; appears whole or not at all.
        chats: give it the chat template. False for models that never see a chat: nobody is then led to ask them in one.

    Raises:
        FileExistsError: `out_dir` holds something.
        ValueError: vocab_size leaves no room for the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [PAD, EOS, *_ROLES]
    least = 256 + len(special)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size = {vocab_size} is too small: 256 bytes and {len(special)} special tokens are {least}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    _write(bpe, Path(out_dir), CHAT_TEMPLATE if chats else None)
    return load(out_dir)


def fingerprint(tokenizer: Any) -> str:
    """Return 16 hex digits that two tokenizers share exactly if they turn every text and chat into the same tokens.

    Padding and truncation, which calls leave behind in a tokenizer, and the pad token have no part in it.
    """
    _require_fast(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    parts = [state, tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def differences(ours: Any, theirs: Any) -> tuple[list[str], list[str]]:
    """Return (the tokens and ids that contradict each other, as text; tokens that `theirs` has no id for).

    Tokens that only `theirs` has, at ids that `ours` does not use, are no difference: they are never asked for.
    """
    known, other = ours.get_vocab(), theirs.get_vocab()
    token_of = {id_: token for token, id_ in other.items()}
    differ, absent = [], []
    for token, id_ in sorted(known.items(), key=lambda item: item[1]):
        if other.get(token, id_) != id_:
            differ.append(f"{token!r} is {id_}, there {other[token]}")
        elif token_of.get(id_, token) != token:
            differ.append(f"{id_} is {token!r}, there {token_of[id_]!r}")
        elif token not in other:
            absent.append(repr(token))
    return differ, absent


def _require_fast(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        name = tokenizer.name_or_path
        raise ValueError(f"{name}: has no fast tokenizer; convert it to a tokenizer.json with transformers")


def _write(bpe: Any, out: Path, chat_template: str | None) -> None:
    """Write what AutoTokenizer reads, in transformers 4 and 5 alike."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists already; choose another directory or remove it")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        **({} if chat_template is None else {"chat_template": chat_template}),
    }
    partial = out.with_name(f"{out.name}.partial-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        bpe.save(str(partial / "tokenizer.json"))
        (partial / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        partial.rename(out)  # over an empty directory, too
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
