"""A parameter read from the file tensors that make it up, straight into this process's shards."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array

from wmss_jax.models.table import Row
from wmss_jax.tensorfile import Tensor

# Held beside the shards while reading: a tensor is read in pieces of about so many bytes.
PIECE_BYTES = 64 * 2**20

type _Box = tuple[tuple[int, int], ...]  # first and last + 1 of every axis


def read(
    row: Row, parts: Sequence[Tensor], sizes: Mapping[str, int], dtype: Any, sharding: Sharding | None = None
) -> Array:
    """Return one parameter in its shards; each tensor is read once, and no more of it than some shard here needs.

    Memory beyond the result's is one piece, and one shard where the device copies it.

    Args:
        parts: the tensors of the row, one a layer where it is stacked, or one an expert; of the shape that it wants.
        sizes: the value of every shape letter.
        sharding: default: all of it on the default device.
    """
    shape = row.our_shape(sizes)
    sharding = sharding or jnp.zeros(()).sharding
    devices: dict[_Box, list[jax.Device]] = {}  # replicas share what is read for them
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices.setdefault(_box(index, shape), []).append(device)
    shards = {box: np.empty([stop - start for start, stop in box], dtype) for box in devices}
    for index, part in zip(row.indices(sizes), parts, strict=True):
        _fill(_within(shards, index), row, part, sizes)
    arrays = []
    while shards:  # one after the other is copied and let go, or the host would hold all of them twice
        box, shard = shards.popitem()
        arrays += [jax.block_until_ready(jax.device_put(shard, device)) for device in devices[box]]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _within(shards: Mapping[_Box, np.ndarray], index: tuple[int, ...]) -> list[tuple[_Box, np.ndarray]]:
    """Return what the shards have at an index of the stacked axes: box and view without these axes."""
    return [
        (box[len(index) :], shard[tuple(i - start for i, (start, _) in zip(index, box, strict=False))])
        for box, shard in shards.items()
        if all(i in range(*bounds) for i, bounds in zip(index, box, strict=False))
    ]


def _fill(shards: Sequence[tuple[_Box, np.ndarray]], row: Row, part: Tensor, sizes: Mapping[str, int]) -> None:
    """Copy from a tensor what each shard has of it."""
    if not shards:
        return
    letter, axis, rows = _leading(row, sizes)
    needed = min(box[axis][0] for box, _ in shards), max(box[axis][1] for box, _ in shards)
    for start, stop in _pieces(*needed, part, rows):
        piece = row.to_ours(part.read(start * rows, stop * rows), {**sizes, letter: stop - start})
        for box, shard in shards:
            first, last = box[axis]
            low, high = max(start, first), min(stop, last)
            if low < high:
                source, target = [slice(*bounds) for bounds in box], [slice(None) for _ in box]
                source[axis], target[axis] = slice(low - start, high - start), slice(low - first, high - first)
                shard[tuple(target)] = piece[tuple(source)]


def _leading(row: Row, sizes: Mapping[str, int]) -> tuple[str, int, int]:
    """Return the letter that is outermost in the file, its axis in ours (of one layer), and its step in file rows."""
    letter, *inner = row.their_axes[0].split()
    ours = row.letters.split()[len(row.stacks) :]
    return letter, ours.index(letter), math.prod(sizes[name] for name in inner)


def _pieces(start: int, stop: int, part: Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """Cut a range of the leading letter so that each piece has about PIECE_BYTES of the tensor."""
    bytes_each = rows * math.prod(part.shape[1:]) * part.dtype.itemsize
    step = max(1, PIECE_BYTES // bytes_each)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _box(index: Any, shape: tuple[int, ...]) -> _Box:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
