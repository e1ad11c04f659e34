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
    arms,
    checkpoint,
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
    stage_config,
    storage,
    train,
)
from wmss_jax.evals.tasks import evaluate_all, read_tasks
from wmss_jax.runs import Run, prepare
from wmss_jax.stages import ModelRef
from wmss_jax.weak_cache import WeakCache
from wmss_jax.weak_source import Source


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
    base = _base(run)
    if until == "pretrain":
        return {"models": {"M0": str(base.directory)}}
    for name in wanted.get(1, []):
        _check_agents(run, name, found[name], base)
    # Of M0 before the SFT: a cache that is refused, or for which there is no room, should not come to light after it.
    of_base = [name for name in wanted.get(1, []) if recipe.arms()[name].weak.source.step is None]
    hidden = {name: _hidden_states(run, 1, name, found[name], weak_agent(run, name, base)) for name in of_base}
    lineage = [base, _sft(run, base)]
    finals = {"M0": lineage[0], "M1": lineage[1]}
    summary: dict[str, Any] = {"curriculum": {}}
    for number, names in wanted.items():
        weak, strong = lineage[-2:]
        for name in names:
            if number > 1 or name not in hidden:
                hidden[name] = _hidden_states(run, number, name, found[name], weak_agent(run, name, weak))
        probs, reports = selection.of_arms(run, number, names, weak, strong)
        summary["curriculum"] |= reports
        for name in names:
            work = arm(run, number, name, found[name], weak, strong, probs, hidden[name])
            finals[_nth(name, number)] = _train(run, work)
        lineage.append(finals[_nth("joint", number)])
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
    wanted, total = stage.weak.source.step, _plan(run, "sft", run.recipe.sft).total_steps
    if wanted is not None and wanted > total:
        raise ValueError(f"{where}.weak.source.step: {wanted}, and the SFT stage has {total} steps")


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
    """Return M1: M0 fine-tuned on every example once an epoch; kept besides are steps that weak agents are of."""
    stage, steps = run.recipe.sft, (arm.weak.source.step for arm in run.recipe.arms().values())
    work = _work(run, "sft", stage, objectives.Sft(), {"strong": base}, ("strong",), _plan(run, "sft", stage))
    keep = frozenset(step for step in steps if step is not None)
    return _train(run, work._replace(job=dataclasses.replace(work.job, keep_steps=keep)))


def weak_agent(run: Run, name: str, weak: ModelRef) -> ModelRef:
    """Return the model that an arm's weak agent is, or is made of: M_{t-1}, a step of the SFT, or one from elsewhere.

    Raises:
        ValueError: the SFT was finished without keeping that step.
    """
    wanted = run.recipe.arms()[name].weak
    if wanted.path is not None:
        return run.ref(wanted.path)
    step = wanted.source.step
    if step is None:
        return weak
    root = train.checkpoints(run.work / "sft", run.recipe.train)
    if step not in (kept := checkpoint.steps(root)):
        raise ValueError(
            f"{'joint' if name == 'joint' else f'controls.{name}'}.weak.source.step: {step} was not kept when the SFT "
            f"ran; there are {', '.join(map(str, kept))}; choose one of them or another work_dir"
        )
    return ModelRef(root / str(step), "strong", run.model_settings, weak.base or (weak if run.lora else None))


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
    probs: Mapping[str, np.ndarray],
    weak_hidden: Callable[[], WeakCache] | None = None,
) -> Work:
    """Return the joint stage of round t, or one of its controls: M_t trained on with the weak agent M_{t-1}.

    Args:
        probs: sampling probabilities by arm, of this one and of "joint", whose length it has; none where nothing is
            drawn by them.
    """
    stage, joint = run.recipe.arms()[name], run.recipe.joint
    seed_name = _nth("joint", number)  # the same draws for all arms: they are compared in pairs
    steps = _plan(run, seed_name, joint, probs.get("joint")).total_steps
    plan = _plan(run, seed_name, stage.model_copy(update={"steps": steps}), probs.get(name))
    source, trained = arms.source(stage, objective), arms.trained(stage, objective)
    refs = {"strong": strong, "reference": strong if stage.reference == "start" else weak}
    if source is None or source.of_base:
        refs["weak"] = weak_agent(run, name, weak)
    if stage.teacher is not None:
        refs["teacher"] = run.ref(stage.teacher)
    refs = {role: refs[role] for role in objective.roles if role in refs}
    extra: dict[str, Any] = {"steps": steps}
    if stage.resample:
        c = stage.curriculum or run.recipe.curriculum
        drawn = f"{zlib.crc32(probs[name].tobytes()):08x}"
        extra["draw"] = {"probs": drawn, "dedup": c.dedup, "multiplier": c.multiplier}
    if weak_hidden is not None:
        extra["weak"] = "cached"
    return _work(run, _nth(name, number), stage, objective, refs, trained, plan, extra, weak_hidden, source)


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
    run: Run, name: str, stage: stage_config.StageConfig, objective: objectives.Objective,
    refs: Mapping[str, ModelRef], trained: tuple[str, ...], plan: epochs.Plan, extra: Mapping[str, Any] = {},
    weak_hidden: Callable[[], WeakCache] | None = None, source: Source | None = None,
) -> Work:  # fmt: skip
    recipe, m = run.recipe, run.recipe.model
    lineage = {role: ref.digest for role, ref in refs.items()}
    cached = frozenset(["weak"] if weak_hidden is not None else [])
    lora = run.lora if name != "pretrain" else None
    if lora is None:
        found = agents.whole(refs, trained, run.mesh, m.param_dtype, cached, source)
    else:
        found = agents.adapted(refs, trained, run.mesh, m.param_dtype, cached, lora, recipe.seed)
        extra = {**extra, "lora": dataclasses.asdict(lora)}
    neftune = arms.neftune(stage)
    for key, value in (("weak_source", source), ("neftune", neftune)):
        extra = extra if value is None else {**extra, key: repr(value)}
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
            "lineage": {**lineage, **extra, "objective": repr(objective), "data": run.dataset.fingerprint},
            **({"base": found.base.described()} if found.base is not None else {}),
        },
        assets=run.work / "assets",
        held_out=held_out,
        weak_hidden=weak_hidden,
        weak_source=source if source is not None and source.moving else None,
        neftune=neftune,
    )
    return Work(job, inputs, found.base, next(iter(refs.values())).settings)


def _train(run: Run, work: Work) -> ModelRef:
    """Carry out one training stage and return the strong role it ends with."""
    job = work.job
    do = lambda: {"checkpoint": run.name_of(train.train(job))}
    output = run.stage(job.directory.name, work.inputs, do, train.checkpoints(job.directory, job.loop))
    return ModelRef(run.named(output["checkpoint"]), "strong", work.settings, work.base)


def _plan(run: Run, name: str, stage: stage_config.StageConfig, probs: np.ndarray | None = None) -> epochs.Plan:
    c, d = getattr(stage, "curriculum", None) or run.recipe.curriculum, run.recipe.dataset
    return epochs.plan(
        run.dataset.lengths, seq_len=d.seq_len, batch_size=d.batch_size,
        seed=zlib.crc32(f"{run.recipe.seed} {name}".encode()), epochs=stage.epochs, steps=stage.steps,
        probs=probs, dedup=c.dedup, multiplier=c.multiplier,
    )  # fmt: skip


def _held_out(run: Run, stage: stage_config.StageConfig, plan: epochs.Plan) -> train.HeldOut | None:
    if run.held_out is None:
        return None
    d, evaluation = run.recipe.dataset, run.recipe.eval
    rows = epochs.plan(run.held_out.lengths, seq_len=d.seq_len, batch_size=d.batch_size, seed=0, epochs=1)
    every = stage.eval_every_steps or evaluation.every_steps or plan.total_steps
    return train.HeldOut(run.held_out, rows, every, evaluation.keep_best)


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
