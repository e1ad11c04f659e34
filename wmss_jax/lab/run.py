"""`wmss lab`: carry a study out and show its table; gone on with where it was interrupted.

work_dir/data/seed-N/      the seed's problems, where the study makes them
work_dir/seed-N/           its M0 and M1, the stages of a recipe
work_dir/results/*.json    the figures of one run each, under a digest of everything that it depends on
work_dir/STUDY.parquet     all its rows; STUDY.md: its table; failures/: tracebacks
"""

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from wmss_jax import arms, config, preemption
from wmss_jax.lab import results, table, workers
from wmss_jax.lab.results import Row
from wmss_jax.lab.study import Study, digest, versions
from wmss_jax.lab.workers import Failure, Run

TABLE_COLUMNS = 132


def main(study: Study, count: int | None = None, say: Callable[[str], None] = print) -> int:
    """Carry a study out, print its table, and return the exit code: 1 if a run failed.

    Args:
        count: processes; None: as many as there are cores.

    Raises:
        ValueError: the study cannot be carried out.
        preemption.Preempted: SIGTERM came; finished runs are kept.
    """
    with preemption.exit_when_asked():
        rows, failed = carry_out(study, count or workers.cores(), say)
    work = Path(study.config.work_dir)
    if rows:
        (work / f"{study.name}.md").write_text(table.text(rows, study.config, study.tests))
        console = Console(highlight=False, markup=False)
        console.width = max(console.width, TABLE_COLUMNS)  # a table cut off says nothing, one that wraps can be read
        for part in table.terminal(rows, study.config, study.tests):
            console.print(part)
        say(f"rows: {work / study.name}.parquet; table: {work / study.name}.md")
    for run, failure in failed.items():
        say(f"failed: {run}: {failure.message}")
    return int(bool(failed))


def carry_out(study: Study, count: int, say: Callable[[str], None]) -> tuple[list[Row], dict[Run, Failure]]:
    """Return the rows of all runs, from earlier calls or made now, and the runs that failed."""
    _check_objectives(study)
    files = dict(_files(study))
    wanted: dict[Path, Run] = {}
    for run, file in files.items():
        if not file.exists():
            wanted.setdefault(file, run)  # a run that two arms have in common is carried out once
    runs = list(wanted.values())
    say(f"{len(runs)} of {len(set(files.values()))} runs to do, {min(count, max(1, len(runs)))} side by side")
    failed: dict[Run, Failure] = {}
    done, began = 0, time.monotonic()

    def tell(run: Run, result: Any) -> None:
        nonlocal done
        done += 1
        if isinstance(result, Failure):
            failed[run] = result
            said = f"failed: {result.message}"
            trace = Path(study.config.work_dir) / "failures" / f"{files[run].stem}.txt"
            trace.parent.mkdir(exist_ok=True)
            trace.write_text(f"{run}\n\n{result.trace or result.message}\n")
        else:
            _write(files[run], {name: dataclasses.asdict(measured) for name, measured in result.items()})
            last = list(result.values())[-1]
            right = last.figures[study.config.validation]["accuracy"]
            said = f"{100 * right:.1f} % of {study.config.validation}, {last.figures['run']['seconds']:.1f} s"
        say(f"[{done}/{len(runs)}, {(time.monotonic() - began) / 60:.1f} min] {run}: {said}")

    if runs:
        Path(study.config.work_dir).mkdir(parents=True, exist_ok=True)
        workers.carry_out(study, runs, min(count, len(runs)), tell)
    rows = [row for run, file in files.items() if file.exists() for row in _rows(study, run, file)]
    if rows:
        meta = {
            "study": study.config.model_dump(mode="json"),
            "tests": study.tests,
            "made": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        results.write(Path(study.config.work_dir) / f"{study.name}.parquet", rows, meta)
    return rows, failed


def _check_objectives(study: Study) -> None:
    """Raise ConfigError where an arm's objective is none, or does not go together with its other settings."""
    mistakes = []
    for name, recipe in study.arms.items():
        try:
            arms.objective(recipe, "joint")
        except config.ConfigError as error:
            mistakes += [f"arms.{name}: {line}" for line in str(error).splitlines()]
    if mistakes:
        raise config.ConfigError("\n".join(mistakes))


def _files(study: Study) -> Iterator[tuple[Run, Path]]:
    """Give every run of a study with the file that holds its figures, or will."""
    directory = Path(study.config.work_dir) / "results"
    equal_to = config.digest(study.arms[study.config.reference]) if study.config.equal == "flops" else None
    for seed in study.config.seed_list:
        study.prepare_data(seed)
        made_of = {
            "seed": seed,
            "data": study.data_digest(seed),
            "versions": versions(),
            "base": _identity(study, None),
            "architecture": study.architecture_digest(),
        }
        yield Run(seed), directory / f"{digest(made_of)}.json"
        for name in study.arms:
            for rate in study.rates(name):
                of_arm = {**made_of, "arm": _identity(study, name), "rate": rate, "equal_to": equal_to}
                yield Run(seed, name, rate), directory / f"{digest(of_arm)}.json"


def _identity(study: Study, arm: str | None) -> str:
    """Return the digest of an arm's recipe, or of the base's, without where it is carried out."""
    recipe = study.base if arm is None else study.arms[arm]
    return config.digest(recipe.model_copy(update={"work_dir": ".", "controls": {}}))


def _write(file: Path, content: Mapping[str, Any]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)


def _rows(study: Study, run: Run, file: Path) -> Iterator[Row]:
    """Give the rows of a run from its file, under the name that the arm has now."""
    said = ", ".join(f"{name} {version}" for name, version in versions().items())
    for name, measured in json.loads(file.read_text()).items():
        arm = name if run.arm is None else run.arm
        for split, by_metric in measured["figures"].items():
            for metric, value in by_metric.items():
                yield Row(
                    arm, run.seed, run.rate, measured["steps"], split, metric, value, _identity(study, run.arm),
                    study.data_digest(run.seed), said,
                )  # fmt: skip
