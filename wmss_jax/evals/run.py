"""One model on one set of questions: generate, grade, count."""

import dataclasses
import json
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from wmss_jax.evals.graders import Grader
from wmss_jax.generate import generate
from wmss_jax.models import CausalLM


@runtime_checkable
class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    eos_token_id: int | None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


@dataclasses.dataclass(frozen=True)
class Item:
    """A question as the model reads it, and its right answer.

    Attributes:
        prompt_ids: token ids of the whole prompt, chat template and all.
        prompt: the same as text, for the record alone.
        gold: what the grader compares the generated text with.
    """

    prompt_ids: Sequence[int]
    prompt: str
    gold: str


@dataclasses.dataclass(frozen=True)
class Record:
    """What the model made of an item, and whether the grader found it right."""

    prompt: str
    generation: str
    gold: str
    verdict: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """The records of an evaluation, in the order of its items, and what follows from them."""

    records: tuple[Record, ...]

    @property
    def n(self) -> int:
        """The number of items."""
        return len(self.records)

    @property
    def accuracy(self) -> float:
        """The share of items answered right."""
        return sum(record.verdict for record in self.records) / self.n

    @property
    def standard_error(self) -> float:
        """Of the accuracy, binomial: how far another draw of n such items would move it."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    def write_jsonl(self, path: str | os.PathLike) -> None:
        """Write one record a line."""
        lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in self.records)
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def evaluate(
    model: CausalLM,
    params: PyTree[Array],
    tokenizer: Tokenizer,
    items: Sequence[Item],
    grader: Grader,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> Result:
    """Return how the model answers `items`: greedily, up to a stop token or the limit.

    Args:
        stop_ids: that end an answer besides the tokenizer's EOS, such as generation_config.json's.
        mesh, batch_size: see `generate`.

    Raises:
        ValueError: there are no items, or `generate` refuses a prompt.
    """
    if not items:
        raise ValueError("there are no items to evaluate")
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    answers = generate(
        model,
        params,
        [item.prompt_ids for item in items],
        max_new_tokens=max_new_tokens,
        stop_ids={*stop_ids, *eos},
        mesh=mesh,
        batch_size=batch_size,
    )
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return Result(
        tuple(
            Record(item.prompt, text, item.gold, grader(text, item.gold))
            for item, text in zip(items, texts, strict=True)
        )
    )
