"""Whether a step's memory follows the cost model: nothing grows with T·V, and a cached weak agent adds next to nothing.

    python -m benchmarks.memory [--compute-dtype bfloat16]

Nothing is run: steps are compiled for simulated devices, one row of T tokens on each, and XLA says what temporary
memory a device needs. AdamW on float32 parameters, weak and base parameters in bfloat16, layers rematerialised. The
mesh has 8 devices on its fsdp axis, so that of what is sharded over it little is left on a device: the cost model
speaks of what is whole on every one. In float32 the gathered heads are twice as large as that model has them.
"""

import argparse
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import wmss_jax as wmss
from benchmarks import timing
from wmss_jax import head, sharding, train_state
from wmss_jax.models import CausalLM, qwen3
from wmss_jax.models.lora import Lora
from wmss_jax.objectives import LogitMix, Sft

WIDTH = 256
TOKENS = (512, 2048)  # of a device
VOCABS = (32768, 65536, 131072)
VARIANTS = ("sft", "resident", "cached", "trained", "lora")
LORA = Lora(rank=8, alpha=16.0)
FSDP = 8
MIB = 2**20


def _model(V: int, compute_dtype: str, lora: Lora | None = None) -> CausalLM:
    config = qwen3.Config(
        vocab_size=V, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_layers=4, num_heads=4, num_kv_heads=2,
        head_dim=64, rope_theta=1e6, norm_eps=1e-6, tied=False, max_positions=max(TOKENS),
    )  # fmt: skip
    return CausalLM("qwen3", config, compute_dtype=compute_dtype, remat="full", lora=lora)


def _mesh(tensor: int) -> Mesh:
    return wmss.make_mesh(1, FSDP, tensor, devices=jax.devices()[: FSDP * tensor])


@functools.cache
def compiled(variant: str, T: int, V: int, chunk: int | None, compute_dtype: str, mesh: Mesh | None) -> Any:
    """Return the compiled training step of a variant."""
    timing.say(f"{variant}, T {T}, V {V}, chunk {chunk or 'default'}, {'one device' if mesh is None else mesh.shape}")
    model, adapted = _model(V, compute_dtype), _model(V, compute_dtype, LORA)
    strong, weak = model.abstract("float32", mesh), model.abstract("bfloat16", mesh)
    B = sharding.batch_shards(mesh)
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((B, T, *shape), dtype)
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions", "example_index"), rows(jnp.int32))
    batch |= {"loss_weights": rows(jnp.float32)}
    trained, frozen, models, objective = {"strong": strong}, {}, model, LogitMix()
    if variant == "sft":
        objective = Sft()
    elif variant == "resident":
        frozen = {"weak": weak}
    elif variant == "cached":
        frozen, batch = {"weak": {"unembed": weak["unembed"]}}, {**batch, "weak_hidden": rows(jnp.bfloat16, WIDTH)}
    elif variant == "trained":
        trained = {"strong": strong, "weak": strong}
    else:
        trained, frozen = {"strong": adapted.abstract("float32", mesh)}, {"base": weak}
        models = {"strong": adapted, "weak": model}
    tx = optax.adamw(1e-4)
    train_step = wmss.make_train_step(models, objective, tx, mesh=mesh, chunk_tokens=chunk)
    return train_step.lower(train_state.abstract_state(trained, tx), frozen, batch).compile()


def largest_logits_buffer(hlo: str, V: int, mesh: Mesh | None) -> int:
    """Return the elements of the largest array in a compiled program that is not a head matrix, whole or a shard."""
    shards = {1} if mesh is None else {1, FSDP, mesh.shape["tensor"]}
    heads = {frozenset({WIDTH // d, V // v}) for d in shards for v in shards}
    found = re.findall(r"\w\[([\d,]*)\]", hlo)
    arrays = {tuple(int(n) for n in dims.split(",") if n not in ("", "1")) for dims in found}
    return max(math.prod(dims) for dims in arrays if frozenset(dims) not in heads)


def report_cached(sizes: Mapping[tuple[str, int, int], int], eighth: Mapping[tuple[str, int, int], int]) -> None:
    """Emit what a cached weak agent needs, as a ratio to SFT."""
    # Both share CPU_CHUNK_BYTES out among the roles' logits. Where those of SFT do not fill them, two roles have two
    # tiles in place of one, and less than that in all: the ratio says little there. With the chunk given in tokens a
    # second role always has a tile more.
    ratios = {(T, V): sizes["cached", T, V] / sizes["sft", T, V] for T in TOKENS for V in VOCABS}
    filled = [ratio for (T, V), ratio in ratios.items() if 4 * T * V >= head.CPU_CHUNK_BYTES]
    same = [eighth["cached", T, V] / eighth["sft", T, V] for T in TOKENS for V in VOCABS]
    figure = functools.partial(timing.emit, better="lower", unit="ratio")
    figure("memory.cached_vs_sft.default_chunk", max(ratios.values()), target=1.05)
    figure("memory.cached_vs_sft.default_chunk_filled", max(filled), target=1.05)
    figure("memory.cached_vs_sft.chunk_an_eighth_of_T", max(same), target=None)
    timing.say("cached / SFT: " + ", ".join(f"T {T} V {V} {ratio:.3f}" for (T, V), ratio in ratios.items()))


def report_doubling(compute_dtype: str, tensor: int, T: int = 4096) -> None:
    """Emit how temporaries grow when V doubles, as a share of the allowance: D·V/tensor × (2·roles + 4) bytes + 10 %.

    The default chunk, at a T where the smaller V fills it already: twice the vocabulary is then in half the chunk, and
    what grows is the head alone: gathered in 2 bytes for every role, and 4 of the gradient of the trained one.
    """
    mesh = _mesh(tensor)
    small, large = VOCABS[-2:]
    for variant, roles in {"sft": 1, "resident": 2, "cached": 2, "lora": 2, "trained": 2}.items():
        first, second = (bytes_of(compiled(variant, T, V, None, compute_dtype, mesh)) for V in (small, large))
        allowance = 1.1 * WIDTH * (large - small) / tensor * (2 * roles + 4)
        # A trained weak role has a gradient of its own, which the allowance does not have.
        target = None if variant == "trained" else 1.0
        name = f"memory.doubling_V.{variant}.fsdp_{FSDP}_tensor_{tensor}"
        timing.emit(name, (second - first) / allowance, target=target, better="lower", unit="ratio")


def bytes_of(program: Any) -> int:
    """Return the temporary memory of a compiled program on one device."""
    return program.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    dtypes = ("bfloat16", "float32")
    parser.add_argument("--compute-dtype", choices=dtypes, default="bfloat16", help="default bfloat16")
    dtype = parser.parse_args().compute_dtype
    jax.config.update("jax_num_cpu_devices", 2 * FSDP)
    timing.say(timing.one_line(timing.machine()))

    mesh = _mesh(1)
    size = lambda variant, T, V, chunk: bytes_of(compiled(variant, T, V, chunk, dtype, mesh))
    grid = [(T, V) for T in TOKENS for V in VOCABS]
    sizes = {(variant, T, V): size(variant, T, V, None) for variant in ("sft", "cached") for T, V in grid}
    sizes |= {(variant, *grid[-1]): size(variant, *grid[-1], None) for variant in VARIANTS}
    eighth = {(variant, T, V): size(variant, T, V, T // 8) for variant in ("sft", "cached") for T, V in grid}
    report_cached(sizes, eighth)
    for tensor in (1, 2):
        report_doubling(dtype, tensor)

    T, V = 1024, 65536  # T and T/8 differ from D and its shards
    for where, mesh in {"one_device": None, "fsdp_8_tensor_2": _mesh(2)}.items():
        logits = T * V // (1 if mesh is None else mesh.shape["tensor"])
        programs = [compiled(variant, T, V, T // 8, dtype, mesh) for variant in VARIANTS]
        share = max(largest_logits_buffer(program.as_text(), V, mesh) for program in programs) / logits
        timing.emit(f"memory.largest_logits_buffer.{where}", share, target=0.25, better="lower", unit="share of T·V")

    for (variant, T, V), temporaries in sizes.items():
        timing.say(f"{variant}, T {T}, V {V}: {temporaries / MIB:.1f} MiB of temporaries")
        if grid[-1] == (T, V):
            name = f"memory.temporaries.{variant}.T_{T}_V_{V}"
            timing.emit(name, temporaries / MIB, target=None, better="lower", unit="MiB")


if __name__ == "__main__":
    main()
