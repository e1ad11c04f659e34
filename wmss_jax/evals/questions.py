"""Tasks to questions: of hub data sets, local files of the same columns, files of one's own, procedural problems."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from wmss_jax import examples
from wmss_jax.evals import symbolic
from wmss_jax.evals.catalog import TASKS, GraderName, Task
from wmss_jax.sources import SourceConfig

_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_GYM = "reasoning_gym:"


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked, and what its answer is judged by.

    Attributes:
        location: the row that it was made of.
        gold: the right answer; empty where something else decides.
        choices: texts of the options, in the order of their letters.
        tests, entry_point, beginning: of a program: see `catalog.Task`; the beginning is what it is to continue.
        gym: data set, size, seed and index of a procedural problem.
    """

    prompt: str
    gold: str
    location: str
    choices: tuple[str, ...] = ()
    tests: str = ""
    entry_point: str = ""
    beginning: str = ""
    gym: tuple[str, int, int, int] | None = None


def task_named(name: str, grader: str | None = None) -> Task:
    """Return a task of the catalogue, `reasoning_gym:NAME`, or that of a file with columns question and answer.

    Raises:
        ValueError: there is none of that name, or nothing says how a file's answers are graded.
    """
    if name.startswith(_GYM):
        gym = name.removeprefix(_GYM)
        return Task(name.replace(":", "_"), None, grader="verifier", max_new_tokens=2048, gym=gym)
    if name.endswith(_ENDINGS):
        if grader is None:
            raise ValueError(f"{name}: say by --grader how its answers are graded: exact, numeric, letter, math, ...")
        stem = Path(name).name.partition(".")[0]
        return Task(stem, name, "{question}", "{answer}", grader=_known(grader), max_new_tokens=2048)
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}, {_GYM}NAME, and files such as my.jsonl")
    return TASKS[name] if grader is None else dataclasses.replace(TASKS[name], grader=_known(grader))


def read(task: Task, data: Path | None = None, limit: int | None = None, seed: int = 42) -> list[Question]:
    """Return a task's questions.

    Args:
        data: directory with local copies: DATA/NAME.jsonl, DATA/NAME/test.json, or the one data file in DATA/NAME/.
        limit: questions from the start; of procedural problems their number (default 100).
        seed: of procedural problems.

    Raises:
        ValueError: a row lacks a column, or its answer is empty; the message begins with file and line.
        FileNotFoundError: there is no such file or hub data set.
    """
    if task.gym is not None:
        return _procedural(task.gym, limit or 100, seed)
    rows = examples.rows(*_source(task, data, limit))
    return [_question(task, row) for row in rows]


def _known(grader: str) -> Any:
    of_files = [name for name in get_args(GraderName) if name not in ("tests", "verifier")]
    if grader not in of_files:
        raise ValueError(f"no grader {grader!r}; there are {', '.join(of_files)}")
    return grader


def _question(task: Task, row: examples.Row) -> Question:
    filled = lambda template: examples.fill(template, row) if template else ""
    gold = filled(task.answer)
    if task.answer and not gold.strip():
        raise ValueError(f"{row.location}: the answer is empty; fill it in, or remove the row")
    tests = filled(task.tests)
    if task.tests and not tests.strip():
        raise ValueError(f"{row.location}: there are no tests; fill them in, or remove the row")
    return Question(
        filled(task.prompt), gold, row.location, tuple(map(filled, task.choices)), tests, filled(task.entry_point),
        filled("{prompt}") if task.completes else "",
    )  # fmt: skip


def _procedural(name: str, size: int, seed: int) -> list[Question]:
    problems = symbolic.reasoning_gym(name, size, seed)
    return [
        Question(entry["question"], str(entry["answer"] or ""), f"{name}[{index}]", gym=(name, size, seed, index))
        for index, entry in enumerate(itertools.islice(problems, size))
    ]


def _source(task: Task, data: Path | None, limit: int | None) -> tuple[SourceConfig, Path]:
    if data is not None and (found := _local(task, data)) is not None:
        return SourceConfig(path=found.name, limit=limit), found.parent
    if task.path is None:
        looked = f" (looked in {data})" if data is not None else ""
        raise ValueError(f"{task.name}: is on no hub; give --data DIR with {task.name}/{task.split}.jsonl{looked}")
    hub = {} if task.path.endswith(_ENDINGS) else {"split": task.split, "subset": task.subset}
    return SourceConfig(path=task.path, limit=limit, **hub), Path()


def _local(task: Task, data: Path) -> Path | None:
    """Return the file of a task in a directory of local copies."""
    named = [data / f"{task.name}{ending}" for ending in _ENDINGS]
    split = [data / task.name / f"{task.split}{ending}" for ending in _ENDINGS]
    only = _data_files(data / task.name)
    for path in [*named, *split, *(only if len(only) == 1 else ())]:
        if path.is_file():
            return path
    return None


def _data_files(directory: Path) -> Sequence[Path]:
    return [path for path in sorted(directory.glob("*")) if path.name.endswith(_ENDINGS)]
