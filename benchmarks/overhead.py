"""What weak-driven learning costs beyond SFT, against what its FLOPs predict.

    python -m benchmarks.overhead [--setups body head] [--pairs 15]

One random Qwen3 whose head is a small part of the SFT step and one where it is more than half, because a weak agent
costs different things in the two: resident one more forward pass, cached one more product with the head. Every variant
is a whole training step in float32 (AdamW, state donated) on the same batch, and counts if its first loss is the one of
the dense formula. AdamW's update is no part of the prediction; with as few tokens as here it is 3 % (body) and 7 %
(head) of the SFT step, and hides as much of what a weak agent adds: cached on "head" would be 1.21 where it is 1.19.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks import timing

if __name__ == "__main__":
    timing.pin(threads=1)  # before jax makes its threads

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wmss_jax as wmss
from wmss_jax import flops
from wmss_jax.models import CausalLM, qwen3
from wmss_jax.models.lora import Lora
from wmss_jax.objectives import LogitMix, Sft

SEQ_LEN = 512
LAMBDA = 0.5
LORA = Lora(rank=8, alpha=16.0)
NEVER = 10**6  # diagnose_every of a step that could measure and, in this run, does not

# Nothing is promised of what training the weak branch costs, or of adapters, whose own FLOPs are not counted.
TARGETS = {"resident": 1.05, "cached": 1.05, "trained": None, "lora": None, "lora_sft": None}
TOLERANCES = {"cached": 1e-3}  # absolute, of the first loss: its hidden states are rounded to bfloat16
TOLERANCE = 1e-4


class Setup(NamedTuple):
    """A model, and as many rows of SEQ_LEN tokens as keep its step near a second on one core."""

    model: CausalLM
    rows: int
    head_share: tuple[float, float]  # of the SFT step's FLOPs, at least and at most


class Variant(NamedTuple):
    """A training step and what it starts from.

    `loss` names what its first loss is to be. `uses` is what it does with strong and weak, for `flops.step`, or None
    where it computes what another variant does.
    """

    step: Callable
    trained: Mapping[str, Any]
    frozen: Mapping[str, Any]
    batch: Mapping[str, Any]
    loss: str
    uses: tuple[flops.Use, ...] | None = None


class Run:
    """A variant under way: a call takes one step; `losses` has what each of them found."""

    def __init__(self, variant: Variant, tx: optax.GradientTransformation):
        self._variant, self._state, self.losses = variant, wmss.init_state(variant.trained, tx), []

    def __call__(self) -> None:
        v = self._variant
        self._state, metrics = jax.block_until_ready(v.step(self._state, v.frozen, v.batch))
        self.losses.append(float(metrics["loss"]))


def _model(layers: int, width: int, vocab: int) -> CausalLM:
    # Larger weights than one starts from: logits then differ, and losses agree only where models do.
    config = qwen3.Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=4 * width, num_layers=layers, num_heads=width // 64,
        num_kv_heads=width // 128, head_dim=64, rope_theta=1e6, norm_eps=1e-6, tied=False, max_positions=SEQ_LEN,
        init_std=0.05,
    )  # fmt: skip
    return CausalLM("qwen3", config)


SETUPS = {
    "body": Setup(_model(layers=4, width=384, vocab=2048), rows=1, head_share=(0.0, 0.1)),
    "head": Setup(_model(layers=2, width=256, vocab=16384), rows=2, head_share=(0.5, 1.0)),
}


def variants(setup: Setup, tx: optax.GradientTransformation) -> tuple[dict[str, Variant], dict[str, float]]:
    """Return what is measured, and by name the losses to expect of the first steps."""
    model = setup.model
    strong, weak = (model.init(jax.random.key(seed)) for seed in range(2))
    adapted = CausalLM(model.arch, model.config, lora=LORA)
    adapter = adapted.init(jax.random.key(2))  # changes nothing yet: with weak = base, the mixed logits are the base's
    batch = jax.device_put(_batch(model.config.vocab_size, setup.rows))
    hidden = jax.jit(model.hidden)(weak, batch["tokens"], batch["positions"], batch["segments"])
    # Cached states come with the batch: what reading them takes is the disk's affair.
    cached, head = {**batch, "weak_hidden": hidden.astype(jnp.bfloat16)}, {"unembed": weak["unembed"]}

    make = functools.partial(wmss.make_train_step, tx=tx)
    sft, mix, diagnosed = (
        make(model, Sft()), make(model, LogitMix(LAMBDA)), make(model, LogitMix(LAMBDA), diagnose_every=NEVER),
    )  # fmt: skip
    lora_sft, lora = make(adapted, Sft()), make({"strong": adapted, "weak": model}, LogitMix(LAMBDA))
    dense = jax.jit(functools.partial(_dense_step, model=model, tx=tx), donate_argnums=0)
    made = {
        "sft": Variant(sft, {"strong": strong}, {}, batch, "sft", ("trained",)),
        "dense": Variant(dense, {"strong": strong}, {}, batch, "sft"),
        "resident": Variant(mix, {"strong": strong}, {"weak": weak}, batch, "mix", ("trained", "resident")),
        "diagnosed": Variant(diagnosed, {"strong": strong}, {"weak": weak}, batch, "mix"),
        "cached": Variant(mix, {"strong": strong}, {"weak": head}, cached, "mix", ("trained", "cached")),
        "trained": Variant(mix, {"strong": strong, "weak": weak}, {}, batch, "mix", ("trained", "trained")),
        "lora_sft": Variant(lora_sft, {"strong": adapter}, {"base": strong}, batch, "sft", ("adapted",)),
        "lora": Variant(lora, {"strong": adapter}, {"base": strong}, batch, "sft", ("adapted", "resident")),
    }
    z = {role: _logits(model, params, batch) for role, params in {"strong": strong, "weak": weak}.items()}
    mixed = LAMBDA * z["strong"] + (1 - LAMBDA) * z["weak"]
    return made, {"sft": float(_dense_loss(z["strong"], batch)), "mix": float(_dense_loss(mixed, batch))}


def _batch(V: int, rows: int) -> dict[str, np.ndarray]:
    """Return rows of two examples and a little padding; the first quarter of each example is its prompt."""
    lengths = [SEQ_LEN * 7 // 16, SEQ_LEN // 2, SEQ_LEN // 16]
    segments = np.repeat(np.array([1, 2, 0], np.int32), lengths)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    trained = (segments > 0) & (positions >= SEQ_LEN // 8) & (segments == np.append(segments[1:], 0))
    tokens = np.random.default_rng(0).integers(0, V, (rows, SEQ_LEN), dtype=np.int32)
    row = {"segments": segments, "positions": positions, "loss_weights": trained.astype(np.float32)}
    of_rows = {name: np.tile(values, (rows, 1)) for name, values in row.items()}
    return {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), **of_rows}


def _logits(model: CausalLM, params: Any, batch: Mapping[str, Any]) -> jax.Array:
    return model.logits(params, batch["tokens"], batch["positions"], batch["segments"])


def _dense_loss(logits_BTV: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["targets"])
    return jnp.sum(losses_BT * batch["loss_weights"]) / jnp.sum(batch["loss_weights"])


def _dense_step(
    state: wmss.TrainState, frozen: Mapping, batch: Mapping[str, Any], *, model: CausalLM, tx: Any
) -> tuple[wmss.TrainState, dict[str, jax.Array]]:
    """SFT as one writes it down first, all logits at once and nothing measured besides the loss."""
    del frozen
    value_of = lambda params: _dense_loss(_logits(model, params["strong"], batch), batch)
    value, grads = jax.value_and_grad(value_of)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return wmss.TrainState(state.step + 1, params, opt_state), {"loss": value}


def check(losses: Mapping[str, float], expected: Mapping[str, float], kinds: Mapping[str, str]) -> None:
    """Exit unless every first loss is the expected one; a step that computes something else has no cost to compare."""
    for name, value in losses.items():
        gap, allowed = abs(value - expected[kinds[name]]), TOLERANCES.get(name, TOLERANCE)
        timing.say(f"{name}: first loss {value:.6f}, {gap:.1e} off")
        if not gap <= allowed:  # a NaN is refused, too
            raise SystemExit(f"{name}: the first loss is {value}, expected {expected[kinds[name]]} within {allowed}")


def report(name: str, setup: Setup, made: Mapping[str, Variant], times: Mapping[str, list[float]]) -> None:
    """Emit the figures of a setup."""
    cost = flops.forward(setup.model, SEQ_LEN)
    predicted = {v: flops.step([(cost, use) for use in made[v].uses]) for v in ("sft", *TARGETS)}
    for variant, target in TARGETS.items():
        ratio, expected = timing.ratio(times, variant, "sft"), predicted[variant] / predicted["sft"]
        timing.say(f"{name} {variant}: {ratio} of SFT, predicted {expected:.4g}")
        figure = functools.partial(timing.emit, better="lower", unit="ratio")
        figure(f"overhead.{name}.{variant}", ratio.median / expected, target=target)
        figure(f"overhead.{name}.{variant}_measured", ratio.median, target=None)
        figure(f"overhead.{name}.{variant}_predicted", expected, target=None)
    diagnosed, dense = timing.ratio(times, "diagnosed", "resident"), timing.ratio(times, "dense", "sft")
    timing.say(f"{name}: diagnostics that do not measure {diagnosed} of resident, dense {dense} of SFT")
    timing.emit(f"overhead.{name}.idle_diagnostics", diagnosed.median, target=None, better="lower", unit="ratio")
    timing.emit(f"overhead.{name}.sft_vs_dense", dense.median, target=0.95, better="higher", unit="ratio")
    timing.emit(
        f"overhead.{name}.sft_seconds", timing.spread(times["sft"]).median, target=None, better="lower", unit="s"
    )


def measure(name: str, setup: Setup, pairs: int) -> None:
    """Check and time all variants of one setup."""
    cost = flops.forward(setup.model, SEQ_LEN)
    share, (least, most) = cost.head / sum(cost), setup.head_share
    timing.say(f"{name}: the head is {share:.1%} of the SFT step's FLOPs")
    assert least <= share <= most, name
    tx = optax.adamw(1e-4)
    made, expected = variants(setup, tx)
    runs = {variant: Run(made[variant], tx) for variant in made}
    for run in runs.values():
        run()
    check({v: run.losses[0] for v, run in runs.items()}, expected, {v: variant.loss for v, variant in made.items()})
    report(name, setup, made, timing.interleaved(runs, pairs, warmup=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS), help="default: all")
    parser.add_argument("--pairs", type=int, default=15, help="default 15")
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error(f"--pairs must be at least 2 to have a spread, got {args.pairs}")
    timing.say(timing.one_line(timing.machine()))
    for name in args.setups:
        measure(name, SETUPS[name], args.pairs)


if __name__ == "__main__":
    main()
