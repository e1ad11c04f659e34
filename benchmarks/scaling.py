"""Whether a step's memory and traffic stay what they are when chips are added, and how they grow with T.

    python -m benchmarks.scaling [--layers N | --quick]

Nothing is run: the joint step of Qwen3-8B, weak agent resident, layers rematerialised, one row of T tokens a group of
devices, is compiled ahead of time for slices of 64, 256 and 1,024 v5p chips: fsdp 16 × tensor 4, the rest on data.
What a device holds and sends is read off the compiled program. Needs the extra `plan-tpu`; a compile takes minutes.
"""

import argparse
import functools
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks import timing
from wmss_jax import hlo, plan, topologies

MODEL = Path(__file__).parents[1] / "configs" / "models" / "qwen3_8b.json"
MICRO_BATCHES = 4
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")


class Grid(NamedTuple):
    """What is compiled: every slice at the first T, the other Ts on the first slice, micro-batches on the second."""

    slices: Sequence[str]
    tokens: Sequence[int]
    fsdp: int
    tensor: int
    changes: Mapping[str, Any]  # to the model's config.json


FULL = Grid(("v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16"), (4096, 8192, 32768), fsdp=16, tensor=4, changes={})
# The vocabulary's size, whole or divided, is no other size's.
TINY = {
    "num_hidden_layers": 2, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1324,
}  # fmt: skip
QUICK = Grid(("v5e:2x2", "v5e:4x4"), (256,), fsdp=2, tensor=2, changes=TINY)


class Point(NamedTuple):
    """A compiled step: its plan, and of its collectives what a plan does not keep.

    Attributes:
        gradient_sums: elements that a device has summed over `data` in a step, per element of its parameters.
        over_data: how many collectives inside loops span `data`.
        of_vocabulary: how many collectives inside loops send an array with an axis of the vocabulary's size.
    """

    plan: plan.Plan
    gradient_sums: float
    over_data: int
    of_vocabulary: int


def point(grid: Grid, model: Path, topology: str, T: int, micro_batches: int = 1) -> Point:
    """Return what one step needs on a slice, `data` being what fsdp and tensor leave of it."""
    devices = topologies.devices(topology)
    data = len(devices) // (grid.fsdp * grid.tensor)
    mesh = [f"mesh.data={data}", f"mesh.fsdp={grid.fsdp}", f"mesh.tensor={grid.tensor}"]
    rest = [f"dataset.seq_len={T}", f"train.micro_batches={micro_batches}", "model.remat=full"]
    recipe = plan.recipe(model, devices, [*mesh, *rest])
    step = plan.compiled(recipe, "joint", devices)
    found = plan.read(step, recipe, "joint", topology, devices)
    timing.say(found.text())

    collectives = hlo.collectives(step.text)
    over_data = [one for one in collectives if "data" in axes(one, step.mesh)]
    in_loops = [one for one in collectives if one.depth]
    sizes = vocabulary_sizes(step.program.model.sizes["V"], step.mesh)
    of_vocabulary = [one for one in in_loops if sizes & {size for shape in one.shapes for size in shape}]
    for one in dict.fromkeys([*over_data, *of_vocabulary]):
        over = " × ".join(axes(one, step.mesh))
        timing.say(f"  {one.kind} over {over}, {one.times} times {one.bytes:,} bytes {one.shapes}: {one.source}")
    summed = sum(one.times * math.prod(shape) for one in over_data for shape in one.shapes)
    params = jax.tree.leaves(step.program.arguments["parameters"])
    kept = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in params)
    return Point(found, summed / kept, len([one for one in over_data if one.depth]), len(of_vocabulary))


def axes(one: hlo.Collective, mesh: Mesh) -> tuple[str, ...]:
    """Return the mesh axes along which a collective's devices differ; their numbers are places in the mesh."""
    places = np.unravel_index(np.asarray(one.members or range(mesh.size)), tuple(mesh.shape.values()))
    return tuple(axis for axis, numbers in zip(mesh.shape, places, strict=True) if len(np.unique(numbers)) > 1)


def vocabulary_sizes(V: int, mesh: Mesh) -> set[int]:
    """Return V and all that may be left of it on a device: split over any of the mesh's axes."""
    splits = {1}
    for size in mesh.shape.values():
        splits |= {size * split for split in splits}
    return {V // split for split in splits if V % split == 0}


def report_point(found: plan.Plan) -> None:
    """Emit what a device holds and sends, and the least seconds of a step."""
    emit = functools.partial(timing.emit, target=None, better="lower")
    where = f"{found.devices}_chips.T_{found.seq_len}"
    held = {"temporaries": found.memory["temporaries"], "total": found.total}
    held = {"arguments": found.total - found.memory["temporaries"] - found.memory["results"], **held}
    for name, size in held.items():
        emit(f"scaling.{name}.{where}", size / 1e9, unit="GB")
    tokens = found.rows * found.seq_len / (found.mesh["data"] * found.mesh["fsdp"])  # of a group of devices
    for place in ("in_loops", "outside"):
        sent = sum(by_place[place] for by_place in found.collectives.values())
        emit(f"scaling.sent_per_token.{place}.{where}", sent / tokens, unit="bytes")
    for name in ("compute", "network"):
        emit(f"scaling.{name}_seconds.{where}", found.seconds[name], unit="s")


def report(points: Sequence[Point], accumulated: Point) -> None:
    """Emit what is asked of all slices and all T, and of a step that accumulates over micro-batches."""
    emit = functools.partial(timing.emit, better="lower")
    first, last = points[0].plan, max((each.plan for each in points), key=lambda each: each.devices)
    emit(f"scaling.memory_{last.devices}_over_{first.devices}", last.total / first.total, target=1.02, unit="ratio")
    for name, some in {"": points, f".micro_batches_{MICRO_BATCHES}": [accumulated]}.items():
        worst = lambda field, some=some: max(getattr(each, field) for each in some)
        emit(f"scaling.gradient_sums_per_step{name}", worst("gradient_sums"), target=1.01, unit="times")
        emit(f"scaling.over_data_in_loops{name}", worst("over_data"), target=None, unit="instructions")
        # The loop over micro-batches is one, too: what the head sends once for each of them is inside it.
        target = None if name else 0
        emit(f"scaling.vocabulary_in_loops{name}", worst("of_vocabulary"), target=target, unit="instructions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--layers", type=int, help="so many layers; default: all of the model's")
    sizes.add_argument("--quick", action="store_true", help="a tiny model on 4 and 16 chips, to try the program")
    args = parser.parse_args()
    grid = QUICK if args.quick else FULL
    if args.layers is not None:
        grid = grid._replace(changes={"num_hidden_layers": args.layers})
    timing.say(timing.one_line(timing.versions(PACKAGES)))
    where = [(name, grid.tokens[0]) for name in grid.slices] + [(grid.slices[0], T) for T in grid.tokens[1:]]
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "config.json"
        model.write_text(json.dumps(json.loads(MODEL.read_text()) | grid.changes))
        points = []
        for topology, T in where:
            points.append(point(grid, model, topology, T))
            report_point(points[-1].plan)
        accumulated = point(grid, model, grid.slices[1], grid.tokens[0], MICRO_BATCHES)
    report(points, accumulated)


if __name__ == "__main__":
    main()
