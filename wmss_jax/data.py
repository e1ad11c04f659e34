"""Rows -> tokens and masks, encoded once and kept on disk; the batches of a plan, read by Grain.

    dataset = data.prepare(sources, tokenizer, root="data", seq_len=4096, cache_dir="runs/x/cache")
    plan = epochs.plan(dataset.lengths, seq_len=4096, batch_size=256, seed=42, epochs=1, probs=probs)
    for batch in data.batches(dataset, plan, start_step=0):       # {"tokens": int32[256, 4096], ...}

The position in the data is the step number: plan and batches are pure functions of their arguments, on every host.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped

from wmss_jax import encoding, examples, packing
from wmss_jax import tokenizer as tokenizers
from wmss_jax.epochs import Plan

FORMAT = 1  # raise it whenever the same rows are encoded into something else
_AT_ONCE = 1000  # examples a call of the tokenizer


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the rows. `trained_tokens` are completion targets, the ends of answers included.

    `dropped` are examples that were too long, or had no trained token left once truncated; `truncated` are kept ones.
    `longest` is the number of tokens of the longest example before that.
    """

    examples: int
    tokens: int
    trained_tokens: int
    dropped: int
    truncated: int
    longest: int


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Encoded examples with random access; the arrays lie in files that are mapped into memory.

    Attributes:
        fingerprint: digest of all tokens and masks in order. Scores belong to exactly one fingerprint.
        tokenizer_fingerprint: see `tokenizer.fingerprint`.
        report: what became of the rows.
    """

    flat_tokens: Int32[np.ndarray, " t"]
    flat_mask: Bool[np.ndarray, " t"]
    offsets: Int64[np.ndarray, " _"]
    rows: Int64[np.ndarray, "n 2"]
    prefixes: Sequence[str]
    fingerprint: str
    tokenizer_fingerprint: str
    report: Report

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64[np.ndarray, " n"]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    def tokens(self, index: int | np.integer) -> Int32[np.ndarray, " _"]:
        """Return the tokens of an example."""
        return self.flat_tokens[self.offsets[index] : self.offsets[index + 1]]

    def mask(self, index: int | np.integer, loss_on: str = "completion") -> Bool[np.ndarray, " _"]:
        """Return which tokens of an example are trained (scored, with "completion"); see `encoding.loss_mask`."""
        return encoding.loss_mask(self.flat_mask[self.offsets[index] : self.offsets[index + 1]], loss_on)

    def location(self, index: int | np.integer) -> str:
        """Return where an example comes from: FILE:LINE."""
        source, number = self.rows[index]
        return f"{self.prefixes[source]}{number}"


def prepare(
    sources: Sequence[Any],
    tokenizer: Any,
    *,
    root: str | os.PathLike = ".",
    seq_len: int,
    too_long: str = "error",
    chat_template: bool = True,
    system_prompt: str | None = None,
    cache_dir: str | os.PathLike,
) -> Dataset:
    """Return the examples of all sources, one after the other; encoded now, or read from where they were before.

    What lies in `cache_dir` is found by a digest of everything that it depends on: the sources' bytes and templates,
    the tokenizer, the arguments here. What is trained in the loss is not among them: one entry serves either `loss_on`.

    Args:
        sources: see `examples`.
        root: directory at which relative paths start.
        seq_len: most tokens of an example.
        too_long: what happens to a longer one: "error"; "drop"; or "truncate", which cuts its end off, EOS included.
        chat_template, system_prompt: see `encoding.encode_batch`.

    Raises:
        FileNotFoundError, ValueError: a source, a row or an example cannot be used; one line, with its location.
            Then nothing is written.
    """
    if too_long not in ("error", "drop", "truncate"):
        raise ValueError(f"too_long {too_long!r} is unknown; choose 'error', 'drop' or 'truncate'")
    if not sources:
        raise ValueError("no sources of examples are given")
    settings = {"chat_template": chat_template, "system_prompt": system_prompt}
    inputs = {
        "format": FORMAT,
        "tokenizer": tokenizers.fingerprint(tokenizer),
        "sources": [_identity(source, root) for source in sources],
        "seq_len": seq_len,
        "too_long": too_long,
        **settings,
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    entry = Path(cache_dir) / key
    if not (entry / "meta.json").exists():
        _write(entry, *_encode_all(sources, root, tokenizer, seq_len, too_long, settings), inputs)
    return _open(entry, [examples.location_prefix(source, root) for source in sources])


def _identity(source: Any, root: str | os.PathLike) -> dict[str, Any]:
    names = ("messages", "text", "prompt", "completion", "limit")
    given = {name: getattr(source, name, None) for name in names}
    if remove := getattr(source, "remove", None):
        given["remove"] = remove
    return given | {"content": examples.digest(source, root), "kind": "".join(Path(source.path).suffixes)}


def _encode_all(
    sources: Sequence[Any], root: Any, tokenizer: Any, seq_len: int, too_long: str, settings: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], Report]:
    """Return the arrays of a cache entry, and the report."""
    tokens, masks, rows = [], [], []
    long: list[tuple[str, int]] = []
    dropped = longest = 0
    for at, source in enumerate(sources):
        for chunk in batched(examples.read(source, root), _AT_ONCE):
            for example, (ids, mask) in zip(chunk, encoding.encode_batch(chunk, tokenizer, **settings), strict=True):
                longest = max(longest, len(ids))
                if len(ids) > seq_len:
                    long.append((example.location, len(ids)))
                    ids, mask = ids[:seq_len], mask[:seq_len]
                    if too_long != "truncate" or not mask.any():
                        dropped += 1
                        continue
                tokens.append(ids)
                masks.append(mask)
                rows.append((at, example.number))
    _check_lengths(long, len(rows), dropped, seq_len, too_long)
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    arrays = {
        "tokens": np.concatenate(tokens),
        "mask": np.concatenate(masks),
        "offsets": offsets,
        "rows": np.array(rows),
    }
    trained = int(np.count_nonzero(arrays["mask"]))
    return arrays, Report(len(rows), int(offsets[-1]), trained, dropped, len(long) - dropped, longest)


def _check_lengths(long: list[tuple[str, int]], kept: int, dropped: int, seq_len: int, too_long: str) -> None:
    if long and too_long == "error":
        first = ", ".join(f"{location} has {length}" for location, length in long[:3])
        raise ValueError(
            f"{len(long)} of {kept + dropped} examples are longer than seq_len = {seq_len} tokens ({first}): "
            "raise seq_len, or set too_long to truncate or drop"
        )
    if not kept:
        raise ValueError(
            f"all {dropped} examples are too long for seq_len = {seq_len} (too_long: {too_long}): raise seq_len"
        )


def _write(entry: Path, arrays: Mapping[str, np.ndarray], report: Report, inputs: Mapping[str, Any]) -> None:
    """Write a cache entry; it appears whole or not at all, also when several processes write it."""
    content = hashlib.sha256()
    for name in ("tokens", "mask", "offsets"):
        content.update(arrays[name].data)
    meta = {"fingerprint": content.hexdigest()[:16], "report": dataclasses.asdict(report), "inputs": inputs}
    partial = entry.with_name(f"{entry.name}.partial-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        partial.rename(entry)
    except OSError:
        if not (entry / "meta.json").exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(entry: Path, prefixes: Sequence[str]) -> Dataset:
    meta = json.loads((entry / "meta.json").read_text())
    load = lambda name: np.asarray(np.load(entry / f"{name}.npy", mmap_mode="r"))
    arrays = load("tokens"), load("mask"), load("offsets"), load("rows")
    return Dataset(*arrays, tuple(prefixes), meta["fingerprint"], meta["inputs"]["tokenizer"], Report(**meta["report"]))


# -- batches ----------------------------------------------------------------------------------------------------------


Hidden = Callable[[Sequence[int]], list[np.ndarray]]  # examples -> their hidden states, bfloat16 [length, D] each


def batch(
    dataset: Dataset,
    plan: Plan,
    step: int,
    *,
    loss_on: str = "completion",
    weak_hidden: Hidden | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
) -> dict[str, Shaped[np.ndarray, "B T ..."]]:
    """Return one step's batch, or the given `rows` of it, as `packing.layout` lays rows out.

    `tokens, targets, segments, positions, example_index` int32[B, seq_len] and `loss_weights` float32[B, seq_len]; with
    `weak_hidden`, what that gives for the examples lies beside their tokens under the same name,
    bfloat16[B, seq_len, D], and zeros beside padding.
    """
    of_step = plan.rows_of(step)
    examples_of = of_step if rows is None else [of_step[row] for row in rows]
    laid_out = [
        packing.layout(
            [dataset.tokens(i) for i in row], [dataset.mask(i, loss_on) for i in row], row.tolist(), plan.seq_len
        )
        for row in examples_of
    ]
    made = {name: np.stack([row[name] for row in laid_out]) for name in laid_out[0]}
    return (
        made if weak_hidden is None else {**made, "weak_hidden": _hidden_rows(examples_of, weak_hidden, plan.seq_len)}
    )


def _hidden_rows(rows: Sequence[np.ndarray], read: Hidden, seq_len: int) -> np.ndarray:
    """Return hidden states laid out as `packing.layout` lays out the tokens of the rows' examples."""
    found = read([int(index) for row in rows for index in row])  # of all rows at once: the disk works in parallel
    like = (found or read([0]))[0]
    out = np.zeros((len(rows), seq_len, like.shape[1]), like.dtype)
    remaining = iter(found)
    for place, row in zip(out, rows, strict=True):
        end = 0
        for hidden in itertools.islice(remaining, len(row)):
            place[end : end + len(hidden)] = hidden
            end += len(hidden)
    return out


def batches(
    dataset: Dataset,
    plan: Plan,
    *,
    start_step: int = 0,
    loss_on: str = "completion",
    weak_hidden: Hidden | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
    threads: int = 4,
    prefetch: int = 4,
) -> Iterator[dict[str, Shaped[np.ndarray, "B T ..."]]]:
    """Return the batches of steps `start_step` to the plan's last, read ahead by Grain; see `batch`.

    Args:
        start_step: nothing before it is read; `plan.total_steps` gives no batch.
        rows: which of every batch are laid out (`sharding.local_rows`); None: all.
        threads, prefetch: threads that lay batches out, and batches (of host memory) ready ahead of use; 0: none.

    Raises:
        ValueError: a step or a row out of range.
    """
    if not 0 <= start_step <= plan.total_steps:
        raise ValueError(f"start_step = {start_step} is outside 0 to {plan.total_steps}")
    if rows is not None and not all(0 <= row < plan.batch_size for row in rows):
        raise ValueError(f"rows {list(rows)} are not all among the {plan.batch_size} of a batch")
    encoding.loss_mask(np.zeros(1, bool), loss_on)  # says what is wrong before a thread does
    make = functools.partial(batch, dataset, plan, loss_on=loss_on, weak_hidden=weak_hidden, rows=rows)
    return _read(make, range(start_step, plan.total_steps), threads, prefetch)


def _read(make: Any, steps: range, threads: int, prefetch: int) -> Iterator[dict[str, np.ndarray]]:
    import grain  # seconds to import

    if not steps:
        return
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    source = grain.MapDataset.range(steps.start, steps.stop).map(make)
    reader = iter(source.to_iter_dataset(options))
    try:
        yield from reader
    finally:  # also when the loop that reads is left early
        reader.close()
