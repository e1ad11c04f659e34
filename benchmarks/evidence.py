"""docs/EVIDENCE.md, and whether it still holds.

    wmss lab configs/lab/arithmetic.yaml                                   # for every study; half an hour each at most
    python -m benchmarks.evidence write runs/lab/addition/*.parquet runs/lab/word_problems/*.parquet
    python -m benchmarks.evidence check                                    # a part of the first again: minutes

`write` copies the rows to docs/evidence/ and makes docs/EVIDENCE.md of all that lies there. `check` carries two seeds
of three arms out again and compares them with the committed rows: same data and recipes, and accuracies within
TOLERANCE. With the same versions on the same kind of processor they are the same numbers; on another one rounding
differs, and at the edge of learning a task that moves a seed by points.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wmss_jax import yamlfile
from wmss_jax.lab import results, run, study, table, workers

ROOT = Path(__file__).parent.parent
ROWS, PAGE = ROOT / "docs/evidence", ROOT / "docs/EVIDENCE.md"
CHECKED, SEEDS, ARMS = "arithmetic", (0, 1), ("sft_best", "wmss", "constant")
TOLERANCE = 0.15
ALPHA = 0.05

INTRODUCTION = """# Evidence

Made by `wmss lab` alone, from the rows in [evidence/](evidence): one number a row, with arm, seed, rate, split, steps,
digests of data and recipe, and versions. `python -m benchmarks.evidence write` makes this page of them, and `.ci/run`
carries a part out again. Models of this size (about 0.1 M parameters, from scratch) say whether there is an effect at
all and what else would explain it. They say nothing about billions of parameters with a pre-trained base.
"""


def write(files: Sequence[Path], rows: Path = ROWS, page: Path = PAGE) -> None:
    """Copy the rows of studies to `rows` and make the page of all that is there.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or holds no rows of a study.
    """
    for file in files:
        results.read(file)  # says what is wrong with it
    rows.mkdir(parents=True, exist_ok=True)
    for file in files:
        (rows / file.name).write_bytes(file.read_bytes())
    page.write_text(text(sorted(rows.glob("*.parquet"))))


def text(files: Sequence[Path]) -> str:
    """Return the page: first what was found, then every study's tables."""
    against, found, studies = [], [], []
    for file in files:
        rows, meta = results.read(file)
        config = _study(meta)
        for split in meta["tests"]:
            against += [(f"{file.stem}, {split}", contrast) for contrast in _of_wmss(rows, config, split)]
            found += [f"- {file.stem}, {split}: {said}." for said in table.contrasts(rows, config, split)]
        versions = " | ".join(sorted({row.versions for row in rows}))
        studies.append(
            f"## {file.stem}\n\n`wmss lab configs/lab/{file.stem}.yaml`, finished {meta['made']} ({versions}); "
            f"{len(rows):,} rows.\n\n{table.text(rows, config, meta['tests'])}"
        )
    return "\n".join([INTRODUCTION, "## What was found\n", headline(against), "", *found, "", *studies])


def _of_wmss(rows: Sequence[results.Row], config: study.StudyConfig, split: str) -> list[table.Contrast]:
    """Return the arm `wmss` against the study's reference, and against what the study contrasts it with."""
    to_reference = [
        table.Contrast(line.arm, config.reference, line.versus, line.p_holm)
        for line in table.compare(rows, config, split)
        if line.arm == "wmss" and line.versus is not None
    ]
    return to_reference + [found for found in table.contrasts(rows, config, split) if found.arm == "wmss"]


def headline(against: Sequence[tuple[str, table.Contrast]]) -> str:
    """Return in how many of its comparisons `wmss` is above, and in which; "above" is what Holm's correction leaves."""
    told = [(where, it) for where, it in against if it.p_holm < ALPHA]
    above, below = ([(where, it) for where, it in told if sign * it.difference.mean > 0] for sign in (1, -1))
    listed = lambda pairs: "; ".join(
        f"{it.other} ({where}): {100 * it.difference.mean:+.1f} points" for where, it in pairs
    )
    said = f"**`wmss` is above what it is compared with in {len(above)} of {len(against)} comparisons"
    said += f": {listed(above)}.**" if above else ".**"
    return said + (f" It is below in {len(below)}: {listed(below)}." if below else "")


def check() -> list[str]:
    """Return what does not hold any more."""
    file = ROWS / f"{CHECKED}.parquet"
    if not file.exists():
        return [
            f"{file.relative_to(ROOT)} is missing, so there is nothing to compare with; see the top of this program"
        ]
    committed, meta = results.read(file)
    rates = table.best_rates(committed, _study(meta))
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(ROOT):  # where a study's paths start
        given, _ = yamlfile.read(ROOT / f"configs/lab/{CHECKED}.yaml")
        arms = {name: {**given["arms"][name], "rates": [rates[name]]} for name in ARMS}
        few = study.load({**given, "arms": arms, "contrasts": [], "seeds": list(SEEDS), "work_dir": work})
        repeated, failed = run.carry_out(few, workers.cores(), say=_say)
    problems = [f"{what}: {failure.message}" for what, failure in failed.items()]
    return problems + differences(committed, repeated)


def differences(committed: Sequence[results.Row], repeated: Sequence[results.Row]) -> list[str]:
    """Return where repeated rows contradict committed ones."""
    key = lambda row: (row.arm, row.seed, row.rate, row.split, row.metric)
    known, problems, same = {key(row): row for row in committed}, [], 0
    compared = [row for row in repeated if row.metric == "accuracy"]
    for row in compared:
        where = f"{row.arm}, seed {row.seed}, {row.split}"
        before = known.get(key(row))
        if before is None:
            problems.append(f"{where}: no committed row at rate {row.rate}")
        elif (row.data_digest, row.config_digest) != (before.data_digest, before.config_digest):
            problems.append(f"{where}: other data or another recipe than the committed rows are of; make them again")
        elif abs(row.value - before.value) > TOLERANCE:
            problems.append(f"{where}: accuracy {row.value:.3f}, committed {before.value:.3f}")
        same += before is not None and row.value == before.value
    _say(f"{same} of {len(compared)} accuracies are the committed ones to the last digit")
    return problems if compared else ["nothing was repeated"]


def _study(meta: Mapping[str, Any]) -> study.StudyConfig:
    return study.StudyConfig.model_validate_json(json.dumps(meta["study"]))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["write"]:
        write([Path(file) for file in arguments[1:]])
        return 0
    if list(arguments) != ["check"]:
        _say("python -m benchmarks.evidence write FILE... | check")
        return 2
    problems = check()
    for problem in problems:
        _say(f"evidence: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
