"""The training stages of a run: what each one is made of, and what it leaves behind.

A stage's `Work` is a `train.Job` with a record of everything that it depends on, by which a finished stage is known.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from wmss_jax import (
    agents,
    arms,
    checkpoint,
    epochs,
    hf,
    objectives,
    roles,
    selection,
    stage_config,
    train,
)
from wmss_jax.runs import Run
from wmss_jax.stages import ModelRef
from wmss_jax.weak_cache import WeakCache
from wmss_jax.weak_source import Source


def base_model(run: Run) -> ModelRef:
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
    plan = plan_of(run, "pretrain", stage)
    return carry_out(run, _work(run, "pretrain", stage, objectives.Sft(), {"strong": start}, ("strong",), plan))


def sft(run: Run, base: ModelRef) -> ModelRef:
    """Return M1: M0 fine-tuned on every example once an epoch; kept besides are steps that weak agents are of."""
    stage, steps = run.recipe.sft, (arm.weak.source.step for arm in run.recipe.arms().values())
    work = _work(run, "sft", stage, objectives.Sft(), {"strong": base}, ("strong",), plan_of(run, "sft", stage))
    keep = frozenset(step for step in steps if step is not None)
    return carry_out(run, work._replace(job=dataclasses.replace(work.job, keep_steps=keep)))


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
    seed_name = nth("joint", number)  # the same draws for all arms: they are compared in pairs
    steps = plan_of(run, seed_name, joint, probs.get("joint")).total_steps
    plan = plan_of(run, seed_name, stage.model_copy(update={"steps": steps}), probs.get(name))
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
    return _work(run, nth(name, number), stage, objective, refs, trained, plan, extra, weak_hidden, source)


def hidden_states(
    run: Run, number: int, name: str, objective: objectives.Objective, weak: ModelRef
) -> Callable[[], WeakCache] | None:
    """Return what opens the weak agent's cached hidden states, made here if need be; None where it is resident."""
    arm = run.recipe.arms()[name]
    if arm.weak.placement == "resident" or "weak" not in objective.roles:
        return None
    opened = selection.hidden_states(run, weak, arm.weak)
    if not run.finished(nth(name, number)):
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


def carry_out(run: Run, work: Work) -> ModelRef:
    """Carry out one training stage and return the strong role it ends with."""
    job = work.job
    do = lambda: {"checkpoint": run.name_of(train.train(job))}
    output = run.stage(job.directory.name, work.inputs, do, train.checkpoints(job.directory, job.loop))
    return ModelRef(run.named(output["checkpoint"]), "strong", work.settings, work.base)


def plan_of(run: Run, name: str, stage: stage_config.StageConfig, probs: np.ndarray | None = None) -> epochs.Plan:
    """Return which rows a stage sees at which step; of the seed that its name gives it."""
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


def nth(name: str, number: int) -> str:
    """Return what a stage is called in a round: joint, joint-2, ..."""
    return name if number == 1 else f"{name}-{number}"
