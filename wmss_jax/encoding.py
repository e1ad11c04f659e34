"""Examples -> token ids, and which of the tokens are trained.

The mask that is made here marks completion targets: the tokens of the answers, each answer's end included. Scores are
always taken over these; the loss is, too, or over all tokens (`loss_mask`). Ids of padding or EOS never decide.
"""

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Shaped

if TYPE_CHECKING:
    from wmss_jax.examples import Example

# Templates that write today's date (Llama 3, SmolLM3) are told this one, which Llama's fall back to: a recipe gives the
# same tokens on every day.
TODAY = datetime.datetime(2024, 7, 26)
_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_MARK, _LONGER = "\ue000", "\ue001"  # private-use characters, which no template treats in any special way


class Encoded(NamedTuple):
    """The tokens of an example, int32[n], and which of them are trained, bool[n]."""

    tokens: Int32[np.ndarray, " n"]
    mask: Bool[np.ndarray, " n"]


class ChatFormat(NamedTuple):
    """What a chat template puts around an answer: "<|im_start|>assistant\\n" before, "<|im_end|>" (stop) after it.

    `end` is everything from the answer's last character to the end of `stop`, the first special token there. Where the
    template has no header for an answer that is awaited (Mistral), `lead` is what it then puts before the answer.
    """

    header: str
    lead: str
    end: str
    stop: str
    stop_id: int


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


def chat_format(tokenizer: Any, system: str | None = None) -> ChatFormat:
    """Return what the tokenizer's chat template puts around an answer, found by rendering a small chat.

    Args:
        system: system message of the chats that are meant: it may decide how an answer begins (SmolLM3's /no_think).

    Raises:
        ValueError: there is no template, or no special token ends an answer, so that generation would never stop.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: set chat_template to false (prompts with completions need none), "
            "or take a tokenizer that has one"
        )
    question = _with_system([{"role": "user", "content": "x"}], system)
    asked, waiting = _render(question, tokenizer), _render(question, tokenizer, add_generation_prompt=True)
    header = waiting[len(_common_start(asked, 0, waiting)) :]
    answered = _render([*question, {"role": "assistant", "content": _MARK}], tokenizer)
    before, found, rest = answered.partition(_MARK)
    lead = "" if header or not before.startswith(waiting) else before[len(waiting) :]
    special = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [(rest.find(content), -len(content), content) for content in special if content in rest]
    if not found or not ends:
        what = f"ends an answer with {rest!r}, without a special token" if found else "leaves answers out"
        raise ValueError(
            f"the chat template {what}, so that generation would never stop: take a template in which a special token "
            "such as EOS ends an answer, or set chat_template to false"
        )
    at, _, stop = min(ends)
    return ChatFormat(header, lead, rest[:at] + stop, stop, special[stop])


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
    messages = _with_system([{"role": "user", "content": prompt}], system_prompt)
    text = _render(messages, tokenizer, add_generation_prompt=True)
    _check_system(messages, text, tokenizer)
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
    first = _with_system(example.messages, system_prompt)[0]
    system = first["content"] if first["role"] == "system" else None
    if system not in known:
        known[system] = chat_format(tokenizer, system)
    return known[system]


def answer_spans(
    example: "Example", tokenizer: Any, format_: ChatFormat, system_prompt: str | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendered chat and the characters [start, end) of each answer in it, its end-of-turn token included.

        <|im_start|>user\\n2 + 3?<|im_end|>\\n<|im_start|>assistant\\n5<|im_end|>\\n
                                                                [          )

    Templates rewrite answers (Qwen3 drops earlier thinking and adds an empty think block to the last turn), so an
    answer cannot be searched for. The chat is rendered a second time with a mark in the place of every answer. Up to
    a mark, and again from one end of turn to the next mark, the two renderings agree until the answer begins; the last
    header in that stretch is the answer's own, and the first end-of-turn token behind it closes the answer.

    Raises:
        ValueError: the template refuses the chat, drops or changes an answer, or does not end it.
    """
    assert example.messages is not None
    messages = _with_system(example.messages, system_prompt)
    trained_from = example.trained_from + len(messages) - len(example.messages)
    full = _render(messages, tokenizer)
    _check_system(messages, full, tokenizer)
    mark = _MARK
    while mark in full:
        mark += _LONGER
    marked = _render([m | {"content": mark} if m["role"] == "assistant" else m for m in messages], tokenizer)
    spans, at, at_marked = [], 0, 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        where = f"the chat template {{}} the answer in message {index + 1 - len(messages) + len(example.messages)}"
        until = marked.find(mark, at_marked)
        if until < 0:
            raise ValueError(where.format("leaves out"))
        same = at + len(_common_start(full, at, marked[at_marked:until]))
        header = full.rfind(format_.header, at, same) if format_.header else -1
        if header < 0 and same - at < until - at_marked:
            raise ValueError(where.format("changes what stands before"))
        start = same - len(format_.lead) if header < 0 else header + len(format_.header)
        at = _after(full, format_.stop, start, where)
        at_marked = _after(marked, format_.stop, until, where)
        if mark in marked[until + len(mark) : at_marked]:  # that is the end of a later answer
            raise ValueError(where.format(f"puts no {format_.stop!r} behind"))
        _check_answer(message, full[start:at], format_.stop, where, last=index == len(messages) - 1)
        if index >= trained_from:
            spans.append((start, at))
    return full, spans


def _check_answer(message: Mapping[str, Any], answer: str, stop: str, where: str, last: bool) -> None:
    """Raise unless what is trained is what the message says; thinking may be missing, except in the last turn."""
    content = message["content"]
    if stop in content:
        raise ValueError(f"the text of an answer contains the end-of-turn token {stop!r}; remove it there")
    if content.rpartition("</think>")[2].strip() not in answer:
        raise ValueError(where.format("changes"))
    if last and (message.get("reasoning_content") or "").strip() not in answer:
        raise ValueError(where.format("leaves out the reasoning_content of"))


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


def _common_start(text: str, at: int, other: str) -> str:
    """The longest start of `other` that `text` has at `at`."""
    if text.startswith(other, at):
        return other
    return other[: next(k for k in range(len(other)) if text[at + k : at + k + 1] != other[k])]


def _after(text: str, stop: str, start: int, where: str) -> int:
    found = text.find(stop, start)
    if found < 0:
        raise ValueError(where.format(f"puts no {stop!r} behind"))
    return found + len(stop)


def _check_system(messages: Sequence[Mapping[str, Any]], text: str, tokenizer: Any) -> None:
    """Raise ValueError if the template says nothing of the system message (Mistral's, unless an answer is awaited)."""
    first, *others = messages
    if first["role"] != "system" or first["content"].strip() in text:
        return
    if _render(others, tokenizer) == text or _render(others, tokenizer, add_generation_prompt=True) == text:
        raise ValueError("the chat template leaves out the system message; write it into the first question")


def _with_system(messages: Sequence[Mapping[str, Any]], system_prompt: str | None) -> list[dict[str, Any]]:
    has_one = system_prompt is None or messages[0]["role"] == "system"
    return [*([] if has_one else [{"role": "system", "content": system_prompt}]), *map(dict, messages)]


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def _render(messages: Sequence[Mapping[str, Any]], tokenizer: Any, add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt,
            chat_template=_DATE.sub(lambda call: repr(TODAY.strftime(call[2])), tokenizer.get_chat_template()),
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template refuses this chat: {' '.join(str(error).split())}") from error


def _tokenize(texts: list[str], tokenizer: Any, **wanted: bool) -> Any:
    unwanted = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(texts, verbose=False, **unwanted, **wanted)


def _located(example: "Example", call: Any, *arguments: Any) -> Any:
    """What `call` returns; its ValueErrors begin with the example's location."""
    try:
        return call(*arguments)
    except ValueError as error:
        raise ValueError(f"{example.location}: {error}") from error
