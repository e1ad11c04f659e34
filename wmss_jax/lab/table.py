"""From tidy rows to the table: each arm at its best rate, with intervals and paired differences to the reference."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from wmss_jax import intervals
from wmss_jax.lab import results
from wmss_jax.lab.results import Row
from wmss_jax.lab.study import StudyConfig

SATURATED, OPEN = 0.95, 0.95  # M1's accuracy on training problems from here on; on test problems up to here


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm at its best rate, on one test split, against the reference at its own.

    Attributes:
        rate: None of M0 and M1, and of an arm without a rate at which all seeds ended.
        versus: None of the reference itself and the starting points; NaN where seeds are missing.
        p_holm: corrected for all arms that are compared on this split.
    """

    arm: str
    rate: float | None
    steps: int
    accuracy: intervals.Mean | None
    versus: intervals.Difference | None = None
    p_holm: float = math.nan


def best_rates(rows: Sequence[Row], study: StudyConfig) -> dict[str, float | None]:
    """Return each arm's rate of highest mean accuracy on the validation problems, over all seeds; the lowest of equals.

    Rates at which a seed is missing, because it diverged or failed, are out; None where none remains.
    """
    found, seeds = results.values(rows, study.validation, "accuracy"), set(study.seed_list)
    chosen: dict[str, float | None] = {}
    for name, arm in study.arms.items():
        means = {
            rate: sum(by_seed[seed] for seed in sorted(seeds)) / len(seeds)
            for rate in sorted(arm.rates or study.rates)
            if seeds <= set(by_seed := found.get((name, rate), {}))
        }
        chosen[name] = max(means, key=lambda rate: means[rate]) if means else None
    return chosen


def compare(rows: Sequence[Row], study: StudyConfig, split: str, metric: str = "accuracy") -> list[Comparison]:
    """Return M0, M1 and every arm on a split, the arms with their paired differences to the reference arm."""
    rates, found = best_rates(rows, study), results.values(rows, split, metric)
    steps = {(row.arm, row.rate): row.steps for row in rows}
    seeds = study.seed_list
    of = lambda arm, rate: [found[arm, rate][seed] for seed in seeds]
    lines = [
        Comparison(name, None, 0, intervals.mean(of(name, None)))
        for name in ("M0", "M1")
        if set(seeds) <= set(found.get((name, None), {}))
    ]
    reference = rates[study.reference]
    for name, rate in rates.items():
        if rate is None:
            lines.append(Comparison(name, None, 0, None))
            continue
        versus = None
        if name != study.reference and reference is not None:
            versus = intervals.paired(of(name, rate), of(study.reference, reference))
        lines.append(Comparison(name, rate, steps[name, rate], intervals.mean(of(name, rate)), versus))
    corrected = intervals.holm([line.versus.p if line.versus else math.nan for line in lines])
    return [dataclasses.replace(line, p_holm=p) for line, p in zip(lines, corrected, strict=True)]


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One arm minus another on one test split, each at its best rate; corrected for all contrasts of that split."""

    arm: str
    other: str
    difference: intervals.Difference
    p_holm: float

    def __str__(self) -> str:
        d = self.difference
        verdict = "no difference can be told" if not d.p < 0.05 else "above" if d.mean > 0 else "below"
        if d.p < 0.05 <= self.p_holm:
            verdict += ", but not after Holm's correction"
        return (
            f"{self.arm} - {self.other}: {100 * d.mean:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}], "
            f"p {d.p:.3f}, Holm {self.p_holm:.3f}, {d.above} of {d.n} seeds up: {verdict}"
        )


def contrasts(rows: Sequence[Row], study: StudyConfig, split: str, metric: str = "accuracy") -> list[Contrast]:
    """Return the study's contrasts on a split; without those that need an arm of which no rate ended."""
    rates, found = best_rates(rows, study), results.values(rows, split, metric)
    of = lambda arm: [found[arm, rates[arm]][seed] for seed in study.seed_list]
    pairs = [pair for pair in study.contrasts if None not in [rates[name] for name in pair]]
    differences = [intervals.paired(of(arm), of(other)) for arm, other in pairs]
    corrected = intervals.holm([difference.p for difference in differences])
    return [Contrast(*pair, d, p) for pair, d, p in zip(pairs, differences, corrected, strict=True)]


def warnings(rows: Sequence[Row], study: StudyConfig, tests: Sequence[str]) -> list[str]:
    """Return why the comparison says little: a set-up that does not saturate, arms that failed, a rate at the edge."""
    said = []
    train = _mean(rows, study.train, "M1")
    if not train >= SATURATED:
        said.append(
            f"M1 answers {_percent(train)} of its training problems, below {SATURATED:.0%}: it has not saturated, and "
            f"more fine-tuning would do what the arms do"
        )
    for split in tests:
        if (test := _mean(rows, split, "M1")) > OPEN:
            said.append(f"M1 answers {_percent(test)} of {split}, above {OPEN:.0%}: nothing is left to gain there")
    for name, rate in best_rates(rows, study).items():
        tried = study.arms[name].rates or study.rates
        if rate is None:
            said.append(f"{name}: there is no rate at which all seeds ended")
        elif len(tried) > 1 and rate in (min(tried), max(tried)):
            edge = "lowest" if rate == min(tried) else "highest"
            said.append(f"{name}: its best rate, {rate:g}, is the {edge} that was tried; a better one may lie beyond")
    return said


def text(rows: Sequence[Row], study: StudyConfig, tests: Sequence[str]) -> str:
    """Return the tables of all test splits as Markdown, with what they mean and what is to be doubted."""
    parts = [_legend(study)]
    for split in tests:
        header, *lines = _cells(rows, study, split)
        body = ["| " + " | ".join(line) + " |" for line in [header, ["---"] + ["---:"] * (len(header) - 1), *lines]]
        lines = "".join(f"- {contrast}\n" for contrast in contrasts(rows, study, split))
        parts.append(f"**{split}**, accuracy in %\n\n" + "\n".join(body) + (f"\n\n{lines}".rstrip() if lines else ""))
    parts += [f"- Warning: {said}." for said in warnings(rows, study, tests)]
    return "\n\n".join(parts).replace(".\n\n- Warning", ".\n- Warning") + "\n"


def terminal(rows: Sequence[Row], study: StudyConfig, tests: Sequence[str]) -> list[Any]:
    """Return the same for a rich console."""
    shown: list[Any] = []
    for split in tests:
        header, *lines = _cells(rows, study, split)
        table = Table(title=f"{split}, accuracy in %", box=box.SIMPLE_HEAD, title_justify="left")
        for index, column in enumerate(header):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        shown += [table, *(f"  {contrast}" for contrast in contrasts(rows, study, split)), ""]
    return [*shown, _legend(study), *(f"Warning: {said}." for said in warnings(rows, study, tests))]


def _cells(rows: Sequence[Row], study: StudyConfig, split: str) -> list[list[str]]:
    header = ["arm", "peak lr", "steps", "mean ± 95 % CI", f"Δ to {study.reference}", "95 % CI", "p", "p (Holm)", "up"]
    train, nll = results.values(rows, study.train, "accuracy"), results.values(rows, "held_out", "nll")
    header += ["train"] + (["held-out NLL"] if nll else [])
    lines = [header]
    for line in compare(rows, study, split):
        if line.accuracy is None:
            lines.append([line.arm, "none ended", *[""] * (len(header) - 2)])
            continue
        a, d = line.accuracy, line.versus
        cells = [line.arm, "" if line.rate is None else f"{line.rate:g}", str(line.steps)]
        cells.append(f"{100 * a.mean:.1f} ± {100 * a.half_width:.1f}")
        if d is None:
            cells += [""] * 5
        else:
            cells += [f"{100 * d.mean:+.1f}", f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]"]
            cells += [f"{d.p:.3f}", f"{line.p_holm:.3f}", f"{d.above}/{d.n}"]
        key = line.arm, line.rate
        cells.append(_percent(_average(train[key])) if key in train else "")
        if nll:
            cells.append(f"{_average(nll[key]):.3f}" if key in nll else "")
        lines.append(cells)
    return lines


def _legend(study: StudyConfig) -> str:
    same = {
        "steps": "All arms of a seed take the same number of optimizer steps from the same M1",
        "flops": "All arms of a seed take the model FLOPs of the reference arm, from the same M1",
        "nothing": "Arms differ in length (the column steps), from the same M1",
    }[study.equal]
    compared = len(study.arms) - 1
    return (
        f"{same}; {len(study.seed_list)} paired seeds. Each arm is at its best peak learning rate of those tried, "
        f"chosen by its mean accuracy on {study.validation} over all seeds. Intervals and p are of Student's t over "
        f"seeds (paired for Δ); Holm corrects for {compared} comparison{'s' if compared != 1 else ''} on one split; "
        f"up: seeds above {study.reference}."
    )


def _mean(rows: Sequence[Row], split: str, arm: str) -> float:
    return _average(results.values(rows, split, "accuracy").get((arm, None), {}))


def _average(by_seed: Mapping[int, float]) -> float:
    return sum(by_seed.values()) / len(by_seed) if by_seed else math.nan


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
