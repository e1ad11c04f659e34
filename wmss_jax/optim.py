"""The optimizer of a run: AdamW with a schedule, decay by name, clipping joint over the trained roles, and an EMA."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

if TYPE_CHECKING:
    from wmss_jax.training_config import OptimizerConfig


def make(config: "OptimizerConfig", total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the gradient transformation and its learning-rate schedule.

    Clipping acts on the joint norm of everything that is trained: with a trained weak role, of both roles together,
    as in the released code.
    """
    schedule = learning_rate(config, total_steps)
    return _chain(config, schedule), schedule


def make_for_any_rate(config: "OptimizerConfig", total_steps: int) -> optax.GradientTransformation:
    """Return `make`'s transformation with the peak learning rate in its state, so that all rates are one program.

    Set it with `optax.tree.set(opt_state, peak_lr=...)`; `config.peak_lr` has no part in it.
    """
    shape = learning_rate(config.model_copy(update={"peak_lr": 1.0}), total_steps)
    return _chain(config, shape, optax.inject_hyperparams(_scale)(peak_lr=0.0))


def _scale(peak_lr: Any) -> optax.GradientTransformation:
    return optax.scale(peak_lr)


def _chain(
    config: "OptimizerConfig", schedule: optax.Schedule, *scale: optax.GradientTransformation
) -> optax.GradientTransformation:
    adamw = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed
    )
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else []
    ema = [average(config.ema_decay)] if config.ema_decay is not None else []
    return optax.chain(*clip, adamw, *scale, *ema)


def learning_rate(config: "OptimizerConfig", total_steps: int) -> optax.Schedule:
    """Return lr(count): linear warm-up to the peak, then the chosen decay to `min_lr_ratio` of it at `total_steps`.

    Step `count` is the number of updates made before; the first update already moves (peak / warm-up steps), unlike
    in transformers, where its learning rate is 0.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_fraction * total_steps)
    if warmup > total_steps:
        raise ValueError(f"optimizer.warmup_steps: {warmup} steps of warm-up in a run of {total_steps} steps")
    decay_steps = max(1, total_steps - warmup)
    floor = config.min_lr_ratio * config.peak_lr
    decay = {
        "constant": optax.constant_schedule(config.peak_lr),
        "linear": optax.linear_schedule(config.peak_lr, floor, decay_steps),
        "cosine": optax.cosine_decay_schedule(config.peak_lr, decay_steps, alpha=config.min_lr_ratio),
    }[config.schedule]
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(config.peak_lr / warmup, config.peak_lr, max(1, warmup - 1))
    return optax.join_schedules([rise, decay], [warmup])


def decayed(params: PyTree[Array]) -> PyTree[bool]:
    """Return which parameters decay: matrices, not norms or biases, told by name (stacked norms have rank 2)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any("norm" in str(key) or "bias" in str(key) for key in path), params
    )


def with_weak_average(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Return `tx` that keeps besides the average of the parameters that a weak agent is (`weak_source.Ema`)."""
    return optax.chain(tx, average(decay, WeakAverageState))


class AverageState(NamedTuple):
    """`average`: float32 parameters, averaged over the updates made so far."""

    average: PyTree[Array]


class WeakAverageState(NamedTuple):
    """`weak_average`: the same, of another decay, for a weak agent (`weak_source.Ema`)."""

    weak_average: PyTree[Array]


def average(decay: float, State: type = AverageState) -> optax.GradientTransformation:
    """Return a last link of a chain that passes updates on and keeps an exponential moving average of the parameters.

    Read it with `optax.tree.get(opt_state, "average")`, or by the name of the field of another `State`.
    """

    def init(params: PyTree[Array]) -> Any:
        return State(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("the average of the parameters needs them: call tx.update(grads, state, params)")
        blend = lambda mean, p, u: decay * mean + (1 - decay) * (p + u).astype(jnp.float32)
        return updates, State(jax.tree.map(blend, state[0], params, updates))

    return optax.GradientTransformation(init, update)
