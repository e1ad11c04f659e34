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

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from wmss_jax import (
    agents,
    config,
    epochs,
    export,
    hf,
    inspection,
    objectives,
    preemption,
    processes,
    roles,
    scoring,
    selection,
    train,
)
from wmss_jax.evals.tasks import evaluate_all, read_tasks
from wmss_jax.runs import Run, prepare
from wmss_jax.stages import ModelRef
from wmss_jax.weak_cache import WeakCache


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
    arms = {name: _objective(arm, name) for name, arm in recipe.arms().items()}
    names = ["pretrain", "sft", *arms]
    if until is not None and until not in names:
        raise ValueError(f"no stage {until!r} to stop after; there are {', '.join(names)}")
    export.check(recipe.export.calibrate, arms["joint"])
    with preemption.exit_when_asked():
        return _run(recipe, arms, until, say)


def _run(
    recipe: config.RunConfig, arms: Mapping[str, objectives.Objective], until: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    run = prepare(recipe, say)
    tasks = read_tasks(run) if until is None else {}  # first, so that a mistake in them does not come to light last
    base = _base(run)
    if until == "pretrain":
        return {"models": {"M0": str(base.directory)}}
    rounds = {"sft": 0, "joint": recipe.rounds, None: recipe.rounds}.get(until, 1)  # a control belongs to the first
    wanted = {
        number: [name for name in arms if name == "joint" or (number == 1 and until in (None, name))]
        for number in range(1, rounds + 1)
    }
    # Of M0 before the SFT: a cache that is refused, or for which there is no room, should not come to light after it.
    hidden = {name: _hidden_states(run, 1, name, arms[name], base) for name in wanted.get(1, [])}
    lineage = [base, _sft(run, base)]
    finals = {"M0": lineage[0], "M1": lineage[1]}
    summary: dict[str, Any] = {"curriculum": {}}
    for number, names in wanted.items():
        weak, strong = lineage[-2:]
        if number > 1:
            hidden = {name: _hidden_states(run, number, name, arms[name], weak) for name in names}
        probs = None
        if any(recipe.arms()[name].resample for name in names):
            probs, report = selection.curriculum_of(run, number, weak, strong)
            summary["curriculum"][f"round {number}"] = report
        for name in names:
            found = arm(run, number, name, arms[name], weak, strong, probs, hidden[name])
            finals[_nth(name, number)] = _train(run, found)
        lineage.append(finals[_nth("joint", number)])
    summary["models"] = {name: str(ref.directory) for name, ref in finals.items()}
    if until is None:
        summary["export"] = export.export(run, lineage[-1], arms["joint"])
        summary["eval"] = evaluate_all(run, finals, tasks)
        written = json.dumps(summary, indent=2) + "\n"
        processes.by_first(lambda: (run.work / "summary.json").write_text(written))
    return summary


# -- training stages ------------------------------------------------------------------------------------------------


def _base(run: Run) -> ModelRef:
    """Return M0: the model of the recipe, pre-trained here if it starts from random parameters."""
    m, stage = run.recipe.model, run.recipe.pretrain
    settings = run.model_settings
    if m.path is not None:
        return ModelRef(hf.resolve(m.path), None, settings)
    model = dataclasses.replace(hf.from_config(hf.read_config(run.work / "assets")), **dict(settings))
    directory = run.work / "init"

    def init() -> dict[str, Any]:
        if not directory.exists():
            params = model.init(jax.random.key(run.recipe.seed), m.param_dtype, run.mesh)
            roles.save(directory, {"strong": (model, params)}, {}, run.work / "assets")
        return {}

    run.stage("init", {"config": str(model.config), "seed": run.recipe.seed, "dtype": m.param_dtype}, init, directory)
    start = ModelRef(directory, "strong", settings)
    if stage is None:
        return start
    if stage.train:
        run = dataclasses.replace(run, dataset=run.encoded(stage.train))
    plan = _plan(run, "pretrain", stage)
    return _train(run, _work(run, "pretrain", stage, objectives.Sft(), {"strong": start}, ("strong",), plan))


def _sft(run: Run, base: ModelRef) -> ModelRef:
    """Return M1: M0 fine-tuned on every example once an epoch."""
    stage = run.recipe.sft
    return _train(
        run, _work(run, "sft", stage, objectives.Sft(), {"strong": base}, ("strong",), _plan(run, "sft", stage))
    )


class Work(NamedTuple):
    """A training stage: what it does, JSON of everything that this depends on, and the base of its adapters."""

    job: train.Job
    inputs: Mapping[str, Any]
    base: ModelRef | None
    settings: tuple[tuple[str, str | None], ...]


def arm(
    run: Run,
    number: int,
    name: str,
    objective: objectives.Objective,
    weak: ModelRef,
    strong: ModelRef,
    probs: np.ndarray | None,
    weak_hidden: Callable[[], WeakCache] | None = None,
) -> Work:
    """Return the joint stage of round t, or one of its controls: M_t trained on with the weak agent M_{t-1}."""
    stage, joint = run.recipe.arms()[name], run.recipe.joint
    seed_name = _nth("joint", number)  # the same draws for all arms: they are compared in pairs
    steps = _plan(run, seed_name, joint, probs if joint.resample else None).total_steps
    plan = _plan(run, seed_name, stage.model_copy(update={"steps": steps}), probs if stage.resample else None)
    refs = {"strong": strong, "weak": weak}
    refs = {role: refs[role] for role in objective.roles}
    trained = tuple(role for role in refs if role == "strong" or stage.weak.trainable)
    extra: dict[str, Any] = {"steps": steps}
    if stage.resample:
        assert probs is not None
        c = run.recipe.curriculum
        extra["draw"] = {"probs": f"{zlib.crc32(probs.tobytes()):08x}", "dedup": c.dedup, "multiplier": c.multiplier}
    if weak_hidden is not None:
        extra["weak"] = "cached"
    return _work(run, _nth(name, number), stage, objective, refs, trained, plan, extra, weak_hidden)


def _hidden_states(
    run: Run, number: int, name: str, objective: objectives.Objective, weak: ModelRef
) -> Callable[[], WeakCache] | None:
    """Return what opens the weak agent's cached hidden states, made here if need be; None where it is resident."""
    arm = run.recipe.arms()[name]
    if arm.weak.placement == "resident" or "weak" not in objective.roles:
        return None
    opened = selection.hidden_states(run, weak, arm.weak)
    if not run.finished(_nth(name, number)):
        opened()  # says now what is wrong with it
    return opened


def _work(
    run: Run, name: str, stage: config.StageConfig, objective: objectives.Objective,
    refs: Mapping[str, ModelRef], trained: tuple[str, ...], plan: epochs.Plan, extra: Mapping[str, Any] = {},
    weak_hidden: Callable[[], WeakCache] | None = None,
) -> Work:  # fmt: skip
    recipe, m = run.recipe, run.recipe.model
    lineage = {role: ref.digest for role, ref in refs.items()}
    cached = frozenset(["weak"] if weak_hidden is not None else [])
    lora = run.lora if name != "pretrain" else None
    if lora is None:
        found = agents.whole(refs, trained, run.mesh, m.param_dtype, cached)
    else:
        found = agents.adapted(refs, trained, run.mesh, m.param_dtype, cached, lora, recipe.seed)
        extra = {**extra, "lora": dataclasses.asdict(lora)}
    if recipe.train.z_loss:
        extra = {**extra, "z_loss": recipe.train.z_loss}
    inputs = {
        "stage": stage.model_dump(include={"epochs", "steps"}),
        "optimizer": (stage.optimizer or recipe.optimizer).model_dump(),
        "objective": repr(objective),
        "trained": list(trained),
        "roles": lineage,
        "data": run.dataset.fingerprint,
        "loss_on": stage.loss_on or recipe.dataset.loss_on,
        "batch": [recipe.dataset.batch_size, recipe.dataset.seq_len, recipe.train.micro_batches],
        "dtypes": [m.param_dtype, m.compute_dtype],
        "seed": recipe.seed,
        "keep_best": recipe.eval.keep_best,
        **extra,
    }
    held_out = _held_out(run, stage, plan)
    if held_out is not None and held_out.keep_best:
        inputs["held_out"] = {"data": held_out.dataset.fingerprint, "every_steps": held_out.every_steps}
    job = train.Job(
        directory=run.work / name,
        models=found.models,
        trained=found.trained,
        frozen=found.frozen,
        trained_roles=trained,
        param_dtype=m.param_dtype,
        objective=objective,
        optimizer=stage.optimizer or recipe.optimizer,
        dataset=run.dataset,
        plan=plan,
        loss_on=stage.loss_on or recipe.dataset.loss_on,
        loop=recipe.train,
        seed=recipe.seed,
        mesh=run.mesh,
        meta={
            "recipe": recipe.model_dump(mode="json"),
            "stage": name,
            "lineage": {**lineage, **extra, "objective": repr(objective)},
            **({"base": found.base.described()} if found.base is not None else {}),
        },
        assets=run.work / "assets",
        held_out=held_out,
        weak_hidden=weak_hidden,
    )
    return Work(job, inputs, found.base, next(iter(refs.values())).settings)


def _train(run: Run, work: Work) -> ModelRef:
    """Carry out one training stage and return the strong role it ends with."""
    job = work.job
    do = lambda: {"checkpoint": train.train(job).relative_to(run.work).as_posix()}
    output = run.stage(job.directory.name, work.inputs, do, job.directory / "checkpoints")
    return ModelRef(run.work / output["checkpoint"], "strong", work.settings, work.base)


def _plan(run: Run, name: str, stage: config.StageConfig, probs: np.ndarray | None = None) -> epochs.Plan:
    c, d = run.recipe.curriculum, run.recipe.dataset
    return epochs.plan(
        run.dataset.lengths, seq_len=d.seq_len, batch_size=d.batch_size,
        seed=zlib.crc32(f"{run.recipe.seed} {name}".encode()), epochs=stage.epochs, steps=stage.steps,
        probs=probs, dedup=c.dedup, multiplier=c.multiplier,
    )  # fmt: skip


def _held_out(run: Run, stage: config.StageConfig, plan: epochs.Plan) -> train.HeldOut | None:
    if run.held_out is None:
        return None
    d, evaluation = run.recipe.dataset, run.recipe.eval
    rows = epochs.plan(run.held_out.lengths, seq_len=d.seq_len, batch_size=d.batch_size, seed=0, epochs=1)
    every = stage.eval_every_steps or evaluation.every_steps or plan.total_steps
    return train.HeldOut(run.held_out, rows, every, evaluation.keep_best)


def _objective(arm: config.JointConfig, name: str) -> objectives.Objective:
    where = "joint.objective" if name == "joint" else f"controls.{name}.objective"
    return config.build(objectives.OBJECTIVES, arm.objective.model_dump(), where)


def _nth(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


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
    plan = _plan(run, "joint", recipe.joint, probs if recipe.joint.resample else None)
    console.print(inspection.summary(run.dataset, plan, probs, shares), markup=False, highlight=False)
