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

from wmss_jax import (
    arms,
    checkpoint,
    config,
    flops,
    hf,
    objectives,
    optim,
    roles,
    sharding,
    stage_config,
    step,
    storage,
    train_state,
)
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
    own = _Stored.of(recipe, hf.read_config(Path(m.config) if m.config is not None else hf.resolve(str(m.path))))
    if recipe.pretrain is not None:
        own = own._replace(dtype=m.param_dtype)  # what is made here is stored as it is trained
    if name == "score":
        return _score(recipe, own, mesh)
    _check_rows("dataset.batch_size", recipe.dataset.batch_size, parts, mesh)
    if name == "sft":
        return _train(recipe, {"strong": own}, mesh, objectives.Sft(), ("strong",), recipe.sft)
    joint, objective = recipe.joint, arms.objective(recipe, "joint")
    paths = {"weak": joint.weak.path, "teacher": joint.teacher}
    given = {role: paths.get(role) for role in objective.roles}
    models = {role: own if path is None else _Stored.of(recipe, _config_at(path), True) for role, path in given.items()}
    return _train(recipe, models, mesh, objective, arms.trained(joint, objective), joint)


class _Stored(NamedTuple):
    """A model, and the dtype of its weights on disk, in which they are held while they are frozen."""

    model: CausalLM
    dtype: str
    elsewhere: bool  # not the recipe's own model

    @classmethod
    def of(cls, recipe: config.RunConfig, settings: Mapping[str, Any], elsewhere: bool = False) -> "_Stored":
        m = recipe.model
        model = hf.from_config(settings, compute_dtype=m.compute_dtype, remat=m.remat, attention=m.attention)
        return cls(model, str(settings.get("dtype") or settings.get("torch_dtype") or m.compute_dtype), elsewhere)


def _config_at(path: str) -> dict[str, Any]:
    """Return the config.json of a Hugging Face directory, a hub id or a checkpoint."""
    directory = storage.path(path)
    if (directory / checkpoint.META).is_file():
        return hf.read_config(storage.here(directory / roles.ASSETS))
    return hf.read_config(hf.resolve(path))


def _train(
    recipe: config.RunConfig, stored: Mapping[str, _Stored], mesh: Mesh, objective: objectives.Objective,
    trained: tuple[str, ...], stage: stage_config.StageConfig,
) -> Program:  # fmt: skip
    joint = stage if isinstance(stage, stage_config.JointConfig) else None
    loop, d, own = recipe.train, recipe.dataset, stored["strong"]
    source = None if joint is None else arms.source(joint, objective)
    rest = tuple(role for role in objective.roles if role not in trained)
    cached = joint is not None and joint.weak.placement == "cached" and "weak" in rest
    batch = _batch(d.batch_size, d.seq_len, mesh)
    frozen = {
        role: stored[role].model.abstract(stored[role].dtype, mesh)
        for role in rest if role != "weak" or source is None or source.of_base
    }  # fmt: skip
    models = {role: one.model for role, one in stored.items()}
    if source is not None:
        models["weak"] = source.model(own.model)
    if cached:
        weak = models["weak"]
        batch["weak_hidden"] = _rows((d.batch_size, d.seq_len, weak.sizes["D"]), jnp.bfloat16, mesh)
        frozen["weak"] = {weak.head_row.path: frozen["weak"][weak.head_row.path]}
    forward = {role: flops.forward(model, d.seq_len) for role, model in models.items()}
    if recipe.lora is not None:  # one base serves all roles that are not from elsewhere
        adapted = dataclasses.replace(own.model, lora=Lora(recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets))
        models |= dict.fromkeys(trained, adapted)
        apart = {role: params for role, params in frozen.items() if stored[role].elsewhere}
        frozen = {"base": own.model.abstract(own.dtype, mesh)} | apart
    for role in _of_sft(joint, rest) - ({"weak"} if cached else set()):
        models[role] = models["strong"]
        frozen[role] = models["strong"].abstract(recipe.model.param_dtype, mesh)
    models = arms.sharing_tokens(models)
    tx, _ = optim.make(recipe.optimizer, 1000)  # how many steps it plans for makes no difference here
    if isinstance(source, Ema):
        tx = optim.with_weak_average(tx, source.decay)
    state = train_state.abstract_state({r: models[r].abstract(recipe.model.param_dtype, mesh) for r in trained}, tx)
    function = step.make_train_step(
        models, objective, tx, mesh=mesh, micro_batches=loop.micro_batches, chunk_tokens=loop.head_chunk_tokens,
        z_loss=loop.z_loss, diagnose_every=loop.diagnose_every_steps, seed=recipe.seed,
        weak_source=source if source is not None and source.moving else None, neftune=arms.neftune(stage),
    )  # fmt: skip
    uses: dict[str, flops.Use] = dict.fromkeys(objective.roles, "resident")
    uses |= dict.fromkeys(trained, "trained" if recipe.lora is None else "adapted")
    if cached:
        uses["weak"] = "cached"
    cost = flops.step([(forward[role], use) for role, use in uses.items()], remat=own.model.remat == "full")
    return Program(
        function, (state, frozen, batch),
        {"parameters": state.params, "optimizer": state.opt_state, "frozen": frozen, "batch": batch},
        own.model, d.batch_size, d.seq_len, cost,
    )  # fmt: skip


def _of_sft(joint: stage_config.JointConfig | None, frozen: tuple[str, ...]) -> set[str]:
    """Return the frozen roles that are checkpoints of the SFT: held as it trains them, whole or as adapters."""
    if joint is None:
        return set()
    is_one = {"reference": joint.reference == "start", "weak": joint.weak.source.step is not None}
    return {role for role in frozen if is_one.get(role, False)}


def _score(recipe: config.RunConfig, own: _Stored, mesh: Mesh) -> Program:
    model = own.model
    rows = recipe.score.batch_size or recipe.dataset.batch_size // recipe.train.micro_batches
    _check_rows("score.batch_size", rows, 1, mesh)
    params, batch = model.abstract(own.dtype, mesh), _batch(rows, recipe.dataset.seq_len, mesh)
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
