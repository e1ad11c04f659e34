"""The step: trained roles, frozen roles and a batch in; a new state and metrics out. Pure functions, jit-compiled.

A batch is a dict of arrays [B, T]: `tokens`, `targets` int32 (targets[b, t] = tokens[b, t+1] inside a segment),
`loss_weights` float32 (0 at a segment's last position and wherever the target is not trained on), and optionally
`segments` (0 = padding), `positions` (restart in every segment) and `example_index` int32. With `<role>_hidden`
[B, T, D], the final-norm hidden states of a frozen role (`weak_cache`), that role's body is not run, and of its
parameters those of the head are enough.

A role whose model has an adapter (`CausalLM.lora`) is given by the adapter's parameters, and `base` among the frozen
ones is what they adapt; a role without parameters of its own is that base as it is.

With `<role>_from` int32 [B, T] a role's hidden states are moved within their rows, and `<role>_tokens`, `_positions`
and `_segments` are what it reads instead of the others' (controls of the weak signal).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer, PyTree

from wmss_jax import attention, diagnostics, head, sharding
from wmss_jax.models import CausalLM
from wmss_jax.models.layers import embedding_noise
from wmss_jax.neftune import Neftune
from wmss_jax.objectives import Objective
from wmss_jax.train_state import TrainState, map_params
from wmss_jax.weak_source import Source

Batch = Mapping[str, Array | np.ndarray]
Metrics = dict[str, Float[Array, ""]]
Models = CausalLM | Mapping[str, CausalLM]


def loss(
    models: Models,
    objective: Objective,
    params: Mapping[str, PyTree[Array]],
    frozen: Mapping[str, PyTree[Array]],
    batch: Batch,
    *,
    mesh: Mesh | None = None,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
    step: int | Int[Array, ""] = 0,
    seed: int | Integer[Array, ""] = 0,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the mean loss over the batch's loss tokens and the metrics, averaged alike; float32 scalars.

    Σ w·ℓ / Σ w over the whole batch; differentiable once in `params`, the first of the two dicts.

    Args:
        models: one model for all roles, or {role: model}.
        params, frozen: {role: parameters}; together they hold the objective's roles.
        chunk_tokens: tokens whose logits exist at once on a device; default by memory.
        z_loss: factor on log²Σexp(z) of the trained roles, added to the loss.
        step, seed: what schedules and noise in the objective depend on.

    Raises:
        ValueError: a role is missing, or two roles differ in vocabulary.
    """
    full = _rearranged(objective, complete(batch), step, seed)
    weights = full["loss_weights"] / jnp.maximum(jnp.sum(full["loss_weights"]), 1e-9)
    with sharding.use(mesh):
        settings = head.Settings(mesh, chunk_tokens=chunk_tokens, z_loss=z_loss)
        batch = {**full, "loss_weights": weights}
        return _weighted_loss(models, objective, params, frozen, batch, settings=settings, step=step, seed=seed)


def make_train_step(
    models: Models,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    micro_batches: int = 1,
    donate: bool = True,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
    diagnose_every: int | None = None,
    seed: int = 0,
    weak_source: Source | None = None,
    neftune: Neftune | None = None,
) -> Callable[[TrainState, Mapping[str, PyTree], Batch], tuple[TrainState, Metrics]]:
    """Return the jitted step (state, frozen, batch) -> (state, metrics).

    Metrics are those of `loss` besides `loss`, `grad_norm` (before clipping) and `loss_tokens` (Σ weights).

    Args:
        micro_batches: parts of the batch whose gradients are added up one after another; the division by the global
            token count comes once, so the result does not depend on it.
        donate: reuse the old state's memory for the new one; the old state is gone after the call.
        z_loss: factor on log²Σexp(z) of the trained roles, added to the loss.
        diagnose_every: every so many steps the metrics "diagnostics/..." say what `diagnostics.measure` finds in the
            logits; in the steps between they are NaN. None: there are none.
        weak_source: makes the weak role's parameters in every step, of the state before it (`weak_source.Source`).
        neftune: noise on the embeddings of the trained roles.
    """
    step = functools.partial(
        train_step, models=models, objective=objective, tx=tx, mesh=mesh, micro_batches=micro_batches,
        chunk_tokens=chunk_tokens, z_loss=z_loss, diagnose_every=diagnose_every, seed=seed, weak_source=weak_source,
        neftune=neftune,
    )  # fmt: skip
    return jax.jit(step, donate_argnums=(0,) if donate else ())


def train_step(
    state: TrainState,
    frozen: Mapping[str, PyTree[Array]],
    batch: Batch,
    *,
    models: Models,
    objective: Objective,
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
    micro_batches: int = 1,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
    diagnose_every: int | None = None,
    seed: int | Integer[Array, ""] = 0,
    weak_source: Source | None = None,
    neftune: Neftune | None = None,
) -> tuple[TrainState, Metrics]:
    """Return the state after one optimizer step on `batch`, and the step's metrics (see `make_train_step`).

    Under a jit of your own `seed` may be traced, so that runs of other seeds are one program.
    """
    full = _rearranged(objective, complete(batch), state.step, seed)
    loss_tokens = jnp.sum(full["loss_weights"])
    # Normalised up front: micro-batches then simply add up, whatever their share of the tokens is.
    full = {**full, "loss_weights": full["loss_weights"] / jnp.maximum(loss_tokens, 1e-9)}
    letters = {role: _model(models, role).letters for role in state.params}
    settings = head.Settings(mesh, chunk_tokens=chunk_tokens, z_loss=z_loss, diagnose_every=diagnose_every)

    def part_of(micro_batch: dict[str, Array]) -> tuple[Metrics, PyTree]:
        value_of = lambda params: _weighted_loss(
            models, objective, params, frozen, micro_batch, settings=settings, step=state.step, seed=seed,
            neftune=neftune,
        )  # fmt: skip
        (value, metrics), grads = jax.value_and_grad(value_of, has_aux=True)(state.params)
        return {"loss": value, **metrics}, sharding.constrain_params(grads, letters)

    with sharding.use(mesh):
        if weak_source is not None:
            frozen = {**frozen, "weak": weak_source(state, frozen)}
        metrics, grads = _sum_over(part_of, full, micro_batches, sharding.batch_shards(mesh))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = sharding.constrain_params(optax.apply_updates(state.params, updates), letters)
        opt_state = map_params(
            tx, lambda leaf, axes: sharding.constrain_params(leaf, axes), state.params, letters, tree=opt_state
        )
    metrics = diagnostics.finish(metrics) | {"grad_norm": optax.tree.norm(grads), "loss_tokens": loss_tokens}
    return TrainState(state.step + 1, params, opt_state), metrics


def make_eval_step(
    models: Models, objective: Objective, *, mesh: Mesh | None = None, chunk_tokens: int | None = None
) -> Callable[[Mapping[str, PyTree], Batch], Metrics]:
    """Return the jitted ({role: params}, batch) -> metrics of `loss`, `loss` and `loss_tokens` among them."""

    def eval_step(params: Mapping[str, PyTree], batch: Batch) -> Metrics:
        value, metrics = loss(models, objective, {}, params, batch, mesh=mesh, chunk_tokens=chunk_tokens)
        return {"loss": value, **metrics, "loss_tokens": jnp.sum(batch["loss_weights"])}

    return jax.jit(eval_step)


def score(
    model: CausalLM,
    params: PyTree[Array],
    batch: Batch,
    *,
    mesh: Mesh | None = None,
    chunk_tokens: int | None = None,
    with_hidden: bool = False,
) -> dict[str, Float[Array, "B T ..."]]:
    """Return {"entropy", "nll", "margin"}, float32 [B, T]: at position t of the distribution that predicts token t+1.

    Entropy and nll are in nats; the margin is the target's logit minus the mean of all others.
    `curriculum.example_means` turns them into one number per example. Pure; jit it where it is called often.

    Args:
        batch: may hold "wanted", bool [B, T]: the positions to score. All others then get 0 and cost no logits.
        with_hidden: add "hidden", the final-norm hidden states of the same pass, bfloat16 [B, T, D] (`weak_cache`).
    """
    full = complete(batch)
    settings = _of_models(head.Settings(mesh, chunk_tokens=chunk_tokens), {"strong": model})
    with sharding.use(mesh):
        hidden_BTD = model.hidden(params, full["tokens"], full["positions"], full["segments"])
        scores = head.score(model.unembed(params), hidden_BTD, full["targets"], settings, wanted_BT=full.get("wanted"))
        return {**scores, "hidden": hidden_BTD.astype(jnp.bfloat16)} if with_hidden else scores


def complete(batch: Batch) -> dict[str, Array]:
    """Return the batch with `segments`, `positions` and `example_index` filled in where they were left out.

    Raises:
        ValueError: `tokens`, `targets` or `loss_weights` is missing, or shapes differ.
    """
    missing = {"tokens", "targets", "loss_weights"} - batch.keys()
    if missing:
        raise ValueError(f"a batch needs tokens, targets and loss_weights; missing: {', '.join(sorted(missing))}")
    given = {key: jnp.asarray(value) for key, value in batch.items()}
    shape = given["tokens"].shape
    wrong = {key: value.shape for key, value in given.items() if value.shape[:2] != shape}
    if wrong:
        raise ValueError(f"batch arrays must all be [B, T] = {list(shape)} like tokens; got {wrong}")
    index_BT = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    segments = given.get("segments", jnp.ones(shape, jnp.int32))
    start_BT = attention.first_keys(segments, window=None)
    rows_BT = jnp.broadcast_to(jnp.arange(shape[0], dtype=jnp.int32)[:, None], shape)
    return {"segments": segments, "positions": index_BT - start_BT, "example_index": rows_BT, **given}


def _weighted_loss(
    models: Models, objective: Objective, params: Mapping, frozen: Mapping, batch: Mapping[str, Array],
    *, settings: head.Settings, step: Any, seed: Any, neftune: Neftune | None = None,
) -> tuple[Array, Metrics]:  # fmt: skip
    """Return Σ w·ℓ of a batch whose weights are already normalised, and the metrics summed alike."""
    check_roles(models, objective, {**frozen, **params})
    by_role = {role: _model(models, role) for role in objective.roles}
    whole = {role: _whole(model, role, {**frozen, **params}) for role, model in by_role.items()}

    measured: Metrics = {}
    share = jnp.sum(batch["loss_weights"])  # of all micro-batches; their metrics are added up

    def hidden(role: str, tokens_BT: Array) -> Array:
        hidden_BTD = batch.get(f"{role}_hidden")
        if hidden_BTD is None:
            tokens_BT = batch.get(f"{role}_tokens", tokens_BT)
            seen = [batch.get(f"{role}_{name}", batch[name]) for name in ("positions", "segments")]
            with _noise(neftune, by_role[role], batch, step, seed) if role in params else contextlib.nullcontext():
                hidden_BTD, metrics = by_role[role].hidden_and_metrics(whole[role], tokens_BT, *seen)
            if role in params:
                measured.update({f"{name}/{role}": share * value for name, value in metrics.items()})
        else:
            hidden_BTD = hidden_BTD.astype(by_role[role].dtype(whole[role]))
        moved = batch.get(f"{role}_from")
        return hidden_BTD if moved is None else jnp.take_along_axis(hidden_BTD, moved[..., None], axis=1)

    tokens_BT = batch["tokens"]
    frozen_roles = [role for role in objective.roles if role not in params]
    hiddens = {role: jax.lax.stop_gradient(hidden(role, tokens_BT)) for role in frozen_roles}
    # Frozen roles first: while they run nothing is kept for a backward pass yet, and of them only this is kept then.
    tokens_BT, hiddens = jax.lax.optimization_barrier((tokens_BT, hiddens))
    hiddens |= {role: hidden(role, tokens_BT) for role in objective.roles if role in params}
    rows = max(model.sizes["V"] for model in by_role.values())
    value, metrics = head.loss(
        objective,
        {role: _widened(model.unembed(whole[role]), rows) for role, model in by_role.items()},
        {role: hiddens[role] for role in objective.roles},
        head.Tokens(batch["targets"], batch["loss_weights"], batch["example_index"], batch["positions"]),
        trainable=frozenset(params),
        frozen_heads=frozenset(role for role, model in by_role.items() if model.lora is not None),
        step=jnp.asarray(step, jnp.int32),
        seed=seed,
        settings=_of_models(settings, by_role),
    )
    return value, {**metrics, **measured}


def _rearranged(objective: Objective, batch: dict[str, Array], step: Any, seed: Any) -> dict[str, Array]:
    """Return the batch with what the weak role is to see, where a control has it see other tokens; of all rows, before
    they are split into micro-batches."""
    rearranged = getattr(objective, "rearranged", None)
    return batch if rearranged is None else rearranged(batch, step, seed)


def _noise(
    neftune: Neftune | None, model: CausalLM, batch: Mapping[str, Array], step: Any, seed: Any
) -> contextlib.AbstractContextManager:
    if neftune is None:
        return contextlib.nullcontext()
    return embedding_noise(neftune.noise(batch, model.sizes["D"], step, seed))


def _whole(model: CausalLM, role: str, params: Mapping[str, PyTree[Array]]) -> PyTree:
    """Return what the role's model takes for its parameters: its own, the base's, or the base's with its adapter."""
    if model.lora is not None:
        return model.adapt(params["base"], params[role])
    return params[role] if role in params else params["base"]


def _widened(unembed_DV: Array, rows: int) -> Array:
    """Return a head's matrix with columns of zeros up to `rows`: of another padding than another role's head.

    They are beyond the tokens that exist, so that the head puts their logits out of reach.
    """
    missing = rows - unembed_DV.shape[1]
    return unembed_DV if not missing else jnp.pad(unembed_DV, ((0, 0), (0, missing)))


def _of_models(settings: head.Settings, models: Mapping[str, CausalLM]) -> head.Settings:
    """Return head settings with what the models know: the size of the vocabulary, and soft caps."""
    softcaps = tuple((role, model.softcap) for role, model in models.items() if model.softcap is not None)
    tokens = {model.vocabulary[0] for model in models.values()}
    padded = any(model.sizes["V"] not in tokens for model in models.values())
    return dataclasses.replace(settings, vocab_size=min(tokens) if padded else None, softcaps=softcaps)


def check_roles(models: Models, objective: Objective, params: Mapping[str, Any]) -> None:
    """Raise ValueError unless every role of the objective has parameters and all know as many tokens.

    Their heads may have rows of padding beyond these, each as many as it likes.
    """
    adapted = [role for role in objective.roles if _model(models, role).lora is not None]
    missing = [role for role in objective.roles if role not in params and (role in adapted or "base" not in params)]
    if adapted and "base" not in params:
        raise ValueError(f"{', '.join(adapted)}: an adapter needs the parameters it adapts, as the frozen role 'base'")
    if missing:
        raise ValueError(
            f"{type(objective).__name__} needs the roles {list(objective.roles)}; no parameters for {missing}"
        )
    first, *others = objective.roles
    sizes = {role: _model(models, role).vocabulary for role in objective.roles}
    for role in others:
        if sizes[role][0] != sizes[first][0]:
            raise ValueError(
                f"the vocabularies of two roles differ: {first} has {sizes[first]}, {role} has {sizes[role]} "
                f"(tokens, rows); logits of different vocabularies cannot be mixed. Where only the padding differs, "
                f"load both with vocab_size=n, the tokens that exist"
            )


def _model(models: Models, role: str) -> CausalLM:
    if isinstance(models, CausalLM):
        return models
    if role not in models:
        raise ValueError(f"no model for role {role!r}; models has {sorted(models)}")
    return models[role]


def _sum_over(f: Callable[[dict[str, Array]], PyTree], batch: dict[str, Array], parts: int, shards: int) -> PyTree:
    """Return Σ f(part) over `parts` micro-batches, each made of every device's own rows, so that none moves."""
    rows = batch["tokens"].shape[0]
    if rows % (parts * shards):
        raise ValueError(
            f"a batch of {rows} rows cannot be split into micro_batches={parts} × {shards} batch shards of the mesh; "
            f"make the batch size a multiple of {parts * shards}"
        )
    if parts == 1:
        return f(batch)

    def split(x: Array) -> Array:
        by_shard = x.reshape(shards, parts, rows // (parts * shards), *x.shape[1:])
        return jnp.moveaxis(by_shard, 1, 0).reshape(parts, rows // parts, *x.shape[1:])

    def add(total: PyTree, part: dict[str, Array]) -> tuple[PyTree, None]:
        part = {key: sharding.constrain(x, "B T D"[: 2 * x.ndim - 1]) for key, x in part.items()}
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, f(part)), None

    stacked = jax.tree.map(split, batch)
    shapes = jax.eval_shape(f, jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)
    return jax.lax.scan(add, zeros, stacked)[0]
