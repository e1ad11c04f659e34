"""One pass of a model over the data: mean entropy, nll, margin and token count of every example, as a Parquet file."""

import functools
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from wmss_jax import curriculum, data, epochs, preemption, processes, sharding, step
from wmss_jax.models import CausalLM

_META = b"wmss_jax"


# Compiled once for all models of a shape: M0, M1 and every arm are scored in turn.
_score_batch = jax.jit(step.score, static_argnums=0, static_argnames=("mesh", "chunk_tokens", "with_hidden"))


class Scores(NamedTuple):
    """One number per example [n], means over its completion tokens and EOS, in nats (margin: logits)."""

    entropy: np.ndarray
    nll: np.ndarray
    margin: np.ndarray
    n_tokens: np.ndarray


def score(
    model: CausalLM,
    params: PyTree[Array],
    dataset: data.Dataset,
    *,
    seq_len: int,
    batch_size: int,
    shifted: bool = True,
    mesh: Mesh | None = None,
    chunk_tokens: int | None = None,
    keep: Callable[[int, np.ndarray], None] | None = None,
) -> Scores:
    """Return the scores of all examples, in the data set's order, computed packed and in batches.

    Args:
        seq_len, batch_size: of the packed rows.
        shifted: False takes the entropy one position late, as the released code does (`curriculum.example_means`).
        keep: is given every example with its final-norm hidden states, bfloat16 [length, D] (`weak_cache.Writer.add`);
            on process 0 alone, but every process has to give one.
    """
    plan = epochs.plan(dataset.lengths, seq_len=seq_len, batch_size=batch_size, seed=0, epochs=1)
    score_batch = functools.partial(
        _score_batch, model, params, mesh=mesh, chunk_tokens=chunk_tokens, with_hidden=keep is not None
    )
    missing = np.full(len(dataset), np.nan)
    found = Scores(missing, missing.copy(), missing.copy(), np.zeros(len(dataset), np.int64))
    rows = sharding.local_rows(mesh, batch_size)
    pending: tuple[int, dict[str, Array], dict[str, np.ndarray]] | None = None
    hand_over = None if keep is None else functools.partial(_hand_over, dataset, plan, keep)
    for number, batch in enumerate(data.batches(dataset, plan, loss_on="completion", rows=rows)):
        weights, index = batch["loss_weights"], batch["example_index"]
        wanted = curriculum.picked(weights, index) | curriculum.picked(weights, index, shifted)  # nll | entropy
        scores = score_batch(sharding.place_rows({**batch, "wanted": wanted}, mesh, batch_size))
        preemption.exit_if_asked()
        if pending is not None:  # reduced on the host while the device computes the next batch
            _reduce(*pending, shifted, found, hand_over)
        pending = number, scores, batch
    if pending is not None:
        _reduce(*pending, shifted, found, hand_over)
    return _of_all_processes(found)


def _reduce(
    number: int, scores: dict[str, Array], batch: dict[str, np.ndarray], shifted: bool, found: Scores,
    hand_over: Callable | None,
) -> None:  # fmt: skip
    if hand_over is not None:
        hand_over(number, processes.whole(scores.pop("hidden")))
    for name, values in scores.items():
        means = curriculum.example_means(
            sharding.taken_rows(values), batch["loss_weights"], batch["example_index"],
            shifted=shifted or name != "entropy",
        )  # fmt: skip
        index, getattr(found, name)[means[0]], found.n_tokens[means[0]] = means


def _of_all_processes(found: Scores) -> Scores:
    """Return the scores of all examples, of which every process has those of its rows."""
    if jax.process_count() == 1:
        return found
    columns = {}
    for name, values in found._asdict().items():
        everyones = np.stack([np.frombuffer(part, values.dtype) for part in processes.gathered(values.tobytes())])
        columns[name] = np.fmax.reduce(everyones)  # what is NaN, or no tokens, is another's
    return Scores(**columns)


def _hand_over(dataset: data.Dataset, plan: epochs.Plan, keep: Callable, number: int, hidden_BTD: np.ndarray) -> None:
    """Give `keep` the hidden states of every example of a batch: those of its segment. On process 0, for all."""
    if not processes.first():
        return
    batch = data.batch(dataset, plan, number)
    for hidden_TD, segments_T, index_T in zip(hidden_BTD, batch["segments"], batch["example_index"], strict=True):
        cuts = np.flatnonzero(np.diff(segments_T, prepend=-1, append=-1))
        for start, end in pairwise(cuts.tolist()):
            if segments_T[start] > 0:
                keep(int(index_T[start]), hidden_TD[start:end])


def write(path: str | os.PathLike, scores: Scores, dataset: data.Dataset, model_digest: str, shifted: bool) -> None:
    """Write scores as Parquet, by process 0; its metadata hold the fingerprints of data, tokenizer and model."""
    if not processes.first():
        return
    columns = {"example": np.arange(len(scores.entropy)), **scores._asdict()}
    meta = {**_fingerprints(dataset), "model": model_digest, "shifted": shifted}
    table = pa.table(columns).replace_schema_metadata({_META: json.dumps(meta).encode()})
    partial = Path(path).with_name(Path(path).name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, partial, write_page_checksum=True)
    partial.rename(path)


def read(path: str | os.PathLike, dataset: data.Dataset) -> Scores:
    """Return the scores of a Parquet file, which must be of this data set.

    Raises:
        ValueError: they are of other data or of another tokenizer, an example is missing or there twice, or the file
            is damaged.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}; score again") from error
    said = json.loads((table.schema.metadata or {}).get(_META, b"{}"))
    for what, fingerprint in _fingerprints(dataset).items():
        if said.get(what) != fingerprint:
            raise ValueError(f"{path}: scores of another {what} ({said.get(what)}, here {fingerprint}); score again")
    n = len(dataset)
    example = table["example"].to_numpy()
    if not np.array_equal(np.sort(example), np.arange(n)):
        missing, twice = np.setdiff1d(np.arange(n), example), np.flatnonzero(np.bincount(example) > 1)
        what, which = ("no scores for", missing) if len(missing) else ("more than one score for", twice)
        raise ValueError(f"{path}: {what} {len(which)} of {n} examples, e.g. {which[:5].tolist()}; score again")
    order = np.argsort(example)
    return Scores(**{name: table[name].to_numpy()[order] for name in Scores._fields})


def _fingerprints(dataset: data.Dataset) -> dict[str, str]:
    return {"data set": dataset.fingerprint, "tokenizer": dataset.tokenizer_fingerprint}
