"""What `wmss inspect` prints: examples with their trained tokens marked, and a data set and its plan in numbers."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from rich.console import Console
from rich.text import Text

from wmss_jax import curriculum
from wmss_jax.data import Dataset
from wmss_jax.epochs import Plan

_BINS, _WIDTH = 12, 40  # of the histogram: rows, and characters of the longest bar
_STYLE = "black on green"


def show(dataset: Dataset, tokenizer: Any, indices: Iterable[int], loss_on: str, console: Console) -> None:
    """Print examples as the model sees them, trained tokens coloured; where there is no colour, between ⟦ and ⟧.

    example 0, train.jsonl:1: 11 tokens, 2 trained
    <|user|>2 + 3?<|assistant|>⟦5<|eos|>⟧
    """
    for index in indices:
        if not 0 <= index < len(dataset):
            raise ValueError(f"example {index} is outside 0 to {len(dataset) - 1}")
        tokens, mask = dataset.tokens(index), dataset.mask(index, loss_on)
        trained = int(np.count_nonzero(mask))
        console.print(
            f"example {index}, {dataset.location(index)}: {len(tokens)} tokens, {trained} trained",
            style="bold", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        text = Text()
        for part, is_trained in _runs(tokens, mask, tokenizer):
            if is_trained and console.color_system is None:
                part = f"⟦{part}⟧"
            text.append(part, _STYLE if is_trained else "")
        text.append("\n")
        console.print(text, soft_wrap=True)


def summary(
    dataset: Dataset,
    plan: Plan,
    probs: Float64[np.ndarray, " n"] | None = None,
    term_shares: Mapping[str, float] | None = None,
) -> str:
    """Return a page of text: sizes, lengths, duplicates, the plan and, with `probs`, what the curriculum does.

    Args:
        term_shares: of each curriculum term, see `curriculum.term_shares`.
    """
    report, n = dataset.report, len(dataset)
    lines = [
        f"examples          {n:,}",
        f"tokens            {report.tokens:,}, {report.trained_tokens / report.tokens:.1%} of them completion targets",
        f"longest           {report.longest:,} tokens, before any cut",
        f"truncated         {report.truncated:,}",
        f"dropped           {report.dropped:,}",
        f"duplicates        {_duplicates(dataset)}",
        "",
        "tokens of an example",
        *_histogram(dataset.lengths),
        "",
        *_plan_lines(plan, n),
    ]
    if probs is not None:
        share = curriculum.effective_share(probs)
        lines.append(f"effective size    {share * n:,.0f} examples, {share:.1%} of all")
    for name, share in (term_shares or {}).items():
        lines.append(f"  {name:<15} {share:.1%} of the draws")
    return "\n".join(lines)


def _plan_lines(plan: Plan, n: int) -> list[str]:
    drawn = np.concatenate(plan.draws)
    repeated = sum(len(draw) - len(np.unique(draw)) for draw in plan.draws)
    never = n - len(np.unique(plan.items))
    per_epoch = np.diff(plan.epoch_starts).tolist()
    listed = ", ".join(map(str, per_epoch[:8])) + (", ..." if len(per_epoch) > 8 else "")
    return [
        f"steps             {plan.total_steps:,} of {plan.batch_size:,} rows x {plan.seq_len:,} tokens",
        f"steps an epoch    {listed}",
        f"fill              {plan.fill:.1%} of the positions hold a token",
        f"draws             {len(drawn):,} in {len(plan.draws)} epochs, {repeated:,} repeated within an epoch",
        f"never seen        {never:,} examples",
    ]


def _runs(tokens: np.ndarray, mask: Bool[np.ndarray, " n"], tokenizer: Any) -> Iterable[tuple[str, bool]]:
    """The text of each stretch of tokens that are all trained or all not."""
    cuts = np.flatnonzero(np.diff(mask)) + 1
    for part, trained in zip(np.split(tokens, cuts), np.split(mask, cuts), strict=True):
        yield tokenizer.decode(part.tolist(), skip_special_tokens=False), bool(trained[0])


def _duplicates(dataset: Dataset) -> str:
    """How many examples have the tokens and the mask of an earlier one, and where the first of them is."""
    seen: dict[bytes, int] = {}
    repeats = []
    for index in range(len(dataset)):
        content = hashlib.blake2b(dataset.tokens(index).tobytes(), digest_size=16)
        content.update(dataset.mask(index).tobytes())
        first = seen.setdefault(content.digest(), index)
        if first != index:
            repeats.append((index, first))
    if not repeats:
        return "none"
    index, first = map(dataset.location, repeats[0])
    return f"{len(repeats):,} examples repeat an earlier one (first: {index} is {first})"


def _histogram(lengths: Int64[np.ndarray, " n"]) -> list[str]:
    """Bars of equal width in tokens, the first beginning at the shortest."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // _BINS))
    counts = np.bincount((lengths - low) // width)
    lines = []
    for at, count in enumerate(counts.tolist()):
        start = low + at * width
        bar = "█" * round(_WIDTH * count / counts.max())
        lines.append(f"{start:>8} to {min(start + width - 1, high):<8}{count:>9,} {bar}".rstrip())
    return lines
