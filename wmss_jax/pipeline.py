"""A recipe, stage by stage: (pretrain →) sft → score → curriculum → joint and its controls → export → eval.

Stages talk through files in the work directory, so each can be inspected, skipped when it is finished, and gone on
with when it was interrupted:

    stages/*.json         what every stage was made from, and its output
    assets/  cache/       tokenizer and config files; tokenised examples
    <stage>/              checkpoints and metrics.jsonl of a training stage
    scores/*.parquet      entropy, nll, margin of every example under M0, M1, ...
    curriculum/           sampling probabilities and their report
    export/               the shipped model, a Hugging Face directory
    eval/*.jsonl          every prompt, answer and verdict
    summary.json          the figures of the table
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from wmss_jax import (
    arms,
    config,
    export,
    inspection,
    jobs,
    objectives,
    preemption,
    processes,
    scoring,
    selection,
    storage,
)
from wmss_jax.evals.tasks import evaluate_all, read_tasks
from wmss_jax.runs import Run, prepare
from wmss_jax.stages import ModelRef


def run(recipe: config.RunConfig, until: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Carry out a recipe and return its summary: {"models", "eval", "scores", "curriculum", "export"}.

    The same call goes on where an earlier one was interrupted, and does nothing where it was finished.

    Args:
        until: name of the training stage after which to stop: "pretrain", "sft", "joint", or one of the controls.
        say: is told, in a line each, what is being done.

    Raises:
        ValueError: the recipe cannot be carried out, or the work directory holds another one.
        preemption.Preempted: SIGTERM came during training; everything is saved.
    """
    found = {name: arms.objective(recipe, name) for name in recipe.arms()}
    names = ["pretrain", "sft", *found]
    if until is not None and until not in names:
        raise ValueError(f"no stage {until!r} to stop after; there are {', '.join(names)}")
    export.check(recipe.export.calibrate, found["joint"])
    with preemption.exit_when_asked():
        return _run(recipe, found, until, say)


def _run(
    recipe: config.RunConfig, found: Mapping[str, objectives.Objective], until: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    run = prepare(recipe, say)
    if (bucket := recipe.train.checkpoint_bucket) is not None:
        processes.by_first(lambda: storage.check_usable(storage.GcsPath.parse(bucket)))
    tasks = read_tasks(run) if until is None else {}  # first, so that a mistake in them does not come to light last
    rounds = {"sft": 0, "joint": recipe.rounds, None: recipe.rounds}.get(until, 1)  # a control belongs to the first
    wanted = {
        number: [name for name in found if name == "joint" or (number == 1 and until in (None, name))]
        for number in range(1, rounds + 1)
    }
    for name in wanted.get(1, []):
        _check_vocabularies(run, name, found[name])
    base = jobs.base_model(run)
    if until == "pretrain":
        return {"models": {"M0": str(base.directory)}}
    for name in wanted.get(1, []):
        _check_agents(run, name, found[name], base)
    # Of M0 before the SFT: a cache that is refused, or for which there is no room, should not come to light after it.
    of_base = [name for name in wanted.get(1, []) if recipe.arms()[name].weak.source.step is None]
    hidden = {name: jobs.hidden_states(run, 1, name, found[name], jobs.weak_agent(run, name, base)) for name in of_base}
    lineage = [base, jobs.sft(run, base)]
    finals = {"M0": lineage[0], "M1": lineage[1]}
    summary: dict[str, Any] = {"curriculum": {}}
    for number, names in wanted.items():
        weak, strong = lineage[-2:]
        for name in names:
            if number > 1 or name not in hidden:
                hidden[name] = jobs.hidden_states(run, number, name, found[name], jobs.weak_agent(run, name, weak))
        probs, reports = selection.of_arms(run, number, names, weak, strong)
        summary["curriculum"] |= reports
        for name in names:
            work = jobs.arm(run, number, name, found[name], weak, strong, probs, hidden[name])
            finals[jobs.nth(name, number)] = jobs.carry_out(run, work)
        lineage.append(finals[jobs.nth("joint", number)])
    summary["models"] = {name: str(ref.directory) for name, ref in finals.items()}
    if until is None:
        summary["export"] = export.export(run, lineage[-1], found["joint"])
        summary["eval"] = evaluate_all(run, finals, tasks)
        written = json.dumps(summary, indent=2) + "\n"
        processes.by_first(lambda: (run.work / "summary.json").write_text(written))
    return summary


def _check_vocabularies(run: Run, name: str, objective: objectives.Objective) -> None:
    """Raise ValueError where an arm's weak agent or teacher has other tokens, before anything is compiled."""
    stage, where = run.recipe.arms()[name], "joint" if name == "joint" else f"controls.{name}"
    for role, key, path in (("weak", "weak.path", stage.weak.path), ("teacher", "teacher", stage.teacher)):
        if role in objective.roles and path is not None:
            run.other(path, f"{where}.{key}")


def _check_agents(run: Run, name: str, objective: objectives.Objective, base: ModelRef) -> None:
    """Raise ValueError where an arm's weak agent cannot be made, before time is spent on the SFT."""
    stage, where = run.recipe.arms()[name], "joint" if name == "joint" else f"controls.{name}"
    if (source := arms.source(stage, objective)) is not None:
        source.model(base.model)
    wanted, total = stage.weak.source.step, jobs.plan_of(run, "sft", run.recipe.sft).total_steps
    if wanted is not None and wanted > total:
        raise ValueError(f"{where}.weak.source.step: {wanted}, and the SFT stage has {total} steps")


# -- what the commands call -----------------------------------------------------------------------------------------


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary's accuracies as a text table, one line a model: percent ± standard error."""
    figures = summary.get("eval", {})
    tasks = list(dict.fromkeys(task for row in figures.values() for task in row))
    width = max((len(name) for name in figures), default=0)
    lines = [" " * width + "".join(f"  {task:>16}" for task in tasks)] if tasks else []
    for name, row in figures.items():
        cells = [f"{100 * row[t]['accuracy']:.1f} ± {100 * row[t]['standard_error']:.1f} %" for t in tasks]
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>16}" for cell in cells))
    return "\n".join([*lines, f"exported model: {summary['export']}"])


def score_model(
    recipe: config.RunConfig, model: str, out: Path, cache: Path | None = None, say: Callable[[str], None] = print
) -> None:
    """Write the scores of a recipe's examples under any model to `out`.

    Args:
        cache: directory to write the model's final hidden states to, for `joint.weak.cache`.

    Raises:
        FileExistsError: `out` or `cache` exists.
        ValueError: the model does not know the recipe's tokens, or there is no room for the cache.
    """
    if out.exists():
        raise FileExistsError(f"{out}: exists already; choose another file or remove it")
    run = prepare(recipe, say)
    scored = run.ref(model)
    if len(run.tokenizer) > (known := scored.model.vocabulary[0]):
        raise ValueError(
            f"{model}: knows {known} tokens, the recipe's tokenizer has {len(run.tokenizer)}; give another"
        )
    if cache is None:
        found = selection.score(run, scored)
    else:
        found = selection.cache_hidden(run, scored, cache, recipe.joint.weak.cache_budget_gb)
    scoring.write(out, found, run.dataset, scored.digest, recipe.score.shifted)


def inspect(recipe: config.RunConfig, show: int) -> None:
    """Print examples, sizes, lengths and the plan of the joint stage; with its curriculum where that was computed."""
    run, console = prepare(recipe), Console()
    inspection.show(run.dataset, run.tokenizer, range(min(show, len(run.dataset))), recipe.dataset.loss_on, console)
    report, probs = run.work / "curriculum/round-1.json", run.work / "curriculum/round-1.npy"
    known = report.exists() and probs.exists()
    probs = np.load(probs) if known else None
    shares = json.loads(report.read_text())["term_shares"] if known else None
    plan = jobs.plan_of(run, "joint", recipe.joint, probs if recipe.joint.resample else None)
    console.print(inspection.summary(run.dataset, plan, probs, shares), markup=False, highlight=False)
