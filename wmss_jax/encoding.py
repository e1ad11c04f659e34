"""Examples -> token ids, and which of the tokens are trained.

The mask that is made here marks completion targets: the tokens of the answers, each answer's end included. Scores are
always taken over these; the loss is, too, or over all tokens (`loss_mask`). Ids of padding or EOS never decide.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Shaped

from wmss_jax.chat_template import ChatFormat, answer_spans, chat_format, check_system, render, with_system

if TYPE_CHECKING:
    from wmss_jax.examples import Example


class Encoded(NamedTuple):
    """The tokens of an example, int32[n], and which of them are trained, bool[n]."""

    tokens: Int32[np.ndarray, " n"]
    mask: Bool[np.ndarray, " n"]


def encode(
    example: "Example",
    tokenizer: Any,
    *,
    loss_on: str = "completion",
    chat_template: bool = True,
    system_prompt: str | None = None,
) -> Encoded:
    """Return the tokens of one example and its loss mask ("this token is trained"); see `encode_batch`.

    prompt "2 + 3?", completion "5", chat_template=False, loss_on="completion"
    tokens    2   ' +'  ' '  3   ?   5   <eos>
    mask      0    0     0   0   0   1   1
    """
    settings = {"chat_template": chat_template, "system_prompt": system_prompt}
    (encoded,) = encode_batch([example], tokenizer, **settings)
    return Encoded(encoded.tokens, loss_mask(encoded.mask, loss_on))


def encode_batch(
    examples: Sequence["Example"], tokenizer: Any, *, chat_template: bool = True, system_prompt: str | None = None
) -> list[Encoded]:
    """Return tokens and completion mask of each example.

    - Prompt and completion are tokenised apart, so that what is trained never depends on a merge across the boundary.
      With `chat_template` the prompt is a user message followed by the header of an answer, and the completion ends as
      the template ends an answer; without, the two texts follow one another as they are, and EOS ends them.
    - Messages always go through the chat template. A token is trained iff its characters overlap an answer, from
      behind its header to its end-of-turn token. Where the template leaves the thinking of earlier turns out, it is
      neither seen nor trained.
    - A text is trained whole, and EOS ends it.

    The first token is never trained: nothing predicts it. A text that ends with its end token already gets no second.

    Args:
        system_prompt: first message of every chat that has none. Texts are not chats.

    Raises:
        ValueError: what the tokenizer or its template cannot do, or an example without a trained token; the message
            begins with the example's location.
    """
    chats = [i for i, example in enumerate(examples) if example.messages is not None]
    plain = [i for i, example in enumerate(examples) if example.messages is None]
    in_chat = chats or (chat_template and any(example.prompt is not None for example in examples))
    format_ = chat_format(tokenizer) if in_chat else None
    encoded: dict[int, Encoded] = {}
    for where, encode_kind, around in (
        (chats, _encode_chats, format_),
        (plain, _encode_plain, format_ if chat_template else None),
    ):
        kind = encode_kind([examples[i] for i in where], tokenizer, around, system_prompt) if where else ()
        encoded |= zip(where, kind, strict=True)
    for i, example in enumerate(examples):
        encoded[i].mask[:1] = False
        if not encoded[i].mask.any():
            raise ValueError(f"{example.location}: has no trained token; give it a longer text")
    return [encoded[i] for i in range(len(examples))]


def loss_mask(completion_mask: Bool[np.ndarray, " n"], loss_on: str) -> Bool[np.ndarray, " n"]:
    """Return the tokens with a loss: "completion", those of the answers; "all", every one but the first.

    >>> loss_mask(np.array([False, False, True]), "all")
    array([False,  True,  True])
    """
    if loss_on == "completion":
        return completion_mask
    if loss_on == "all":
        return np.arange(len(completion_mask)) > 0
    raise ValueError(f"loss_on {loss_on!r} is unknown; choose 'completion' or 'all'")


def prompt_tokens(
    prompt: str, tokenizer: Any, *, chat_template: bool = True, system_prompt: str | None = None
) -> Int32[np.ndarray, " n"]:
    """Return what a model is given to answer `prompt`: exactly the tokens before the completion in `encode`."""
    if chat_template:
        chat_format(tokenizer)  # says what is missing
        ids = _tokenize([_prompt_text(prompt, tokenizer, system_prompt)], tokenizer)["input_ids"][0]
    else:
        _refuse_system_prompt(system_prompt)
        ids = _lead(tokenizer) + _tokenize([prompt], tokenizer)["input_ids"][0]
    return np.array(ids, np.int32)


def stop_token(tokenizer: Any, *, chat_template: bool = True) -> int:
    """Return the id of the token that ends an answer in `encode`: the template's end of turn, else EOS."""
    return chat_format(tokenizer).stop_id if chat_template else _eos(tokenizer)


# -- prompts with completions, and texts ------------------------------------------------------------------------------


def _encode_plain(
    examples: Sequence["Example"], tokenizer: Any, format_: ChatFormat | None, system_prompt: str | None
) -> Iterable[Encoded]:
    """`format_` is None where prompt and completion are no chat."""
    pairs = [_located(example, _two_texts, example, tokenizer, format_, system_prompt) for example in examples]
    ids = _tokenize([text for pair in pairs for text in pair], tokenizer)["input_ids"]
    for example, prompt, completion in zip(examples, ids[::2], ids[1::2], strict=True):
        in_chat = format_ is not None and example.prompt is not None
        end = format_.stop_id if format_ is not None and in_chat else _eos(tokenizer)
        lead = [] if in_chat else _lead(tokenizer)
        if completion[-1:] != [end]:
            completion = [*completion, end]
        tokens = np.array([*lead, *prompt, *completion], np.int32)
        yield Encoded(tokens, np.arange(len(tokens)) >= len(lead) + len(prompt))


def _two_texts(
    example: "Example", tokenizer: Any, format_: ChatFormat | None, system_prompt: str | None
) -> tuple[str, str]:
    if example.prompt is None:
        assert example.text is not None
        return "", example.text
    assert example.completion is not None
    if format_ is None:
        _refuse_system_prompt(system_prompt)
        return example.prompt, example.completion
    completion = example.completion if example.completion.endswith(format_.stop) else example.completion + format_.end
    return _prompt_text(example.prompt, tokenizer, system_prompt), format_.lead + completion


def _prompt_text(prompt: str, tokenizer: Any, system_prompt: str | None) -> str:
    messages = with_system([{"role": "user", "content": prompt}], system_prompt)
    text = render(messages, tokenizer, add_generation_prompt=True)
    check_system(messages, text, tokenizer)
    return text


def _refuse_system_prompt(system_prompt: str | None) -> None:
    if system_prompt is not None:
        raise ValueError("system_prompt needs chat_template; without it, write that text into the prompt's template")


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, which must end an answer; set eos_token in its config")
    return tokenizer.eos_token_id


def _lead(tokenizer: Any) -> list[int]:
    """BOS, if the tokenizer is one that begins a text with it. In a chat the template writes it."""
    begin = tokenizer("")["input_ids"][:1]
    return begin if begin == [tokenizer.bos_token_id] else []


# -- chats ------------------------------------------------------------------------------------------------------------


def _encode_chats(
    examples: Sequence["Example"], tokenizer: Any, format_: ChatFormat | None, system_prompt: str | None
) -> Iterable[Encoded]:
    assert format_ is not None
    formats = {None: format_}
    of_each = [_located(example, _format_of, example, tokenizer, system_prompt, formats) for example in examples]
    rendered = [
        _located(example, answer_spans, example, tokenizer, format_, system_prompt)
        for example, format_ in zip(examples, of_each, strict=True)
    ]
    batch = _tokenize([text for text, _ in rendered], tokenizer, return_offsets_mapping=True)
    for example, format_, (_, spans), ids, offsets in zip(
        examples, of_each, rendered, batch["input_ids"], batch["offset_mapping"], strict=True
    ):
        tokens = np.array(ids, np.int32)
        yield Encoded(tokens, _located(example, _spans_mask, tokens, np.array(offsets), spans, format_))


def _format_of(
    example: "Example", tokenizer: Any, system_prompt: str | None, known: dict[str | None, ChatFormat]
) -> ChatFormat:
    """Return the format of a chat; the `known` ones, by system message, get those that are new."""
    assert example.messages is not None
    first = with_system(example.messages, system_prompt)[0]
    system = first["content"] if first["role"] == "system" else None
    if system not in known:
        known[system] = chat_format(tokenizer, system)
    return known[system]


def _spans_mask(
    tokens: Int32[np.ndarray, " n"],
    offsets: Shaped[np.ndarray, "n 2"],
    spans: Sequence[tuple[int, int]],
    format_: ChatFormat,
) -> Bool[np.ndarray, " n"]:
    """The tokens whose characters overlap a span; each span must close with the end-of-turn token."""
    begin_n, end_n = offsets[:, 0], offsets[:, 1]
    mask_n = np.zeros(len(tokens), bool)
    for start, end in spans:
        inside_n = (begin_n < end) & (end_n > start)
        # Some tokenizers cut blanks off their offsets; of a token that is all blanks only its end is left.
        inside_n = np.where(begin_n == end_n, (start < end_n) & (end_n <= end), inside_n)
        if not inside_n.any() or tokens[np.flatnonzero(inside_n)[-1]] != format_.stop_id:
            raise ValueError(f"the tokenizer does not read the end-of-turn token {format_.stop!r} as one token")
        mask_n |= inside_n
    return mask_n


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def _tokenize(texts: list[str], tokenizer: Any, **wanted: bool) -> Any:
    unwanted = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(texts, verbose=False, **unwanted, **wanted)


def _located(example: "Example", call: Any, *arguments: Any) -> Any:
    """What `call` returns; its ValueErrors begin with the example's location."""
    try:
        return call(*arguments)
    except ValueError as error:
        raise ValueError(f"{example.location}: {error}") from error
