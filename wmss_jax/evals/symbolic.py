"""Judgements of other libraries that may hang: mathematical equality (math-verify), a reasoning-gym problem's verifier.

These functions are called in processes of their own (`killable`), which therefore import nothing of jax.
"""

import functools
import logging
from typing import Any

# It warns that its own deadlines, which need signals, are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def same(prediction: str, gold: str) -> dict[str, Any]:
    """Return whether the answer that a text gives equals gold as mathematics, and what that answer is.

    The answer is what \\boxed{...} holds (several are one answer of several parts, as in WMSS' evaluation), else what
    math-verify finds: LaTeX or a number behind "answer is", or the last.
    """
    math_verify = _math_verify()
    return _judged(math_verify, math_verify.parse(prediction, parsing_timeout=None), gold)


def boxed_same(prediction: str, gold: str) -> dict[str, Any]:
    """As `same`, of LaTeX in \\boxed{...} alone; the filter of WMSS' mathematical training pool."""
    math_verify = _math_verify()
    target = math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    return _judged(math_verify, math_verify.parse(prediction, [target], parsing_timeout=None), gold)


def _judged(math_verify: Any, found: list[Any], gold: str) -> dict[str, Any]:
    wanted = math_verify.parse(gold if "$" in gold or "\\boxed" in gold else f"${gold}$", parsing_timeout=None)
    if not wanted:
        raise ValueError(f"the reference answer {gold[:80]!r} is no mathematics")
    right = bool(found) and math_verify.verify(wanted, found, timeout_seconds=None)
    return {"right": right, "extracted": str(found[-1]) if found else ""}


def solves(answer: str, name: str, size: int, seed: int, index: int) -> dict[str, Any]:
    """Return whether an answer is full marks by the verifier of problem `index` of a reasoning-gym data set."""
    problems = reasoning_gym(name, size, seed)
    score = float(problems.score_answer(answer, problems[index]))
    return {"right": score >= 1.0, "score": score, "extracted": answer}


@functools.cache
def reasoning_gym(name: str, size: int, seed: int) -> Any:
    """Return a reasoning-gym data set; the same arguments give the same problems.

    Raises:
        ValueError: there is no such data set, or the extra "demo" is not installed.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise ValueError('reasoning_gym problems need an extra: pip install "wmss-jax[demo]"') from error
    if name not in DATASETS:
        raise ValueError(f"reasoning_gym has no data set {name!r}; it has {', '.join(sorted(DATASETS))}")
    return reasoning_gym.create_dataset(name, size=size, seed=seed)


def _math_verify() -> Any:
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise ValueError('the grader "math" needs an extra: pip install "wmss-jax[eval]"') from error
    return math_verify
