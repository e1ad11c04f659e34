"""What a step will need on hardware that is not there: the real step, compiled ahead of time, and read.

    devices = topologies.devices("v5p:4x4x4")
    recipe = plan.recipe("config.json", devices, ["mesh.tensor=4"])
    found = plan.measure(recipe, "joint", "v5p:4x4x4", devices)

No weights are read and nothing runs: a config.json is all of a model that is needed.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from wmss_jax import attention, config, hardware, hlo, programs, sharding


class Plan(NamedTuple):
    """What the compiled step says of itself; bytes and seconds are those of one device and one step.

    Attributes:
        memory: bytes by what they hold: parameters, optimizer, frozen (the weak agent, or LoRA's base), batch,
            temporaries, and results that are no argument's memory used again.
        capacity: bytes that the device has.
        seconds: by what takes them at the hardware's best: "compute", "memory" (arguments and results through the
            device's memory once) and "network"; a step takes at least the largest.
        collectives: bytes that a device sends, {kind: {"in_loops", "outside"}}.
        largest: the program's largest arrays.
    """

    topology: str
    step: str
    device_kind: str
    devices: int
    mesh: Mapping[str, int]
    rows: int
    micro_batches: int
    seq_len: int
    remat: str
    attention: str
    memory: Mapping[str, int]
    capacity: int
    flops_per_token: float
    seconds: Mapping[str, float]
    collectives: Mapping[str, Mapping[str, float]]
    largest: Sequence[hlo.Buffer]
    compile_seconds: float

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a device holds all of it; the runtime's own share (2 %) is left to it."""
        return self.total <= 0.98 * self.capacity

    @property
    def step_seconds(self) -> float:
        """The least time of a step: that of what takes longest, all else behind it."""
        return max(self.seconds.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second over all devices, at most."""
        return self.rows * self.seq_len / self.step_seconds

    def text(self) -> str:
        """Return it all for reading."""
        gb = lambda size: f"{size / 1e9:9.3f}"
        mesh = " × ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        slowest = max(self.seconds, key=self.seconds.__getitem__)
        lines = [
            f"{self.step} step on {self.topology}: {self.devices} × {self.device_kind}, mesh {mesh}",
            f"{self.rows} rows of {self.seq_len} tokens in {self.micro_batches} micro-batches; remat {self.remat}, "
            f"attention {self.attention}; compiled in {self.compile_seconds:.0f} s",
            "memory of a device, GB",
            *(f"  {kind:<18}{gb(size)}" for kind, size in self.memory.items()),
            f"  {'total':<18}{gb(self.total)} of {self.capacity / 1e9:.1f}: {'fits' if self.fits else 'DOES NOT FIT'}",
            f"{self.flops_per_token / 1e9:.1f} GFLOP a token; a step takes {self.step_seconds:.3f} s at least "
            f"({', '.join(f'{name} {seconds:.3f}' for name, seconds in self.seconds.items())}): "
            f"{self.tokens_per_s:,.0f} tokens/s at most, by {slowest}",
            "sent by a device in a step, GB      in loops   outside",
            *(f"  {kind:<30}{gb(sent['in_loops'])} {gb(sent['outside'])}" for kind, sent in self.collectives.items()),
        ]
        if not self.fits:
            lines += ["largest arrays, GB", *(f"  {gb(b.bytes)} {b.shape}  {b.source}" for b in self.largest)]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        largest = [buffer._asdict() for buffer in self.largest]
        more = {"total": self.total, "fits": self.fits, "step_seconds": self.step_seconds}
        return {**self._asdict(), "largest": largest, **more, "tokens_per_s": self.tokens_per_s}


def recipe(path: str | os.PathLike, devices: Sequence[jax.Device], overrides: Sequence[str] = ()) -> config.RunConfig:
    """Return the recipe to plan for: a YAML file's, or the defaults for a model's config.json (or its directory).

    The latter has one row of 4,096 tokens a micro-batch and group of devices, unless `overrides` say otherwise.
    """
    given = Path(path)
    if given.suffix != ".json" and not given.is_dir():
        return config.load(given, overrides)
    settings = given / "config.json" if given.is_dir() else given
    bare = {"work_dir": "runs/plan", "model": {"config": str(settings)}, "dataset": {"train": "none.jsonl"}}
    loaded = config.load(bare, overrides)
    if any(override.startswith("dataset.batch_size=") for override in overrides):
        return loaded
    rows = sharding.batch_shards(mesh_of(loaded, devices)) * loaded.train.micro_batches
    return loaded.model_copy(update={"dataset": loaded.dataset.model_copy(update={"batch_size": rows})})


def mesh_of(recipe: config.RunConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Return the recipe's mesh over these devices."""
    return sharding.make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor, devices)


def measure(recipe: config.RunConfig, name: programs.Step, topology: str, devices: Sequence[jax.Device]) -> Plan:
    """Return what one step of the recipe needs on these devices, having compiled it for them.

    Raises:
        ValueError: the mesh does not divide the batch, the model or the devices.
        OutOfMemory: the compiler gave up; the message has what it said of the largest arrays.
    """
    mesh = mesh_of(recipe, devices)
    program = programs.of(recipe, name, mesh)
    compiled, seconds = _compile(program)
    text, stats = compiled.as_text(), compiled.memory_analysis()
    used = {kind: _bytes_per_device(tree) for kind, tree in program.arguments.items()}
    # Arrays lie in tiles, so that arguments may take more than their elements do.
    used["padding of these"] = max(0, stats.argument_size_in_bytes - sum(used.values()))
    used["temporaries"] = stats.temp_size_in_bytes
    used["results"] = stats.output_size_in_bytes - stats.alias_size_in_bytes
    kind = devices[0].device_kind
    facts = hardware.facts(kind)
    assert facts is not None, kind
    found = hlo.collectives(text)
    return Plan(
        topology=topology, step=name, device_kind=kind, devices=len(devices), mesh=dict(mesh.shape),
        rows=program.rows, micro_batches=recipe.train.micro_batches, seq_len=program.seq_len,
        remat=recipe.model.remat, attention=attention.backend_on(devices[0], recipe.model.attention),
        memory=used, capacity=int(facts.memory), flops_per_token=program.flops,
        seconds={
            "compute": program.flops * program.rows * program.seq_len / len(devices) / facts.bf16_flops,
            "memory": (stats.argument_size_in_bytes + stats.output_size_in_bytes) / facts.bandwidth,
            "network": sum(one.sent / _rate(one, devices, facts) for one in found),
        },
        collectives=hlo.by_kind(found), largest=hlo.largest_buffers(text), compile_seconds=seconds,
    )  # fmt: skip


class OutOfMemory(ValueError):
    """The compiler found no way to fit the program; the message is its own, largest arrays first."""


def _compile(program: programs.Program) -> tuple[Any, float]:
    lowered = program.function.lower(*program.call)
    began = time.monotonic()
    try:
        return lowered.compile(), time.monotonic() - began
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(str(error)) from error


def _rate(one: hlo.Collective, devices: Sequence[jax.Device], facts: hardware.Accelerator) -> float:
    """Return the bytes/s at which the devices of a collective talk: within a host of GPUs faster than between them."""
    hosts = {devices[number].process_index for number in one.members or range(len(devices))}
    return facts.link if facts.network is None or len(hosts) == 1 else facts.network


def _bytes_per_device(tree: PyTree) -> int:
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
