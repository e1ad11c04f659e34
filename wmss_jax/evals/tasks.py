"""The tasks of a recipe, answered by each of its models."""

import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree

from wmss_jax import config, encoding, examples
from wmss_jax.endings import end_ids
from wmss_jax.evals import grading, questions
from wmss_jax.evals.catalog import PROTOCOLS, Protocol, Task
from wmss_jax.evals.questions import Question
from wmss_jax.evals.run import Decoding, Item, evaluate, figures, records
from wmss_jax.models import CausalLM
from wmss_jax.runs import Run
from wmss_jax.stages import ModelRef


class Asked(NamedTuple):
    """A task of a recipe made ready."""

    task: Task
    protocol: Protocol
    max_new_tokens: int
    batch_size: int
    items: list[Item]


Tasks = Mapping[str, Asked]


def read_tasks(run: Run) -> Tasks:
    """Return every task of the recipe with its questions."""
    return {name: _asked(run, name, task) for name, task in run.recipe.eval.tasks.items()}


def evaluate_all(run: Run, refs: Mapping[str, ModelRef], tasks: Tasks) -> dict[str, dict[str, Any]]:
    """Return {model: {task: figures}} of M0, M1 and what every arm ends with; see `statistics.figures`."""
    if not tasks:
        return {name: {} for name in refs}
    with grading.opened({asked.task.grader for asked in tasks.values()}) as judges:
        return {name: _answered(run, name, ref, tasks, judges) for name, ref in refs.items()}


def _answered(
    run: Run, name: str, ref: ModelRef, tasks: Tasks, judges: Mapping[str, grading.Judge]
) -> dict[str, dict[str, Any]]:
    """Return one model's figures on every task; its answers are written to eval/."""
    load = functools.cache(lambda: ref.load(run.mesh))  # once, and only if a task is not answered yet

    def answer(asked: Asked, path: Path, key: str) -> dict[str, Any]:
        judge, extraction = judges[asked.task.grader], asked.task.extraction
        return evaluate(*load(), run.tokenizer, asked.items, judge, extraction, _decoding(run, asked), path, key)

    found = {}
    for task_name, asked in tasks.items():
        inputs = {
            "model": ref.digest,
            "task": dataclasses.asdict(asked.task) | {"max_new_tokens": asked.max_new_tokens},
            "protocol": dataclasses.asdict(asked.protocol),
            "items": f"{zlib.crc32(repr(asked.items).encode()):08x}",
        }
        key = f"{zlib.crc32(json.dumps(inputs).encode()):08x}"
        work = functools.partial(answer, asked, run.work / "eval" / f"{name}-{task_name}.jsonl", key)
        found[task_name] = run.stage(f"eval-{name}-{task_name}", inputs, work)
    return found


def answers(run: Run, model: CausalLM, params: PyTree[Array], asked: Asked) -> dict[str, Any]:
    """Return the figures of a model's answers to a task's questions, which are not kept."""
    with grading.opened({asked.task.grader}) as judges:
        judge = judges[asked.task.grader]
        return figures(
            records(model, params, run.tokenizer, asked.items, judge, asked.task.extraction, _decoding(run, asked))
        )


def _decoding(run: Run, asked: Asked) -> Decoding:
    stop_ids = end_ids(run.tokenizer, run.work / "assets", chat_template=run.recipe.dataset.chat_template)
    return Decoding(asked.max_new_tokens, asked.protocol, stop_ids, asked.batch_size, run.mesh)


def _asked(run: Run, name: str, wanted: config.TaskConfig) -> Asked:
    """Return a task with its questions, each rendered exactly as a training prompt would be."""
    d = run.recipe.dataset
    protocol = PROTOCOLS[wanted.protocol or "plain"]
    if wanted.task is not None:
        task = questions.task_named(wanted.task, wanted.grader)
        found = questions.read(task, Path(run.recipe.data), wanted.limit, run.recipe.seed)
        said = wanted.max_new_tokens if "max_new_tokens" in wanted.model_fields_set else None
        tokens = said or protocol.max_new_tokens or task.max_new_tokens
    else:
        assert wanted.grader is not None
        task, tokens = Task(name, None, grader=wanted.grader, extraction="all"), wanted.max_new_tokens
        problems = itertools.islice(examples.problems(wanted.source, run.recipe.data), wanted.limit)
        found = [Question(problem.prompt, problem.answer, problem.location) for problem in problems]
    # The models of a run know the system prompt that they were trained with.
    render = functools.partial(
        encoding.prompt_tokens, tokenizer=run.tokenizer, chat_template=d.chat_template, system_prompt=d.system_prompt
    )
    items = [Item(render(question.prompt).tolist(), question) for question in found]
    return Asked(task, protocol, tokens, wanted.batch_size, items)
