"""The tasks of a recipe, answered by each of its models."""

import functools
import itertools
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Array, PyTree

from wmss_jax import config, encoding, examples, processes
from wmss_jax.evals.graders import GRADERS
from wmss_jax.evals.run import Item, Result, evaluate
from wmss_jax.models import CausalLM
from wmss_jax.runs import Run
from wmss_jax.stages import ModelRef

Tasks = Mapping[str, tuple[config.TaskConfig, list[Item]]]


def read_tasks(run: Run) -> Tasks:
    """Return every task of the recipe with its questions."""
    return {name: (task, _items(run, task)) for name, task in run.recipe.eval.tasks.items()}


def evaluate_all(run: Run, refs: Mapping[str, ModelRef], tasks: Tasks) -> dict[str, dict[str, Any]]:
    """Return {model: {task: {accuracy, standard_error, n}}} of M0, M1 and what every arm ends with."""
    return {name: _answered(run, name, ref, tasks) for name, ref in refs.items()}


def _answered(run: Run, name: str, ref: ModelRef, tasks: Tasks) -> dict[str, Any]:
    """Return one model's figures on every task; its answers are written to eval/."""
    load = functools.cache(lambda: ref.load(run.mesh))  # once, and only if a task is not answered yet

    def answer(task: config.TaskConfig, items: list[Item], path: Path) -> dict[str, Any]:
        result = answers(run, *load(), task, items)
        if processes.first():
            path.parent.mkdir(parents=True, exist_ok=True)
            result.write_jsonl(path)
        return {"accuracy": result.accuracy, "standard_error": result.standard_error, "n": result.n}

    figures = {}
    for task_name, (task, items) in tasks.items():
        inputs = {
            "model": ref.digest,
            "task": task.model_dump(mode="json", exclude={"batch_size"}),
            "items": f"{zlib.crc32(repr(items).encode()):08x}",
        }
        work = functools.partial(answer, task, items, run.work / "eval" / f"{name}-{task_name}.jsonl")
        figures[task_name] = run.stage(f"eval-{name}-{task_name}", inputs, work)
    return figures


def answers(run: Run, model: CausalLM, params: PyTree[Array], task: config.TaskConfig, items: list[Item]) -> Result:
    """Return a model's graded answers to a task's questions."""
    stop_ids = {encoding.stop_token(run.tokenizer, chat_template=run.recipe.dataset.chat_template)}
    return evaluate(
        model, params, run.tokenizer, items, GRADERS[task.grader], max_new_tokens=task.max_new_tokens,
        stop_ids=stop_ids, mesh=run.mesh, batch_size=task.batch_size,
    )  # fmt: skip


def _items(run: Run, task: config.TaskConfig) -> list[Item]:
    """Return a task's questions, each rendered exactly as a training prompt would be."""
    d = run.recipe.dataset
    problems = itertools.islice(examples.problems(task.source, run.recipe.data), task.limit)
    render = functools.partial(
        encoding.prompt_tokens, tokenizer=run.tokenizer, chat_template=d.chat_template, system_prompt=d.system_prompt
    )
    return [Item(render(problem.prompt).tolist(), problem.prompt, problem.answer) for problem in problems]
