"""Graders on a committed list of answers with the verdicts of a reader, and math-verify where inputs hang it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wmss_jax.evals import grading
from wmss_jax.evals.killable import Killable
from wmss_jax.evals.questions import Question

# A line each: prediction, gold, whether a reader says they agree, the graders that are to say so, too; and `except`: of
# these, the ones that are known to judge otherwise.
FILE = Path(__file__).parent / "golden" / "answers.jsonl"
PAIRS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
HANGS = r"\boxed{99999999!}"


def test_verdicts_are_those_of_a_reader():
    assert len(PAIRS) >= 200
    with grading.opened({"math", "numeric", "letter", "exact"}) as judges, ThreadPoolExecutor(2) as threads:

        def disagreements(pair):
            question = Question("", pair["gold"], "")
            found = {name: judges[name](pair["prediction"], question, "all") for name in pair["graders"]}
            return [name for name, verdict in found.items() if verdict.right != pair["right"]]

        found = list(threads.map(disagreements, PAIRS))
    wrong = [(pair, names) for pair, names in zip(PAIRS, found, strict=True) if names != pair.get("except", [])]
    assert not wrong


def graded(n: int, hanging: int, deadline_s: float) -> float:
    """Grade n answers of which some hang, check every reply, and return the seconds that it took."""
    every = n // hanging
    predictions = [HANGS if i % every == every - 1 else rf"\boxed{{\frac{{{i}}}{{7}}}}" for i in range(n)]
    with Killable("wmss_jax.evals.symbolic:same", deadline_s=deadline_s, imports=["math_verify"], workers=2) as same:
        assert same("1", "1").value["right"]  # its workers start
        start = time.monotonic()
        with ThreadPoolExecutor(2) as threads:
            replies = list(threads.map(lambda i: same(predictions[i], f"{i + i % 2}/7"), range(n)))
        seconds = time.monotonic() - start
    for i, reply in enumerate(replies):
        if predictions[i] == HANGS:
            assert reply.hung and reply.value is None
        else:
            assert reply.value["right"] == (i % 2 == 0)
    assert sum(reply.hung for reply in replies) == hanging
    return seconds


def test_hanging_inputs_cost_their_deadline_and_no_more():
    assert graded(200, 2, 1.0) < 60


@pytest.mark.slow
def test_ten_thousand_gradings_with_one_percent_hanging_end_in_bounded_time():
    seconds = graded(10_000, 100, 1.0)
    print(f"{seconds:.0f} s")
    assert seconds < 100 * 1.0 + 10_000 * 0.05  # on one core


def test_a_worker_that_is_lost_is_replaced():
    with Killable("os:getpid", deadline_s=5, workers=1) as pid:
        first = pid().value
        assert pid().value == first
        pid._all[0].kill()
        pid._all[0].wait()
        assert pid().value not in (None, first)


def test_what_a_function_raises_or_dies_of_is_said():
    with Killable("json:loads", deadline_s=5, workers=1) as loads:
        assert loads("[1, 2]").value == [1, 2]
        assert loads("[1,").problem.startswith("JSONDecodeError")
    with Killable("os:_exit", deadline_s=5, workers=1) as leave:
        assert leave(3).problem == "the computation ended its process" and leave(3).value is None
