"""Reading and writing safetensors files by name, one tensor at a time and without mapping them into memory."""

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

# The format's dtype names (https://github.com/huggingface/safetensors, "Format") and numpy's.
DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
}  # fmt: skip
INDEX = "model.safetensors.index.json"


class Tensor(NamedTuple):
    """Where one tensor lies: file, byte offset, shape, dtype."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the tensor, or its rows from `start` to before `stop`.

        Read with pread: mapped pages would count as resident memory of every process.
        """
        shape = (len(range(*slice(start, stop).indices(self.shape[0]))), *self.shape[1:]) if self.shape else ()
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        buffer = np.empty(math.prod(shape) * self.dtype.itemsize, np.uint8)
        view, done = memoryview(buffer), 0
        with open(self.file, "rb") as file:
            while done < len(view):  # one call reads at most 2 GiB
                got = os.preadv(file.fileno(), [view[done:]], self.offset + start * row_bytes + done)
                if got == 0:
                    raise ValueError(f"{self.file}: ends inside a tensor; the file is truncated")
                done += got
        return buffer.view(self.dtype).reshape(shape)


def tensors(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of the `*.safetensors` files of a model directory, by name.

    Raises:
        FileNotFoundError: there are no safetensors, or the index names a file that is not there.
        ValueError: a header is damaged, a name occurs twice or a dtype is not supported.
    """
    found: dict[str, Tensor] = {}
    for file in _files(directory):
        for name, tensor in _header(file):
            if name in found:
                raise ValueError(f"{file}: tensor {name} is also in {found[name].file.name}")
            found[name] = tensor
    return found


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (directory / name).exists()]
        if absent:
            raise FileNotFoundError(f"{index}: names files that are not there: {', '.join(absent)}")
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickles:
        raise FileNotFoundError(
            f"{directory}: has only pickled weights ({pickles[0]}), which can run code when opened and are not read; "
            f"save the model again with save_pretrained(..., safe_serialization=True)"
        )
    raise FileNotFoundError(f"{directory}: no *.safetensors files")


def _header(file: Path) -> Iterator[tuple[str, Tensor]]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{file}: not a safetensors file, or truncated")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file}: not a safetensors file: its header is damaged") from error
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{file}: tensor {name} has dtype {entry['dtype']}; supported: {', '.join(DTYPES)}")
        start, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise ValueError(f"{file}: ends inside tensor {name}; the file is truncated")
        yield name, Tensor(file, 8 + length + start, tuple(entry["shape"]), DTYPES[entry["dtype"]])


def write(directory: Path, arrays: Iterator[tuple[str, np.ndarray]], sizes: Mapping[str, int], limit: int) -> None:
    """Write arrays as they come, in files of at most `limit` bytes (one tensor at least), with an index if several.

    All of it was read back and compared when this returns.

    Args:
        sizes: bytes of every tensor, in the order of `arrays`: they decide the files before anything is read.

    Raises:
        OSError: it could not be written, or what the files hold is not what was given.
    """
    files = _files_of(sizes, limit)
    given: dict[str, _Content] = {}
    for file, names in files.items():
        held = dict(itertools.islice(arrays, len(names)))
        given |= {name: _content(array) for name, array in held.items()}
        save_file(held, directory / file, {"format": "pt"})
        (directory / file).chmod(0o666 & ~_umask())  # the library writes files that only their owner can read
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    _check(directory, given)


class _Content(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    crc32c: int


def _content(array: np.ndarray) -> _Content:
    return _Content(array.dtype, array.shape, google_crc32c.value(array.tobytes()))


def _check(directory: Path, given: Mapping[str, _Content]) -> None:
    """Raise OSError unless the files of a directory hold the tensors that were given, and no others."""
    try:
        found = tensors(directory)
        wrong = [name for name in given if name not in found or _content(found[name].read()) != given[name]]
    except ValueError as error:
        raise OSError(f"what was written cannot be read back: {error}") from error
    wrong += [name for name in found if name not in given]
    if wrong:
        raise OSError(f"{directory}: read back, these tensors are not what was written: {', '.join(wrong)}")


def _files_of(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Return {file: names of its tensors}, in order, each file up to `limit` bytes unless one tensor alone has more."""
    plan: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if plan[-1] and size > room:
            plan.append([])
            room = limit
        plan[-1].append(name)
        room -= size
    if len(plan) == 1:
        return {"model.safetensors": plan[0]}
    return {f"model-{number:05}-of-{len(plan):05}.safetensors": names for number, names in enumerate(plan, 1)}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
