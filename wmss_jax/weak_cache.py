"""The weak agent's final hidden states on disk: one bfloat16 vector for every token of every different example.

    with weak_cache.Writer(directory, dataset, width=1024, identity=identity) as writer:      # a scoring pass
        writer.add(index, hidden_tD)                                                           # in any order
    cache = weak_cache.WeakCache.open(directory, dataset, identity)                            # the joint stage
    hidden = cache.read([7, 3])                                                                # bfloat16 [t, D] each

    <directory>/ hidden/       TensorStore's zarr3 array [tokens, D], in the order of `add`; crc32c of every chunk
                 offsets.npy   int64 [n]: where each example begins; examples with the same tokens share a place
                 meta.json     what the states are of, sizes of all files, digests of the small ones and of itself

A cache is written as `<directory>.partial-new`, synced, and gets its name by a rename: it is there as a whole or not
at all. Every byte is under a checksum, looked at on opening (small files) and reading (chunks). One process writes it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import google_crc32c
import ml_dtypes
import numpy as np
import tensorstore as ts
from jaxtyping import BFloat16, Int64

from wmss_jax import digests, durable
from wmss_jax.data import Dataset

FORMAT = 1
HIDDEN, OFFSETS, META = "hidden", "offsets.npy", "meta.json"
Identity = Mapping[str, str]  # what the states are of: {"data set": fingerprint, "model": digest, "truncation": ...}

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHUNK_BYTES = 256 << 10  # what is read, and checked, for any token in it
_SHARD_BYTES = 256 << 20  # a file; the writer holds two: one that fills, one on its way to the disk
_POOL_BYTES = 64 << 20  # the reader's: keeps the shards' indices, 8 KiB each, so that an example is one request
_AGAIN = "make it again with `wmss score --cache-hidden`, or remove it"
_RESIDENT = "use joint.weak.placement=resident"
_array = lambda path: {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}


class CacheDamaged(ValueError):
    """A weak cache is not what was written; the message names the directory and what is wrong."""


@functools.lru_cache(maxsize=1)  # asked for by the cost and by the writer; seconds for a million examples
def unique(dataset: Dataset) -> Int64[np.ndarray, " n"]:
    """Return for each example the first one with exactly the same tokens, by digests of 128 bits."""
    seen: dict[bytes, int] = {}
    digest = lambda index: hashlib.blake2b(dataset.tokens(index), digest_size=16).digest()
    firsts = (seen.setdefault(digest(index), index) for index in range(len(dataset)))
    return np.fromiter(firsts, np.int64, len(dataset))


def needed_bytes(dataset: Dataset, width: int) -> int:
    """Return the bytes of hidden states of `width` numbers; a cache's checksums and offsets add less than 1 %."""
    return int(dataset.lengths[unique(dataset) == np.arange(len(dataset))].sum()) * width * _BFLOAT16.itemsize


def cost(directory: Path, dataset: Dataset, width: int, tokens_per_step: int) -> str:
    """Return a line that says what a cache would take, of disk and of reading, before it is made."""
    needed, token = needed_bytes(dataset, width), width * _BFLOAT16.itemsize
    chunk = _chunk_tokens(needed // token, width)
    # Chunks are read whole: t + chunk - 1 tokens for an example of t tokens, on average over where it may begin.
    read = token * (1 + len(dataset) * (chunk - 1) / int(dataset.offsets[-1]))
    return (
        f"weak cache: {_size(needed)} on disk ({needed // token:,} unique tokens x {_size(token)}; "
        f"{_size(_free_bytes(directory))} free); a training step reads {_size(tokens_per_step * read)} for "
        f"{_size(tokens_per_step * token)}, in chunks of {_size(chunk * token)}; 1 GB/s is {1e9 / read:,.0f} tokens/s"
    )


def _chunk_tokens(tokens: int, width: int) -> int:
    return min(max(1, _CHUNK_BYTES // (width * _BFLOAT16.itemsize)), tokens)


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(next(parent for parent in Path(path).absolute().parents if parent.exists())).free


def _size(n: float) -> str:
    scale, unit = next(((s, unit) for s, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if n >= s), (1, "bytes"))
    return f"{n / scale:.4g} {unit}"


class Writer:
    """Writes a cache from inside a `with` block; left by an exception, it leaves nothing behind.

    Args:
        directory: must not exist; what a killed writer left beside it is removed.
        budget_bytes: most that the hidden states, of `width` numbers each, may take.

    Raises:
        FileExistsError: `directory` exists.
        ValueError: the states do not fit the budget or the disk, and nothing is written; or an example is missing.
        OSError: they could not be written.
    """

    def __init__(
        self, directory: Path, dataset: Dataset, width: int, identity: Identity, budget_bytes: int | None = None
    ):
        self.directory = Path(directory).absolute()
        self._partial = self.directory.with_name(f"{self.directory.name}.partial-new")
        self._width, self._identity, self._budget_bytes = width, dict(identity), budget_bytes
        self._first, self._lengths = unique(dataset), dataset.lengths
        self._kept = self._first == np.arange(len(dataset))
        self._tokens = int(self._lengths[self._kept].sum())
        self._starts = np.full(len(dataset), -1, np.int64)
        self._stored = self._filled = 0  # tokens handed to TensorStore, and in the buffer

    def __enter__(self) -> Self:
        if self.directory.exists():
            raise FileExistsError(f"{self.directory}: exists already; choose another directory or remove it")
        needed = self._tokens * self._width * _BFLOAT16.itemsize
        what = f"{self.directory}: the weak agent's hidden states need {_size(needed)}"
        if self._budget_bytes is not None and needed > self._budget_bytes:
            allowed = _size(self._budget_bytes)
            raise ValueError(f"{what}, {allowed} are allowed: raise joint.weak.cache_budget_gb, or {_RESIDENT}")
        shutil.rmtree(self._partial, ignore_errors=True)
        free = _free_bytes(self._partial)
        if needed * 1.02 + _CHUNK_BYTES > free:  # for checksums and offsets, and because a full disk harms others
            raise ValueError(f"{what} and 2 % to spare, {_size(free)} are free: free space, or {_RESIDENT}")
        spec, shard = _new_array(self._partial / HIDDEN, self._tokens, self._width)
        self._buffer = np.empty((shard, self._width), _BFLOAT16)
        self._opened = self._pending = ts.open(spec, create=True)
        return self

    def add(self, index: int, hidden_tD: BFloat16[np.ndarray, "t D"]) -> None:
        """Take the hidden states of one example, in any order; `unique` says of which examples they are kept."""
        if not 0 <= index < len(self._lengths):
            raise ValueError(f"hidden states of example {index}: examples are 0 to {len(self._lengths) - 1}")
        given, expected = list(hidden_tD.shape), [int(self._lengths[index]), self._width]
        if hidden_tD.dtype != _BFLOAT16 or given != expected:
            raise ValueError(f"hidden states of example {index} are {hidden_tD.dtype}{given}, not bfloat16{expected}")
        if not self._kept[index]:
            return
        if self._starts[index] >= 0:
            raise ValueError(f"hidden states of example {index} came twice")
        self._starts[index] = self._stored + self._filled
        while len(hidden_tD):
            taken = hidden_tD[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            hidden_tD = hidden_tD[len(taken) :]
            if self._filled == len(self._buffer):
                self._write_shard()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with contextlib.suppress(Exception):  # an error came before; here, nothing may write to what is removed
                self._wait()
            shutil.rmtree(self._partial, ignore_errors=True)

    def _write_shard(self) -> None:
        self._wait()
        # TensorStore refers to the buffer for as long as it likes and does not copy it: the next shard has a new one.
        full, self._buffer = self._buffer[: self._filled], np.empty_like(self._buffer)
        place = self._opened.result()[self._stored : self._stored + self._filled]
        self._pending = place.write(full, can_reference_source_data_indefinitely=True)
        self._stored, self._filled = self._stored + self._filled, 0

    def _wait(self) -> None:
        try:
            self._pending.result()
        except ValueError as error:  # TensorStore's only kind
            raise OSError(f"{self.directory}: could not be written: {_reason(error)}") from error

    def _finish(self) -> None:
        if len(missing := np.flatnonzero(self._kept & (self._starts < 0))):
            which = f"{len(missing)} examples, e.g. {missing[:5].tolist()}"
            raise ValueError(f"{self.directory}: no hidden states of {which} were added; nothing is kept")
        if self._filled:
            self._write_shard()
        self._wait()
        np.save(self._partial / OFFSETS, self._starts[self._first])
        paths = sorted(path for path in self._partial.rglob("*") if path.is_file())
        files = {path.relative_to(self._partial).as_posix(): _measured(path) for path in paths}
        said = {"identity": self._identity, "width": self._width, "tokens": self._tokens, "files": files}
        (self._partial / META).write_text(_meta_text({"format": FORMAT, "version": version("wmss-jax"), **said}))
        durable.sync_tree(self._partial)
        self._partial.rename(self.directory)
        durable.sync(self.directory.parent)


def _new_array(path: Path, tokens: int, width: int) -> tuple[dict[str, Any], int]:
    """Return TensorStore's spec of the array, and the tokens of a shard: whole chunks, as many as there are at most."""
    chunk = _chunk_tokens(tokens, width)
    shard = chunk * min(_SHARD_BYTES // _CHUNK_BYTES, -(-tokens // chunk))
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    inner = {"chunk_shape": [chunk, width], "codecs": checked, "index_codecs": checked, "index_location": "end"}
    metadata = {
        "shape": [tokens, width], "data_type": "bfloat16", "fill_value": 0.0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, width]}},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }  # fmt: skip
    # A chunk of zeros would be left out, and the reader takes one that is not there for damage.
    return {**_array(path), "metadata": metadata, "store_data_equal_to_fill_value": True}, shard


def _measured(path: Path) -> str:
    """Return what meta.json says of a file: of a shard the size alone, because its chunks have their own checksums."""
    if not path.is_file():
        return "missing"
    return f"{path.stat().st_size} bytes" + (f", crc32c {digests.digest(path)[1]}" if path.suffix else "")


def _meta_text(meta: Mapping[str, Any]) -> str:
    crc = google_crc32c.value(json.dumps(meta).encode())
    return json.dumps({**meta, "crc32c": f"{crc:08x}"}, indent=1) + "\n"


@dataclasses.dataclass(frozen=True, eq=False)
class WeakCache:
    """An opened cache, from which any number of threads may read at once."""

    directory: Path
    width: int
    starts: Int64[np.ndarray, " n"]  # of each example, in tokens of `store`
    lengths: Int64[np.ndarray, " n"]
    store: ts.TensorStore  # [tokens, width]

    @classmethod
    def open(cls, directory: Path, dataset: Dataset, identity: Identity) -> Self:
        """Return a finished cache of this data set and of this identity; see `Writer`.

        Raises:
            CacheDamaged: there is none, or its files are not those that were written; shards are only measured here.
            ValueError: it is of something else, and every difference is named; or a newer version wrote it.
        """
        directory = Path(directory).absolute()
        meta = _read_meta(directory)
        made = meta["identity"]
        if different := [name for name in {**identity, **made} if made.get(name) != identity.get(name)]:
            named = [f"another {name} ({made.get(name)}, here {identity.get(name)})" for name in different]
            raise ValueError(f"{directory}: made for {' and '.join(named)}; {_AGAIN}")
        files = [(name, was, _measured(directory / name)) for name, was in meta["files"].items()]
        if damaged := [f"{name}: {now} instead of {was}" for name, was, now in files if now != was]:
            raise CacheDamaged(f"{directory}: {'; '.join(damaged)}; {_AGAIN}")
        starts, lengths, ends = np.load(directory / OFFSETS), dataset.lengths, [0, meta["tokens"]]
        # Every example begins where another one ends, or the lengths are not those that it was made with.
        if len(starts) != len(lengths) or {*starts.tolist(), *ends} != {*(starts + lengths).tolist(), *ends}:
            raise ValueError(f"{directory}: made for examples of other lengths than the data set's; {_AGAIN}")
        # Nothing changes a finished cache: what is in the pool need not be compared with the file's date.
        spec = {**_array(directory / HIDDEN), "fill_missing_data_reads": False, "recheck_cached_data": "open"}
        limits = {"cache_pool": {"total_bytes_limit": _POOL_BYTES}, "file_io_concurrency": {"limit": 32}}
        store = ts.open(spec, context=ts.Context(limits), read=True).result()
        return cls(directory, meta["width"], starts, lengths, store)

    def read(self, indices: Sequence[int]) -> list[BFloat16[np.ndarray, "t D"]]:
        """Return the hidden states of examples, bfloat16 [length, width] each, all read at the same time.

        Raises:
            CacheDamaged: a chunk that they lie in is missing, or its checksum is another.
            ValueError: there is no such example.
        """
        if wrong := [index for index in indices if not 0 <= index < len(self.starts)]:  # -1 is what padding has
            raise ValueError(f"{self.directory}: examples are 0 to {len(self.starts) - 1}, not {wrong[0]}")
        places = [(int(self.starts[index]), int(self.lengths[index])) for index in indices]
        reads = [self.store[start : start + length].read() for start, length in places]
        try:
            return [read.result() for read in reads]
        except ValueError as error:
            raise CacheDamaged(f"{self.directory}: damaged ({_reason(error)}); {_AGAIN}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).partition(" [")[0].rpartition(": ")[2].split())  # without TensorStore's paths and specs


def _read_meta(directory: Path) -> dict[str, Any]:
    if not (directory / META).is_file():
        raise CacheDamaged(f"{directory}: not a weak cache, or not a finished one: it has no {META}; {_AGAIN}")
    text = (directory / META).read_bytes()
    try:
        meta = {name: value for name, value in json.loads(text).items() if name != "crc32c"}
    except (ValueError, AttributeError):
        meta = {}
    if _meta_text(meta).encode() != text:  # to the last space: so every flipped bit is noticed, whatever it does
        raise CacheDamaged(f"{directory}: {META} is damaged; {_AGAIN}")
    if meta["format"] > FORMAT:
        raise ValueError(f"{directory}: format {meta['format']}; this version reads up to {FORMAT}: update wmss-jax")
    return meta
