"""`wmss data prepare`: the paper's training pools, rebuilt from their public sources by its filters.

A filter takes a row and returns the row of the pool, or the reason why there is none; what is kept and dropped is
counted by reason. Rows are read and written as a stream, and judged side by side.

    am-math   AM-DeepSeek-R1-Distilled: it thinks, answers in \\boxed{}, and math-verify agrees with the reference
    am-code   the same corpus: the program in the answer passes the row's own tests, in the sandbox
    logic     LogiQA 2.0 and ReClor, with a teacher's `generation` each: its letter is right, the question not held out
"""

import contextlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from wmss_jax import durable, examples
from wmss_jax.evals import graders
from wmss_jax.evals.catalog import TASKS
from wmss_jax.evals.grading import DEADLINE_S
from wmss_jax.evals.killable import Killable
from wmss_jax.evals.sandbox import Sandbox
from wmss_jax.sources import SourceConfig

AM = "a-m-team/AM-DeepSeek-R1-Distilled-1.4M"
_WINDOW = 256  # rows that are judged side by side
_RESPONSE = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
# Released code, dataprocess/am_deepseek_r1_distilled.py
_BOXED_RESPONSE = re.compile(r"^<think>.*?</think>\s*<answer>.*?\\boxed\{.*?\}.*?</answer>$", re.DOTALL)


class Kept(NamedTuple):
    """A row of the pool."""

    columns: dict[str, Any]


class Dropped(NamedTuple):
    """Why a row is not in the pool, in words that many rows share."""

    reason: str


Filter = Callable[[examples.Row], Kept | Dropped]


def prepare(
    pool: str,
    sources: Sequence[SourceConfig],
    out: Path,
    *,
    held_out: Sequence[SourceConfig] = (),
    root: Path = Path(),
    unsafe_no_sandbox: bool = False,
    deadline_s: float = DEADLINE_S,
) -> Counter[str]:
    """Write a pool to `out` (JSONL with messages) and return how many rows were kept, and dropped for which reason.

    Args:
        pool: a key of POOLS.
        held_out: of `logic`: rows whose questions must not be in the pool.

    Raises:
        FileExistsError: `out` exists.
        ValueError: a source cannot be read; am-code cannot run programs in a sandbox here.
    """
    if out.exists():
        raise FileExistsError(f"{out}: exists already; choose another file or remove it")
    partial = out.with_name(f"{out.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    rows = itertools.chain.from_iterable(examples.rows(source, root) for source in sources)
    settings = {"unsafe_no_sandbox": unsafe_no_sandbox, "deadline_s": deadline_s}
    not_these = itertools.chain.from_iterable(examples.rows(source, root) for source in held_out)
    with POOLS[pool](not_these, settings) as keep, partial.open("w", encoding="utf-8") as file:
        for verdict in _judged(keep, rows):
            if isinstance(verdict, Dropped):
                counts[verdict.reason] += 1
                continue
            file.write(json.dumps({"idx": counts["kept"], **verdict.columns}, ensure_ascii=False) + "\n")
            counts["kept"] += 1
    durable.sync(partial)
    partial.rename(out)
    return counts


def table(counts: Mapping[str, int]) -> str:
    """Return a line a count: kept, then the reasons, the most frequent first."""
    dropped = sorted(((n, reason) for reason, n in counts.items() if reason != "kept"), reverse=True)
    return "\n".join([f"{counts.get('kept', 0):,} kept", *(f"{n:,} dropped: {reason}" for n, reason in dropped)])


def _judged(keep: Filter, rows: Iterable[examples.Row]) -> Iterator[Kept | Dropped]:
    rows = iter(rows)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        while window := list(itertools.islice(rows, _WINDOW)):
            yield from threads.map(keep, window)


# -- AM-DeepSeek-R1-Distilled -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _am_math(held_out: Iterable[examples.Row], settings: Mapping[str, Any]) -> Iterator[Filter]:
    del held_out
    with Killable(
        "wmss_jax.evals.symbolic:boxed_same", deadline_s=settings["deadline_s"], imports=["math_verify"]
    ) as same:

        def keep(row: examples.Row) -> Kept | Dropped:
            question, response, info = _conversation(row)
            if not _BOXED_RESPONSE.match(response):
                return Dropped("no <think>...</think> <answer>...\\boxed{}...</answer>")
            if not (gold := str(info.get("reference_answer") or "").strip()):
                return Dropped("no reference answer")
            reply = same(response, gold)
            if reply.value is None:
                return Dropped("the comparison hung" if reply.hung else "the comparison failed")
            return Kept(_messages(question, response)) if reply.value["right"] else Dropped("another answer")

        yield keep


@contextlib.contextmanager
def _am_code(held_out: Iterable[examples.Row], settings: Mapping[str, Any]) -> Iterator[Filter]:
    del held_out
    sandbox = Sandbox.open(unsafe=settings["unsafe_no_sandbox"])

    def keep(row: examples.Row) -> Kept | Dropped:
        question, response, info = _conversation(row)
        if not _RESPONSE.match(response):
            return Dropped("no <think>...</think> <answer>...</answer>")
        tests = _parsed(info.get("test_case"))
        if not tests:
            return Dropped("no tests")
        program = graders.code(graders.final(response))
        if (passed := _passes(sandbox, program, tests)) is None:
            return Dropped("tests of an unknown form")
        return Kept(_messages(question, response)) if passed else Dropped("the program fails its tests")

    yield keep


def _conversation(row: examples.Row) -> tuple[str, str, Mapping[str, Any]]:
    """Return question, response, and what the corpus says of the question."""
    messages = row.columns.get("messages")
    try:
        question, response = messages[0], messages[1]  # pyright: ignore[reportOptionalSubscript]
        return question["content"], response["content"], question.get("info") or {}
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{row.location}: messages with a question and a response are expected") from error


def _messages(question: str, response: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": response}]}


def _parsed(tests: Any) -> Any:
    if not isinstance(tests, str):
        return tests
    try:
        return json.loads(tests)
    except json.JSONDecodeError:
        return tests  # Python text


def _passes(sandbox: Sandbox, program: str, tests: Any) -> bool | None:
    """Return whether a program passes; None if the tests are none of these: Python text with asserts, a list of such,
    {"inputs", "outputs"} of standard input and output, or with "fn_name" of a function's arguments and value."""
    if isinstance(tests, list) and all(isinstance(line, str) for line in tests):
        tests = "\n".join(tests)
    if isinstance(tests, str):
        return sandbox.passes(program, tests).passed if "assert" in tests else None
    if (
        not isinstance(tests, Mapping)
        or not tests.get("inputs")
        or len(tests["inputs"]) != len(tests.get("outputs", ()))
    ):
        return None
    pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
    if name := tests.get("fn_name"):
        lines = [f"assert {name}(*{given!r}) in ({wanted!r}, {_only(wanted)!r})" for given, wanted in pairs]
        return sandbox.passes(program, "\n".join(lines), [name]).passed
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        return None
    return all(_prints(sandbox, program, given, wanted) for given, wanted in pairs)


def _only(wanted: Any) -> Any:
    """Return the value that stands in a list of its own, as some sources write what a function returns."""
    return wanted[0] if isinstance(wanted, list) and len(wanted) == 1 else wanted


def _prints(sandbox: Sandbox, program: str, given: str, wanted: str) -> bool:
    found = sandbox.output(program, given)
    lines = lambda text: [line.rstrip() for line in text.strip().splitlines()]
    return not found.reason and lines(found.text) == lines(wanted)


# -- LogiQA 2.0 and ReClor --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _logic(held_out: Iterable[examples.Row], settings: Mapping[str, Any]) -> Iterator[Filter]:
    del settings
    seen = {_logic_key(row) for row in held_out}

    def keep(row: examples.Row) -> Kept | Dropped:
        task = _logic_task(row)
        response = row.columns.get("generation")
        if _logic_key(row) in seen:
            return Dropped("held out")
        if not isinstance(response, str) or not response.strip():
            return Dropped("no generation")
        if not graders.letter(graders.chosen(graders.final(response)) or "-", examples.fill(task.answer, row)):
            return Dropped("another answer")
        return Kept(_messages(examples.fill(task.prompt, row), response))

    yield keep


def _logic_task(row: examples.Row) -> Any:
    """Return the task whose columns a row has."""
    for name, column in (("logiqa2", "options"), ("reclor", "answers")):
        if column in row.columns:
            return TASKS[name]
    raise ValueError(f"{row.location}: has neither LogiQA's column options nor ReClor's answers")


def _logic_key(row: examples.Row) -> str:
    """Return what two copies of a question share: its words."""
    return " ".join(examples.fill(_logic_task(row).prompt, row).lower().split())


POOLS: dict[str, Callable[..., contextlib.AbstractContextManager[Filter]]] = {
    "am-math": _am_math,
    "am-code": _am_code,
    "logic": _logic,
}
