"""Training steps on one accelerator in bfloat16: seconds, tokens/s, MFU and memory, against what FLOPs predict.

    python -m benchmarks.accelerator [--shape qwen3_0_6b] [--rows 4] [--variants sft resident ...] [--chunks 512 2048]

What `overhead` compares on a CPU, at a size that fills a device: a random Qwen3 of a published shape, float32
parameters and AdamW for what is trained, bfloat16 for what is frozen, rows of 4,096 tokens packed from several
examples. Variants that train the same parameters take turns on one state, because a device does not hold as many; each
one's first step, from a state of its own, gives its loss (it counts if those that must agree do) and its memory.
Figures are JSON lines as elsewhere; `--profile DIR` prints which kernels a step spends its time in.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import wmss_jax as wmss
from benchmarks import shapes, timing
from wmss_jax import flops, hardware, step
from wmss_jax.models import CausalLM
from wmss_jax.models.lora import Lora
from wmss_jax.objectives import LogitMix, Sft

LORA = Lora(rank=16, alpha=32.0)
# What a step does with strong and weak (flops.Use), and whose loss its first one is to be.
USES: dict[str, tuple[flops.Use, ...]] = {
    "lora": ("adapted", "resident"),
    "lora_sft": ("adapted",),
    "sft": ("trained",),
    "cached": ("trained", "cached"),
    "resident": ("trained", "resident"),
    "trained": ("trained", "trained"),
    "dense": ("trained",),
}
KINDS = {use: "lora" if use.startswith("lora") else use if use == "trained" else "strong" for use in USES}  # of states
LIKE = {"lora": "sft", "lora_sft": "sft", "dense": "sft", "cached": "resident", "trained": "resident"}
TOLERANCE = 3e-3  # relative, of first losses whose sums were taken in another order in bfloat16


class Variant(NamedTuple):
    """A compiled step, and what makes its arguments besides the state."""

    name: str
    use: str
    program: Any  # jax.stages.Compiled
    compile_seconds: float


class Setup:
    """The model, its parameters and the batch."""

    def __init__(self, args: argparse.Namespace):
        config = shapes.config(args.shape)
        if args.layers:
            config = dataclasses.replace(config, num_layers=args.layers)
        make = functools.partial(CausalLM, "qwen3", config, "bfloat16", args.remat, args.attention)
        self.model, self.adapted = make(), make(lora=LORA)
        self.mesh: Mesh = wmss.make_mesh(devices=jax.devices()[:1])
        self.tx = optax.adamw(1e-5)
        self.batch = jax.device_put(packed(config.vocab_size, args.rows, args.seq), NamedSharding(self.mesh, P()))

    @functools.cached_property
    def strong(self) -> Any:
        return self.model.init(jax.random.key(0), "float32", self.mesh)

    @functools.cached_property
    def base(self) -> Any:
        """The parameters of `strong`, rounded."""
        return self.model.init(jax.random.key(0), "bfloat16", self.mesh)

    @functools.cached_property
    def weak(self) -> Any:
        return self.model.init(jax.random.key(1), "bfloat16", self.mesh)

    @functools.cached_property
    def weak_hidden(self) -> jax.Array:
        score = jax.jit(functools.partial(step.score, self.model, mesh=self.mesh, with_hidden=True))
        return score(self.weak, {**self.batch, "wanted": jnp.zeros(self.batch["tokens"].shape, bool)})["hidden"]

    def state(self, kind: str) -> wmss.TrainState:
        """Return the state before the first step: of "strong" alone, of it and a "trained" weak role, of a "lora"."""
        if kind == "lora":
            return wmss.init_state({"strong": self.adapted.init(jax.random.key(2), "float32", self.mesh)}, self.tx)
        weak = {"weak": jax.tree.map(lambda x: x.astype(jnp.float32), self.weak)} if kind == "trained" else {}
        return wmss.init_state({"strong": self.strong, **weak}, self.tx)

    def rest(self, variant: str) -> tuple[dict, dict]:
        """Return the frozen parameters and the batch that a variant takes."""
        if variant == "cached":
            row = self.model.head_row.path
            return {"weak": {row: self.weak[row]}}, {**self.batch, "weak_hidden": self.weak_hidden}
        if KINDS[variant] == "lora":
            return {"base": self.base}, self.batch
        return ({"weak": self.weak} if variant == "resident" else {}), self.batch

    def function(self, variant: str, chunk: int | None, remat: str | None) -> Callable:
        """Return the jitted step of a variant; None: with the default chunk, or remat."""
        remat = self.model.remat if remat is None else remat
        model, adapted = (dataclasses.replace(model, remat=remat) for model in (self.model, self.adapted))
        make = functools.partial(wmss.make_train_step, tx=self.tx, mesh=self.mesh, chunk_tokens=chunk)
        if variant == "dense":
            return jax.jit(functools.partial(_dense_step, model=model, tx=self.tx), donate_argnums=0)
        if variant == "lora":
            return make({"strong": adapted, "weak": model}, LogitMix(0.5))
        if variant == "lora_sft":
            return make(adapted, Sft())
        return make(model, Sft() if variant == "sft" else LogitMix(0.5))


def packed(V: int, rows: int, T: int) -> dict[str, np.ndarray]:
    """Return rows of four examples of unequal length and a little padding; a quarter of each is its prompt."""
    lengths = [T * 7 // 16, T // 4, T * 3 // 16, T * 3 // 32, T - T * 31 // 32]
    segments = np.repeat(np.array([1, 2, 3, 4, 0], np.int32), lengths)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    whole = np.repeat(lengths, lengths)
    trained = (segments > 0) & (positions >= whole // 4) & (positions < whole - 1)
    tokens = np.random.default_rng(0).integers(0, V, (rows, T), dtype=np.int32)
    row = {"segments": segments, "positions": positions, "loss_weights": trained.astype(np.float32)}
    of_rows = {name: np.tile(values, (rows, 1)) for name, values in row.items()}
    return {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), **of_rows}


def _dense_step(
    state: wmss.TrainState, frozen: Mapping, batch: Mapping[str, Any], *, model: CausalLM, tx: Any
) -> tuple[wmss.TrainState, dict[str, jax.Array]]:
    """SFT as one writes it down first: all logits at once, in float32."""
    del frozen

    def value_of(params: Mapping[str, Any]) -> jax.Array:
        logits_BTV = model.logits(params["strong"], batch["tokens"], batch["positions"], batch["segments"])
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["targets"])
        return jnp.sum(losses_BT * batch["loss_weights"]) / jnp.sum(batch["loss_weights"])

    value, grads = jax.value_and_grad(value_of)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return wmss.TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), {"loss": value}


def compiled(setup: Setup, wanted: Sequence[tuple[str, int | None, str | None]]) -> Iterator[Variant]:
    """Yield (variant, chunk, remat) compiled, several at once: the compiler of one program uses few cores."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = []
        for use, chunk, remat in wanted:
            lowered = setup.function(use, chunk, remat).lower(setup.state(KINDS[use]), *setup.rest(use))
            name = use + (f"_chunk_{chunk}" if chunk else "") + (f"_remat_{remat}" if remat else "")
            jobs.append((name, use, pool.submit(_timed, lowered.compile)))
        for name, use, job in jobs:
            try:
                yield Variant(name, use, *job.result())
            except jax.errors.JaxRuntimeError as error:
                timing.say(f"{name} left out: {str(error).splitlines()[0][:200]}")


def _timed(compile_: Callable) -> tuple[Any, float]:
    began = time.perf_counter()
    return compile_(), time.perf_counter() - began


def first_steps(setup: Setup, variants: Sequence[Variant]) -> dict[str, float]:
    """Return the loss of each variant's first step, and emit its memory: as compiled, and as the device saw it.

    From the smallest to the largest, since a device tells only of the most it ever held; what lies there for other
    variants is subtracted.
    """
    losses = {}
    for variant in sorted(variants, key=_planned):
        before = _stats()
        try:
            state, metrics = variant.program(setup.state(KINDS[variant.use]), *setup.rest(variant.use))
            losses[variant.name] = float(metrics["loss"])
        except jax.errors.JaxRuntimeError as error:
            timing.say(f"{variant.name} does not run: {str(error).splitlines()[0][:200]}")
            continue
        del state, metrics
        after = _stats()
        own = sum(x.nbytes for x in jax.tree.leaves(setup.rest(variant.use)))
        grew = after["peak_bytes_in_use"] > before["peak_bytes_in_use"]
        peak = (after["peak_bytes_in_use"] - after["bytes_in_use"] + own) / 1e9 if grew else None
        memory = functools.partial(timing.emit, target=None, better="lower", unit="GB")
        memory(f"accelerator.{variant.name}_memory_compiled", _planned(variant) / 1e9)
        memory(f"accelerator.{variant.name}_memory_peak", peak)
        timing.say(
            f"{variant.name}: first loss {losses[variant.name]:.5f}, compiled in {variant.compile_seconds:.1f} s, "
            f"{_planned(variant) / 1e9:.2f} GB as compiled, {'?' if peak is None else f'{peak:.2f}'} at the peak"
        )
        gc.collect()
    for name, value in losses.items():
        use = next(variant.use for variant in variants if variant.name == name)
        other = next((losses[v.name] for v in variants if v.use == LIKE.get(use, use) and v.name in losses), value)
        if not abs(value - other) <= TOLERANCE * abs(other):
            raise SystemExit(f"{name}: the first loss is {value}, expected {other} within {TOLERANCE:.0e} of it")
    return losses


def _planned(variant: Variant) -> int:
    stats = variant.program.memory_analysis()
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + stats.temp_size_in_bytes + new


def _stats() -> dict[str, int]:
    return jax.devices()[0].memory_stats() or {"bytes_in_use": 0, "peak_bytes_in_use": 0}


def calls(setup: Setup, variants: Sequence[Variant]) -> dict[str, Callable[[], None]]:
    """Return {name: take one step}; variants that train the same take turns on one state."""
    states = {}
    for kind in dict.fromkeys(KINDS[variant.use] for variant in variants):
        states[kind] = setup.state(kind)

    def run(variant: Variant) -> None:
        kind = KINDS[variant.use]
        states[kind], metrics = variant.program(states[kind], *setup.rest(variant.use))
        jax.block_until_ready((states[kind], metrics))

    return {variant.name: functools.partial(run, variant) for variant in variants}


def report(setup: Setup, variants: Sequence[Variant], times: Mapping[str, list[float]], reference: str) -> None:
    """Emit seconds, tokens/s and MFU of every variant, and its ratio to SFT beside the predicted one."""
    tokens, T = setup.batch["tokens"].size, setup.batch["tokens"].shape[1]
    cost = flops.forward(setup.model, T)
    peak = hardware.peak_flops(jax.devices()[0])
    predicted = {use: flops.step([(cost, each) for each in USES[use]]) for use in USES}
    for variant in variants:
        seconds = timing.spread(times[variant.name])
        ratio = timing.ratio(times, variant.name, reference)
        expected = predicted[variant.use] / predicted["sft"]
        mfu = None if peak is None else predicted[variant.use] * tokens / seconds.median / peak
        figure = functools.partial(timing.emit, target=None)
        name = f"accelerator.{variant.name}"
        figure(f"{name}_seconds", seconds.median, better="lower", unit="s")
        figure(f"{name}_tokens_per_s", tokens / seconds.median, better="higher", unit="tokens/s")
        figure(f"{name}_mfu", mfu, better="higher", unit="share of the peak")
        figure(f"{name}_ratio", ratio.median, better="lower", unit="ratio")
        figure(f"{name}_ratio_predicted", expected, better="lower", unit="ratio")
        timing.say(
            f"{variant.name:<22} {seconds} s, {tokens / seconds.median:9,.0f} tokens/s, "
            f"MFU {'-' if mfu is None else f'{mfu:.1%}'}, {ratio} of {reference}, predicted {expected:.3f}"
        )


def profile(directory: Path, name: str, run: Callable[[], None], most: int = 25) -> None:
    """Print which kernels one step spends its time in, of one that was traced."""
    run()
    with jax.profiler.trace(str(directory / name)):
        run()
    (file,) = (directory / name).rglob("*.xplane.pb")
    spent: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if plane.name.startswith("/device:"):
            for line in plane.lines:
                for event in line.events:
                    spent[event.name] += event.duration_ns
    timing.say(f"{name}: {spent.total() / 1e6:.1f} ms in kernels")
    for kernel, ns in spent.most_common(most):
        timing.say(f"  {ns / 1e6:8.2f} ms  {kernel[:120]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, default="qwen3_0_6b", help="default qwen3_0_6b")
    parser.add_argument("--layers", type=int, help="default: the shape's")
    parser.add_argument("--rows", type=int, default=4, help="default 4")
    parser.add_argument("--seq", type=int, default=4096, help="default 4096")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none", help="default none")
    parser.add_argument("--attention", help="backend; default: the device's own")
    parser.add_argument("--variants", nargs="+", choices=USES, default=list(USES), help="default: all")
    parser.add_argument("--chunks", nargs="+", type=int, default=[], help="also sft and resident with these chunks")
    parser.add_argument("--remats", nargs="+", default=[], help="also sft and resident with these")
    parser.add_argument("--rounds", type=int, default=15, help="default 15")
    parser.add_argument("--profile", type=Path, help="directory for traces")
    args = parser.parse_args()
    timing.say(timing.one_line(timing.machine()))
    setup = Setup(args)
    both = [use for use in ("sft", "resident") if use in args.variants]
    wanted = [(use, None, None) for use in args.variants]
    wanted += [(use, chunk, None) for chunk in args.chunks for use in both]
    wanted += [(use, None, remat) for remat in args.remats for use in both]
    variants = list(compiled(setup, wanted))
    timing.say(f"compiled {len(variants)} programs")
    losses = first_steps(setup, variants)
    variants = [variant for variant in variants if variant.name in losses]
    steps = calls(setup, variants)
    times = timing.interleaved(steps, args.rounds, warmup=1)
    report(setup, variants, times, "sft" if "sft" in times else variants[0].name)
    if args.profile:
        for name in args.variants:
            if name in steps:
                profile(args.profile, name, steps[name])


if __name__ == "__main__":
    main()
