"""Where arrays live: one mesh with named axes, and one table from shape letters to mesh axes.

Every parameter and activation is described by its shape letters (the table in models/layers.py), "L D N H" for
the query projections of all layers. The letters alone decide the sharding, so a new strategy is a change of
these two tables and of nothing else.
"""

import collections
import contextlib
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # a batch is split over both; parameters over fsdp only

# FSDP splits the model width of every matrix; tensor parallelism splits heads, MLP width and vocabulary.
PARAM_AXES = {
    "L": None, "D": "fsdp", "N": "tensor", "K": "tensor", "H": None, "F": "tensor", "V": "tensor", "R": None,
    "E": None, "J": "tensor", "C": None,
}  # fmt: skip
# Activations split their batch over the devices that share a batch; the width stays whole.
ACTIVATION_AXES = {
    "B": BATCH_AXES, "T": None, "D": None, "N": "tensor", "K": "tensor", "H": None, "F": "tensor", "V": "tensor",
    "L": None, "S": None, "E": None, "R": None,
}  # fmt: skip

LETTER_NAMES = {
    "D": "the model width", "N": "the number of heads", "K": "the number of kv heads", "F": "the MLP width",
    "V": "the vocabulary", "H": "the head size", "L": "the number of layers", "R": "the rank",
    "E": "the number of experts", "J": "the number of query, key and value heads", "C": "the parts of a matrix",
}  # fmt: skip


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh `data × fsdp × tensor` over `devices` (default: all); one axis may be -1, "the rest".

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh axes must be >= 1, at most one of them -1; got {dict(zip(AXES, sizes, strict=True))}")
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh data={data} × fsdp={fsdp} × tensor={tensor} does not cover {len(devices)} devices; "
            f"the axes must multiply to {len(devices)}"
        )
    # Auto, not the default Explicit: under Explicit a gather from an FSDP-sharded embedding is an error.
    return Mesh(arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def arranged(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Return the devices in the shape of a mesh, those that are close to each other along its last axes.

    Slices, between which there is only the slower network of the data centre (DCN), are split off from the outermost
    axis: a mesh 2 × 16 × 4 on two slices keeps fsdp and tensor within a slice, 1 × 32 × 4 keeps tensor.

    Raises:
        ValueError: the slices differ in size, or the axes do not split over them.
    """
    slices = collections.Counter(getattr(device, "slice_index", None) for device in devices)
    left, over = len(slices), []
    for size in sizes:
        over.append(math.gcd(size, left))
        left //= over[-1]
    if left > 1 or len(set(slices.values())) > 1:
        raise ValueError(
            f"mesh {' × '.join(map(str, sizes))} does not split over {len(slices)} slices of "
            f"{', '.join(map(str, sorted(set(slices.values()))))} devices; make mesh.data a multiple of {len(slices)}"
        )
    # Where no mesh axis fits one of a TPU's (16 × 4 on 4 × 4 × 4 chips), parts of them are combined.
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    within = [size // n for size, n in zip(sizes, over, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(within, over, devices, allow_split_physical_axes=True)


def use(mesh: Mesh | None):
    """Return a context in which `constrain` sees `mesh`; entered while a step is traced."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def batch_shards(mesh: Mesh | None) -> int:
    """Return over how many groups of devices the rows of a batch are split."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def spec(letters: str, table: Mapping[str, str | tuple[str, ...] | None]) -> P:
    """Return the PartitionSpec of an array whose axes are `letters`, such as "L D N H"."""
    missing = [letter for letter in letters.split() if letter not in table]
    if missing:
        raise ValueError(f"no sharding rule for axis {missing[0]!r} of {letters!r}; add a row to sharding.py")
    return P(*(table[letter] for letter in letters.split()))


def param_sharding(letters: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Return the sharding of one parameter, or say which mesh axis does not divide it.

    Raises:
        ValueError: a mesh axis does not divide its dimension.
    """
    axes = [axis if axis and mesh.shape[axis] > 1 else None for axis in spec(letters, PARAM_AXES)]
    for letter, size, axis in zip(letters.split(), shape, axes, strict=True):
        if axis and size % mesh.shape[axis]:
            raise ValueError(
                f"mesh.{axis}={mesh.shape[axis]} does not divide {LETTER_NAMES[letter]} ({letter}={size}); "
                f"choose {axis} among the divisors of {size}"
            )
    # In the form in which XLA returns a step's outputs (no axes of size 1, no trailing None): the second step then
    # meets the shardings that the first was compiled for.
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(mesh, P(*axes))


def local_rows(mesh: Mesh | None, rows: int) -> np.ndarray:
    """Return which rows of a global batch this process has to give: those of its devices, ascending."""
    if mesh is None:
        return np.arange(rows)
    places = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((rows,)).values()
    return np.unique([np.arange(rows)[place] for place in places if place is not None])


def place_rows(
    batch: Mapping[str, np.ndarray], mesh: Mesh | None, rows: int | None = None
) -> dict[str, Array | np.ndarray]:
    """Return this process's rows of a batch as their part of the global batch, split over the batch axes.

    Args:
        batch: of each array the `local_rows`.
        rows: of the global batch; None: there is one process, and these are all.
    """
    if mesh is None:
        return dict(batch)
    total = len(next(iter(batch.values()))) if rows is None else rows
    mine, by_row = local_rows(mesh, total), NamedSharding(mesh, P(BATCH_AXES))

    def place(value: np.ndarray) -> Array:
        part = lambda index: value[np.searchsorted(mine, np.arange(total)[index[0]])]
        return jax.make_array_from_callback((total, *value.shape[1:]), by_row, part)

    return {key: place(value) for key, value in batch.items()}


def taken_rows(x: Array) -> np.ndarray:
    """Return this process's rows of an array that is split like a batch: its `local_rows`."""
    if x.is_fully_addressable:
        return np.asarray(x)
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def constrain_params(tree: PyTree[Array], letters: PyTree[str]) -> PyTree[Array]:
    """Return parameters (or their gradients) held to the parameter table; the identity without a mesh."""
    return jax.tree.map(lambda axes, leaf: _constrain(leaf, spec(axes, PARAM_AXES)), letters, tree)


def constrain(x: Array, letters: str) -> Array:
    """Return the activation `x` held to the activation table; the identity without a mesh."""
    return _constrain(x, spec(letters, ACTIVATION_AXES))


def _constrain(x: Array, wanted: P) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    # Inside a shard_map some axes are manual: they are no longer the partitioner's to place.
    auto = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    return jax.lax.with_sharding_constraint(x, P(*(_only(auto, axis) for axis in wanted)))


def _only(auto: set[str], axis: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if isinstance(axis, tuple):
        return tuple(name for name in axis if name in auto) or None
    return axis if axis in auto else None
