"""What a chat template makes of messages, found out by rendering them: where an answer begins, and what ends it."""

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from wmss_jax.examples import Example

# Templates that write today's date (Llama 3, SmolLM3) are told this one, which Llama's fall back to: a recipe gives the
# same tokens on every day.
TODAY = datetime.datetime(2024, 7, 26)
_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_MARK, _LONGER = "\ue000", "\ue001"  # private-use characters, which no template treats in any special way


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
    question = with_system([{"role": "user", "content": "x"}], system)
    asked, waiting = render(question, tokenizer), render(question, tokenizer, add_generation_prompt=True)
    header = waiting[len(_common_start(asked, 0, waiting)) :]
    answered = render([*question, {"role": "assistant", "content": _MARK}], tokenizer)
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
    messages = with_system(example.messages, system_prompt)
    trained_from = example.trained_from + len(messages) - len(example.messages)
    full = render(messages, tokenizer)
    check_system(messages, full, tokenizer)
    mark = _MARK
    while mark in full:
        mark += _LONGER
    marked = render([m | {"content": mark} if m["role"] == "assistant" else m for m in messages], tokenizer)
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


def check_system(messages: Sequence[Mapping[str, Any]], text: str, tokenizer: Any) -> None:
    """Raise ValueError if the template says nothing of the system message (Mistral's, unless an answer is awaited)."""
    first, *others = messages
    if first["role"] != "system" or first["content"].strip() in text:
        return
    if render(others, tokenizer) == text or render(others, tokenizer, add_generation_prompt=True) == text:
        raise ValueError("the chat template leaves out the system message; write it into the first question")


def with_system(messages: Sequence[Mapping[str, Any]], system_prompt: str | None) -> list[dict[str, Any]]:
    has_one = system_prompt is None or messages[0]["role"] == "system"
    return [*([] if has_one else [{"role": "system", "content": system_prompt}]), *map(dict, messages)]


def render(messages: Sequence[Mapping[str, Any]], tokenizer: Any, add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt,
            chat_template=_DATE.sub(lambda call: repr(TODAY.strftime(call[2])), tokenizer.get_chat_template()),
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template refuses this chat: {' '.join(str(error).split())}") from error
