"""What a step will need on hardware that is not there: the real step, compiled ahead of time, and read.

    devices = topologies.devices("v5p:4x4x4")
    recipe = plan.recipe("config.json", devices, ["mesh.tensor=4"])
    found = plan.measure(recipe, "joint", "v5p:4x4x4", devices)

No weights are read and nothing runs: a config.json is all of a model that is needed.
"""

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from wmss_jax import attention, config, hardware, hlo, programs, sharding, yamlfile

# As a TPU's compiler lists them where all but the last of the program fits.
_ALLOCATION = re.compile(r'Size: ([\d.]+)([KMGT]?)B?\s+(?:Operator: op_name="([^"]*)".*\s+)?Shape: (\w+\[[\d,]*\])')


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
            lines += _listed(self.largest)
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        largest = [buffer._asdict() for buffer in self.largest]
        more = {"total": self.total, "fits": self.fits, "step_seconds": self.step_seconds}
        return {**self._asdict(), "largest": largest, **more, "tokens_per_s": self.tokens_per_s}


class Compiled(NamedTuple):
    """A step compiled and not yet read: its HLO text, what XLA says of its memory, seconds that compiling took."""

    program: programs.Program
    mesh: Mesh
    text: str
    stats: Any
    seconds: float


def recipe(path: str | os.PathLike, devices: Sequence[jax.Device], overrides: Sequence[str] = ()) -> config.RunConfig:
    """Return the recipe to plan for: a YAML file's, or the defaults for a model's config.json (or its directory).

    The latter has one row of 4,096 tokens a micro-batch and group of devices, unless `overrides` say otherwise.
    """
    given = Path(path)
    if given.suffix != ".json" and not given.is_dir():
        return config.load(given, overrides)
    settings = given / "config.json" if given.is_dir() else given
    bare: dict[str, Any] = {"work_dir": "runs/plan", "model": {"config": str(settings)}}
    bare["dataset"] = {"train": "none.jsonl"}
    wanted, _ = yamlfile.read(bare, overrides)
    if "batch_size" not in wanted["dataset"]:
        bare["dataset"]["batch_size"] = wanted.get("train", {}).get("micro_batches", 1)  # a multiple of it, for now
    loaded = config.load(bare, overrides)
    if "batch_size" in wanted["dataset"]:
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
        OutOfMemory: the compiler gave up; the message has its reason and the largest arrays.
    """
    return read(compiled(recipe, name, devices), recipe, name, topology, devices)


def compiled(recipe: config.RunConfig, name: programs.Step, devices: Sequence[jax.Device]) -> Compiled:
    """Return one step of the recipe compiled for these devices; raises as `measure` does."""
    mesh = mesh_of(recipe, devices)
    program = programs.of(recipe, name, mesh)
    executable, seconds = _compile(program)
    return Compiled(program, mesh, executable.as_text(), executable.memory_analysis(), seconds)


def read(
    step: Compiled, recipe: config.RunConfig, name: programs.Step, topology: str, devices: Sequence[jax.Device]
) -> Plan:
    """Return what a compiled step says of itself."""
    program, mesh, text, stats, seconds = step
    used = {kind: _bytes_per_device(tree) for kind, tree in program.arguments.items()}
    # Arrays lie in tiles, so that arguments may take more than their elements do.
    used["padding of these"] = max(0, stats.argument_size_in_bytes - sum(used.values()))
    used["temporaries"] = stats.temp_size_in_bytes
    used["results"] = stats.output_size_in_bytes - stats.alias_size_in_bytes
    kind = devices[0].device_kind
    facts = hardware.facts(kind)
    assert facts is not None, kind
    # Members of a collective are numbered along the mesh.
    found, placed = hlo.collectives(text), mesh.devices.flatten().tolist()
    return Plan(
        topology=topology, step=name, device_kind=kind, devices=len(devices), mesh=dict(mesh.shape),
        rows=program.rows, micro_batches=recipe.train.micro_batches, seq_len=program.seq_len,
        remat=recipe.model.remat, attention=attention.backend_on(devices[0], recipe.model.attention),
        memory=used, capacity=int(facts.memory), flops_per_token=program.flops,
        seconds={
            "compute": program.flops * program.rows * program.seq_len / len(devices) / facts.bf16_flops,
            "memory": (stats.argument_size_in_bytes + stats.output_size_in_bytes) / facts.bandwidth,
            "network": sum(one.sent / _rate(one, placed, facts) for one in found),
        },
        collectives=hlo.by_kind(found), largest=hlo.largest_buffers(text), compile_seconds=seconds,
    )  # fmt: skip


class OutOfMemory(ValueError):
    """The compiler found no way to fit the program; the message has its reason and the largest arrays."""


def _compile(program: programs.Program) -> tuple[Any, float]:
    lowered = program.function.lower(*program.call)
    began = time.monotonic()
    try:
        return lowered.compile(), time.monotonic() - began
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(_what_does_not_fit(str(error), program)) from error


def _what_does_not_fit(said: str, program: programs.Program) -> str:
    """Return the compiler's reason and the allocations it names, or else the largest of what the step is given."""
    reason = re.search(r"(?i)ran out of memory.*?(?=\. |\.?\n|\.?$)", said)
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    named = _ALLOCATION.findall(said)
    arrays = [hlo.Buffer(int(float(size) * units[unit]), shape, source) for size, unit, source, shape in named]
    for path, leaf in jax.tree_util.tree_leaves_with_path({} if named else dict(program.arguments)):
        shape = f"{leaf.dtype}{list(leaf.sharding.shard_shape(leaf.shape))}"
        source = jax.tree_util.keystr(path, simple=True, separator=".")
        arrays.append(hlo.Buffer(_bytes_per_device(leaf), shape, source))
    largest = sorted(arrays, key=lambda array: -array.bytes)[:5]
    return "\n".join([f"does not fit: {reason.group() if reason else said.splitlines()[0]}", *_listed(largest)])


def _listed(arrays: Sequence[hlo.Buffer]) -> list[str]:
    return ["largest arrays, GB", *(f"  {array.bytes / 1e9:9.3f} {array.shape}  {array.source}" for array in arrays)]


def _rate(one: hlo.Collective, devices: Sequence[jax.Device], facts: hardware.Accelerator) -> float:
    """Return the bytes/s at which the devices of a collective talk: within a host of GPUs faster than between them."""
    hosts = {devices[number].process_index for number in one.members or range(len(devices))}
    return facts.link if facts.network is None or len(hosts) == 1 else facts.network


def _bytes_per_device(tree: PyTree) -> int:
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
