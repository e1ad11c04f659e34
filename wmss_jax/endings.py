"""Where a generated text ends: the tokens that end it, and texts that do."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmss_jax import encoding


def end_ids(tokenizer: Any, directory: Path, *, chat_template: bool = True) -> frozenset[int]:
    """Return the ids of the tokens that end an answer: that of training, EOS, and generation_config.json's set.

    Args:
        directory: of the model; what it has no generation_config.json for is left out.

    Raises:
        ValueError: the file is damaged, or the tokenizer has no token that ends an answer.
    """
    found = {encoding.stop_token(tokenizer, chat_template=chat_template)}
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    file = directory / "generation_config.json"
    if not file.exists():
        return frozenset(found)
    try:
        said = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not a JSON object: {error}") from error
    said = [] if said is None else said if isinstance(said, list) else [said]
    if wrong := [id_ for id_ in said if not isinstance(id_, int) or isinstance(id_, bool)]:
        raise ValueError(f"{file}: eos_token_id: {wrong[0]!r} is no token id")
    return frozenset(found | set(said))


@dataclasses.dataclass(frozen=True)
class StopTexts:
    """Texts that end an answer and are no part of it; the `ends` of `generate`.

    Attributes:
        tokenizer: whose tokens are generated.
        texts: any of them.
    """

    tokenizer: Any
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if "" in self.texts:
            raise ValueError("a stop text is empty, and would end every answer at once")

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Return whether one of the texts stands at the end of what was generated."""
        # A token has a byte of text at least, but for special ones, which stand for none.
        tail = 2 * max((len(text.encode()) for text in self.texts), default=0) + 8
        text = self.tokenizer.decode(tokens[-tail:], skip_special_tokens=True)
        return any(stop in text for stop in self.texts)

    def cut(self, text: str) -> str:
        """Return what stands before the first of the texts."""
        return text[: min((at for stop in self.texts if (at := text.find(stop)) >= 0), default=len(text))]

    def sure(self, text: str) -> str:
        """Return what of an unfinished text will stay: without what a stop text or a character may begin with."""
        text = self.cut(text).rstrip("\ufffd")
        begun = (n for stop in self.texts for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]
