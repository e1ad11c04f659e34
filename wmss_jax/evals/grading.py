"""Judges: from a generation to a verdict, with what the generation was taken to say.

with grading.opened({"math"}) as judges:
    judges["math"](text, question, "final")     # Verdict(right=True, extraction="\\\\frac{1}{2}", problem="")
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from wmss_jax.evals import graders
from wmss_jax.evals.killable import Killable
from wmss_jax.evals.questions import Question
from wmss_jax.evals.sandbox import Sandbox

DEADLINE_S = 10.0  # of one judgement by another library
_PARTS = {"all": lambda text: text, "final": graders.final, "code": lambda text: graders.code(graders.final(text))}
_ENDS_OF_CONTINUATION = ("\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\n#", "\nassert ")


class Verdict(NamedTuple):
    """What an answer was taken to say, and whether that is right.

    `problem` says why the judge had difficulties: it hung (`hung`), died, or the program failed its tests so and so.
    """

    right: bool
    extraction: str
    problem: str = ""
    hung: bool = False


Judge = Callable[[str, Question, str], Verdict]


@contextlib.contextmanager
def opened(
    names: Collection[str], *, unsafe_no_sandbox: bool = False, deadline_s: float = DEADLINE_S
) -> Iterator[Mapping[str, Judge]]:
    """Give the judges of those names, each a function of (generation, question, extraction) for any thread.

    Raises:
        ValueError: generated programs cannot be run in a sandbox here.
    """
    made: dict[str, Judge] = {name: _plain(name) for name in names if name in graders.GRADERS}
    with contextlib.ExitStack() as stack:
        if "math" in names:
            same = Killable("wmss_jax.evals.symbolic:same", deadline_s=deadline_s, imports=["math_verify"])
            made["math"] = _math(stack.enter_context(same))
        if "verifier" in names:
            solves = Killable("wmss_jax.evals.symbolic:solves", deadline_s=deadline_s, imports=["reasoning_gym"])
            made["verifier"] = _verifier(stack.enter_context(solves))
        if "tests" in names:
            made["tests"] = _tests(Sandbox.open(unsafe=unsafe_no_sandbox))
        yield made


def _plain(name: str) -> Judge:
    def judge(text: str, question: Question, extraction: str) -> Verdict:
        part = _PARTS[extraction](text)
        if name == "letter":
            found = graders.chosen(part, question.choices)
            return Verdict(bool(found) and graders.letter(found, question.gold), found)
        said = graders.number(part) if name == "numeric" else part.strip()
        return Verdict(graders.GRADERS[name](part, question.gold), said)

    return judge


def _math(same: Killable) -> Judge:
    def judge(text: str, question: Question, extraction: str) -> Verdict:
        # The reference may be worked out, as in GSM8K: then its mark says where the answer begins.
        gold = question.gold.rpartition("####")[2].strip()
        reply = same(_PARTS[extraction](text), gold)
        if reply.value is None:
            return Verdict(False, "", reply.problem, reply.hung)
        return Verdict(reply.value["right"], reply.value["extracted"])

    return judge


def _verifier(solves: Killable) -> Judge:
    def judge(text: str, question: Question, extraction: str) -> Verdict:
        assert question.gym is not None
        answer = _PARTS[extraction](text).strip()
        reply = solves(answer, *question.gym)
        if reply.value is None:
            return Verdict(False, answer, reply.problem, reply.hung)
        return Verdict(reply.value["right"], answer, "" if reply.value["right"] else f"score {reply.value['score']:g}")

    return judge


def _tests(sandbox: Sandbox) -> Judge:
    def judge(text: str, question: Question, extraction: str) -> Verdict:
        program = _program(_PARTS[extraction](text), question)
        own = [question.entry_point] if question.entry_point else []
        outcome = sandbox.passes(program, question.tests, own)
        return Verdict(outcome.passed, program, outcome.reason)

    return judge


def _program(code: str, question: Question) -> str:
    """Return the whole program: where the answer is a mere continuation, put to the beginning that it continues.

    A whole function also follows the beginning, whose imports and helpers it may need: the later definition counts.
    """
    if not question.beginning:
        return code
    if f"def {question.entry_point}" in code:
        return f"{question.beginning}\n    pass\n\n{code}"
    ends = [at for end in _ENDS_OF_CONTINUATION if (at := code.find(end)) >= 0]
    return question.beginning + code[: min(ends, default=len(code))] + "\n"
