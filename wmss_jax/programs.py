"""The steps of a recipe with shapes in place of arrays: to compile and to look at, before there are weights or data."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from wmss_jax import arms, config, flops, hf, objectives, optim, sharding, step
from wmss_jax.models import CausalLM
from wmss_jax.models.lora import Lora
from wmss_jax.weak_source import Ema

Step = Literal["sft", "joint", "score"]


class Program(NamedTuple):
    """A step before it is lowered.

    Attributes:
        function: jitted; `function.lower(*call)` lowers it.
        call: its arguments, trees of shapes with shardings.
        arguments: what of them is {"parameters", "optimizer", "frozen", "batch"}, where there is such.
        model: of the strong role.
        rows, seq_len: of a step's batch, over all devices.
        flops: of the hardware per token, what the backward pass computes again among them.
    """

    function: Any
    call: tuple[PyTree, ...]
    arguments: Mapping[str, PyTree]
    model: CausalLM
    rows: int
    seq_len: int
    flops: float


def of(recipe: config.RunConfig, name: Step, mesh: Mesh) -> Program:
    """Return one step of a recipe, as its training stage or its scores take it, on a mesh whose devices need not exist.

    Raises:
        ValueError: the mesh does not divide the batch or the model, or the model is none that is implemented.
    """
    m, parts = recipe.model, recipe.train.micro_batches
    settings = hf.read_config(Path(m.config) if m.config is not None else hf.resolve(str(m.path)))
    model = hf.from_config(settings, compute_dtype=m.compute_dtype, remat=m.remat, attention=m.attention)
    # Frozen weights are held as they are stored: a checkpoint's as its config.json says, ones made here as trained.
    said = settings.get("dtype") or settings.get("torch_dtype") or m.compute_dtype
    stored = m.param_dtype if recipe.pretrain is not None else str(said)
    if name == "score":
        return _score(recipe, model, stored, mesh)
    _check_rows("dataset.batch_size", recipe.dataset.batch_size, parts, mesh)
    if name == "sft":
        return _train(recipe, model, stored, mesh, objectives.Sft(), ("strong",), recipe.sft)
    objective = arms.objective(recipe, "joint")
    return _train(recipe, model, stored, mesh, objective, arms.trained(recipe.joint, objective), recipe.joint)


def _train(
    recipe: config.RunConfig, model: CausalLM, stored: str, mesh: Mesh, objective: objectives.Objective,
    trained: tuple[str, ...], stage: config.StageConfig,
) -> Program:  # fmt: skip
    joint = stage if isinstance(stage, config.JointConfig) else None
    cached = joint is not None and joint.weak.placement == "cached"
    source = None if joint is None else arms.source(joint, objective)
    loop, d = recipe.train, recipe.dataset
    strong, rest = model, tuple(role for role in objective.roles if role not in trained)
    batch = _batch(d.batch_size, d.seq_len, mesh)
    whole = model.abstract(stored, mesh)
    models, frozen = dict.fromkeys(objective.roles, model), dict.fromkeys(rest, whole)
    if recipe.lora is not None:  # one base serves all roles
        strong = dataclasses.replace(model, lora=Lora(recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets))
        frozen = {"base": whole}
    # What the SFT made is as it was trained: whole, or an adapter.
    for role in _of_sft(joint, rest):
        models[role], frozen[role] = strong, strong.abstract(recipe.model.param_dtype, mesh)
    if source is not None:
        models["weak"] = source.model(model)
        frozen = {role: tree for role, tree in frozen.items() if role != "weak" or source.of_base}
    if joint is not None and "teacher" in rest:
        models["teacher"], dtype = _teacher(recipe, str(joint.teacher))
        frozen["teacher"] = models["teacher"].abstract(dtype, mesh)
    if cached and "weak" in rest:
        batch["weak_hidden"] = _rows((d.batch_size, d.seq_len, model.sizes["D"]), jnp.bfloat16, mesh)
        models["weak"] = model
        if recipe.lora is None:
            frozen["weak"] = {model.head_row.path: whole[model.head_row.path]}
    tx, _ = optim.make(recipe.optimizer, 1000)  # how many steps it plans for makes no difference here
    if isinstance(source, Ema):
        tx = optim.with_weak_average(tx, source.decay)
    params = strong.abstract(recipe.model.param_dtype, mesh)
    state = step.abstract_state(dict.fromkeys(trained, params), tx)
    function = step.make_train_step(
        {role: strong if role in trained else models[role] for role in objective.roles}, objective, tx, mesh=mesh,
        micro_batches=loop.micro_batches, chunk_tokens=loop.head_chunk_tokens, z_loss=loop.z_loss,
        diagnose_every=loop.diagnose_every_steps, seed=recipe.seed,
        weak_source=source if source is not None and source.moving else None, neftune=arms.neftune(stage),
    )  # fmt: skip
    uses: dict[str, flops.Use] = dict.fromkeys(objective.roles, "resident")
    uses |= dict.fromkeys(trained, "trained" if recipe.lora is None else "adapted")
    if cached and "weak" in rest:
        uses["weak"] = "cached"
    cost = flops.step(
        [(flops.forward(models[role], d.seq_len), use) for role, use in uses.items()], remat=model.remat == "full"
    )
    return Program(
        function, (state, frozen, batch),
        {"parameters": state.params, "optimizer": state.opt_state, "frozen": frozen, "batch": batch},
        model, d.batch_size, d.seq_len, cost,
    )  # fmt: skip


def _of_sft(joint: config.JointConfig | None, frozen: tuple[str, ...]) -> list[str]:
    """Return the frozen roles that are checkpoints of the SFT."""
    if joint is None:
        return []
    is_one = {"reference": joint.reference == "start", "weak": joint.weak.source.step is not None}
    return [role for role in frozen if is_one.get(role, False)]


def _teacher(recipe: config.RunConfig, path: str) -> tuple[CausalLM, str]:
    """Return a teacher's model, and the dtype that its weights are stored in."""
    m, settings = recipe.model, hf.read_config(hf.resolve(path))
    model = hf.from_config(settings, compute_dtype=m.compute_dtype, remat=m.remat, attention=m.attention)
    return model, str(settings.get("dtype") or settings.get("torch_dtype") or m.compute_dtype)


def _score(recipe: config.RunConfig, model: CausalLM, stored: str, mesh: Mesh) -> Program:
    rows = recipe.score.batch_size or recipe.dataset.batch_size // recipe.train.micro_batches
    _check_rows("score.batch_size", rows, 1, mesh)
    params, batch = model.abstract(stored, mesh), _batch(rows, recipe.dataset.seq_len, mesh)
    batch["wanted"] = _rows((rows, recipe.dataset.seq_len), jnp.bool_, mesh)
    function = jax.jit(functools.partial(step.score, model, mesh=mesh, chunk_tokens=recipe.train.head_chunk_tokens))
    cost = flops.step([(flops.forward(model, recipe.dataset.seq_len), "resident")])
    arguments = {"parameters": params, "batch": batch}
    return Program(function, (params, batch), arguments, model, rows, recipe.dataset.seq_len, cost)


def _batch(rows: int, seq_len: int, mesh: Mesh) -> dict[str, Any]:
    """Return the shapes of what `data.batches` gives."""
    integers = ("tokens", "targets", "segments", "positions", "example_index")
    batch = {name: _rows((rows, seq_len), jnp.int32, mesh) for name in integers}
    return batch | {"loss_weights": _rows((rows, seq_len), jnp.float32, mesh)}


def _rows(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(sharding.BATCH_AXES)))


def _check_rows(key: str, rows: int, parts: int, mesh: Mesh) -> None:
    split = sharding.batch_shards(mesh) * parts
    if rows % split:
        raise ValueError(
            f"{key}: {rows} rows do not split over {split} = train.micro_batches × mesh.data × mesh.fsdp; make it a "
            f"multiple"
        )
