"""What `wmss eval` knows by name: tasks and protocols. A new one is a row here.

Templates are those of `examples.fill`. Where a hub data set and a local file have other columns, the local ones are as
in their original releases (`wmss eval --data DIR`).
"""

import dataclasses
from typing import Literal

GraderName = Literal["exact", "numeric", "equation", "letter", "math", "tests", "verifier"]
Extraction = Literal["all", "final", "code"]

SYSTEM_PROMPT = (  # of WMSS' models: utils/prompts.py of the released code
    "You are a helpful assistant. To answer the user's question, you first think about the reasoning process and then "
    "provide the user with the answer. The reasoning process and answer are enclosed within <think> and <answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)
_STEPS = "\nSolve the problem step by step, and put the final answer within \\boxed{{}}."
_OPTION = '\nReason step by step, and end with "The answer is (X)."'
_FOUR = "A. {%s[0]}\nB. {%s[1]}\nC. {%s[2]}\nD. {%s[3]}"
_PROGRAM = "\nProvide clean, correct Python code between ```python and ``` marks."
_MBPP = "{prompt}\nYour code should pass these tests:\n{test_list[0]}\n{test_list[1]}\n{test_list[2]}" + _PROGRAM


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions, and how their answers are judged.

    Attributes:
        path: hub id of the data set; None: only files of one's own (`--data`), or procedural problems.
        split, subset: of the hub data set.
        prompt, answer: templates over a row's columns; the answer is empty where `tests` decide.
        grader: when an answer is right; see `grading`.
        extraction: which part of a generation the grader reads: all, what follows the thinking, the last code block.
        max_new_tokens: budget of an answer, by WMSS' evaluation (v2).
        items: how many there are in WMSS' evaluation, to say so where there are others.
        choices: templates of the options, to find one that is named by its text.
        tests: template of Python text that calls the program; entry_point: template of a name it means of the program.
        completes: the prompt is the beginning of the program, which a base model only continues.
        gym: name of a reasoning-gym data set.
    """

    name: str
    path: str | None
    prompt: str = ""
    answer: str = ""
    grader: GraderName = "math"
    extraction: Extraction = "final"
    split: str = "test"
    subset: str | None = None
    max_new_tokens: int = 4096
    items: int | None = None
    choices: tuple[str, ...] = ()
    tests: str = ""
    entry_point: str = ""
    completes: bool = False
    gym: str | None = None


def _humaneval(name: str, path: str) -> Task:
    return Task(
        name, path, "Complete this Python program.\n```python\n{prompt}```" + _PROGRAM, grader="tests",
        extraction="code", tests="{test}\ncheck({entry_point})", entry_point="{entry_point}", items=164, completes=True,
    )  # fmt: skip


_TASKS = (
    Task("gsm8k", "openai/gsm8k", "{question}" + _STEPS, "{answer}", "numeric", subset="main", items=1319),
    Task("svamp", "ChilleD/SVAMP", "{Body} {Question}" + _STEPS, "{Answer}", "numeric", items=1000),
    Task("mawps", None, "{sQuestion}" + _STEPS, "{lSolutions[0]}", "numeric", items=238),
    Task("asdiv_a", None, "{Body} {Question}" + _STEPS, "{Answer}", "numeric"),
    Task(
        "aqua", "deepmind/aqua_rat", "{question}\n" + "\n".join(f"{{options[{i}]}}" for i in range(5)) + _OPTION,
        "{correct}", "letter", subset="raw", items=254, choices=tuple(f"{{options[{i}]}}" for i in range(5)),
    ),
    Task("math500", "HuggingFaceH4/MATH-500", "{problem}" + _STEPS, "{answer}", items=500),
    Task("amc23", "math-ai/amc23", "{question}" + _STEPS, "{answer}", max_new_tokens=8192, items=40),
    Task(
        "aime24", "Maxwell-Jia/AIME_2024", "{Problem}" + _STEPS, "{Answer}", split="train", max_new_tokens=8192,
        items=30,
    ),
    Task("aime25", "math-ai/aime25", "{problem}" + _STEPS, "{answer}", max_new_tokens=8192, items=30),
    Task(
        "logiqa2", "baber/logiqa2", "{text}\n{question}\n" + _FOUR.replace("%s", "options") + _OPTION, "{answer}",
        "letter", subset="logiqa2", items=1572, choices=tuple(f"{{options[{i}]}}" for i in range(4)),
    ),
    Task(
        "reclor", "metaeval/reclor", "{context}\n{question}\n" + _FOUR.replace("%s", "answers") + _OPTION, "{label}",
        "letter", split="validation", items=500, choices=tuple(f"{{answers[{i}]}}" for i in range(4)),
    ),
    _humaneval("humaneval", "openai/openai_humaneval"),
    _humaneval("humaneval_plus", "evalplus/humanevalplus"),
    Task(
        "mbpp", "google-research-datasets/mbpp", _MBPP.replace("{prompt}", "{text}"), grader="tests", extraction="code",
        tests="{test_setup_code}\n{test_list[0]}\n{test_list[1]}\n{test_list[2]}", subset="full", items=500,
    ),
    Task("mbpp_plus", "evalplus/mbppplus", "{prompt}" + _PROGRAM, grader="tests", extraction="code", tests="{test}"),
)  # fmt: skip
TASKS = {task.name: task for task in _TASKS}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How questions are asked; WMSS' two evaluations are rows of PROTOCOLS (PAPER: v2 appendix, code at v1).

    Attributes:
        temperature: 0: the most likely token each time.
        top_p: None: draw from all tokens.
        samples: answers to each question, each from noise of its own.
        seed: of that noise.
        system_prompt: first message of the chat; None: none.
        max_new_tokens: of every task; None: each task's own budget.
        numbers_by: grader of those of the paper's tasks whose own is numeric.
    """

    temperature: float = 0.0
    top_p: float | None = None
    samples: int = 1
    seed: int = 42
    system_prompt: str | None = None
    max_new_tokens: int | None = None
    numbers_by: GraderName = "numeric"


PROTOCOLS = {
    "plain": Protocol(),
    "paper_v2": Protocol(system_prompt=SYSTEM_PROMPT, numbers_by="math"),
    # The evaluator of that time gave all three repeats the same seed; here they differ, as repeats should.
    "paper_v1": Protocol(0.5, 0.95, 3, 42, SYSTEM_PROMPT, 4096, "math"),
}


def protocol(name: str, **changes: float | None) -> Protocol:
    """Return a protocol by name, with changes; None changes nothing.

    Raises:
        ValueError: several samples, or top_p, at temperature 0.
    """
    changed = dataclasses.replace(
        PROTOCOLS[name], **{key: value for key, value in changes.items() if value is not None}
    )
    if changed.temperature == 0 and (changed.samples > 1 or changed.top_p is not None):
        raise ValueError("several samples and top_p need a temperature above 0: all answers would be the same")
    return changed
