"""Problem sets that are made, not found: other ones for every seed, so that seeds differ in their data, too."""

import json
import random
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field, PositiveInt

from wmss_jax.sources import Section, Text

SPLITS = ("train", "validation", "test")


class AdditionConfig(Section):
    """Sums of two numbers; no sum is in two splits, in either order."""

    digits: Annotated[int, Field(ge=1, le=9)] = 2
    """Digits of either number."""


class ReasoningGymConfig(Section):
    """A procedural data set of reasoning-gym (the extra `demo`)."""

    dataset: Text
    """Its name: gsm_symbolic, chain_sum, ..."""
    settings: dict[str, Any] = {}  # noqa: RUF012  (pydantic copies it)
    """Settings that the data set itself takes; not seed and size."""


class ProblemsConfig(Section):
    """Makes train.jsonl, validation.jsonl and test.jsonl, rows of question and answer, in a seed's data directory."""

    addition: AdditionConfig | None = None
    """Sums. Give this or `reasoning_gym`."""
    reasoning_gym: ReasoningGymConfig | None = None
    """Any procedural data set of reasoning-gym."""
    train: PositiveInt
    """Problems to train on."""
    validation: PositiveInt
    """Problems on which learning rates are chosen."""
    test: PositiveInt
    """Problems that are only measured on."""

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> "ProblemsConfig":
        if (self.addition is None) == (self.reasoning_gym is None):
            raise ValueError("give exactly one of addition and reasoning_gym")
        if self.addition is not None:
            numbers = 9 * 10 ** (self.addition.digits - 1) if self.addition.digits > 1 else 10
            wanted, there = self.train + self.validation + self.test, numbers * (numbers + 1) // 2
            if wanted > there:
                raise ValueError(
                    f"{wanted} problems are wanted, and there are {there} sums of {self.addition.digits} digits"
                )
        return self


def make(wanted: ProblemsConfig, seed: int) -> dict[str, list[dict[str, str]]]:
    """Return the problems of every split, a function of the arguments alone; no question is there twice.

    Raises:
        ValueError: reasoning-gym is missing, knows no such data set, or runs out of different questions.
    """
    sizes = {name: getattr(wanted, name) for name in SPLITS}
    stream = _additions(wanted.addition, seed) if wanted.addition else _reasoning_gym(wanted, seed)
    return {name: list(islice(stream, size)) for name, size in sizes.items()}


def write(wanted: ProblemsConfig, seed: int, directory: Path) -> None:
    """Write the splits into `directory`, which is left alone where it is there: it appears whole or not at all."""
    if directory.exists():
        return
    partial = directory.with_name(f"{directory.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, problems in make(wanted, seed).items():
        (partial / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in problems))
    partial.rename(directory)


def _additions(wanted: AdditionConfig, seed: int) -> Iterator[dict[str, str]]:
    rng, seen = random.Random(seed), set()
    low = 10 ** (wanted.digits - 1) if wanted.digits > 1 else 0
    while True:
        a, b = (rng.randint(low, 10**wanted.digits - 1) for _ in range(2))
        if (pair := frozenset((a, b))) not in seen:
            seen.add(pair)
            yield {"question": f"{a}+{b}=", "answer": str(a + b)}


def _reasoning_gym(wanted: ProblemsConfig, seed: int) -> Iterator[dict[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a package that it brings along: SyntaxWarning
            import reasoning_gym
    except ImportError as error:
        raise ValueError("problems.reasoning_gym needs reasoning-gym: pip install 'wmss-jax[demo]'") from error
    assert wanted.reasoning_gym is not None
    name, size = wanted.reasoning_gym.dataset, sum(getattr(wanted, split) for split in SPLITS)
    try:
        # More than are wanted, because some questions come twice.
        rows = reasoning_gym.create_dataset(name, seed=seed, size=4 * size, **wanted.reasoning_gym.settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"problems.reasoning_gym: {name}: {error}") from error
    seen: set[str] = set()
    for row in rows:
        if row["question"] not in seen:
            seen.add(row["question"])
            yield {"question": row["question"], "answer": str(row["answer"])}
        if len(seen) == size:
            return
    raise ValueError(
        f"problems.reasoning_gym: {name}: {len(seen)} of {size} different questions in {4 * size}; ask for fewer"
    )
