"""Checkpoints: one directory each, there as a whole or not at all, and every byte of it accounted for.

    <step>/ state/         the arrays, by Orbax: every process writes its own shards
            meta.json      what the caller says about them; besides: format, step, metric and library versions
            assets/ ...    files carried along, such as the tokenizer
            digests.json   size and crc32c of every other file, because Orbax restores flipped bits silently

When that is a checkpoint, `commit` decides. It lies on a POSIX file system that the processes of a run share, or in a
bucket (`gs://...`, see `storage`); they call every function here that touches arrays together.
"""

import concurrent.futures
import contextlib
import importlib.metadata
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree

from wmss_jax import commit, digests, storage
from wmss_jax.digests import DIGESTS, CheckpointDamaged, Level, verify
from wmss_jax.storage import Directory, Name

FORMAT = 1
STATE, META = "state", "meta.json"

_LIBRARIES = ("wmss-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_TIMEOUT_S = 3600  # for one checkpoint to be on disk
_barriers = itertools.count()


def save(
    directory: Name,
    tree: PyTree[Array],
    meta: Mapping[str, Any],
    files: Mapping[str, Path | bytes] = {},
) -> None:
    """Write a checkpoint of `tree` and return when it is complete.

    Args:
        meta: anything JSON.
        files: {path inside the checkpoint: file to copy, or its content}.

    Raises:
        FileExistsError: `directory` exists.
        OSError: it could not be written; nothing is left of it then.
    """
    final = storage.absolute(directory)
    if commit.exists(final):
        raise FileExistsError(f"{final}: exists already; choose another directory or remove it")
    with _opened() as orbax:
        partial = _begin(orbax, final, tree, _meta_text(meta), files)
        with _others_wait():
            _finish(orbax, partial, final)


class Writer:
    """Writes the checkpoints of a run as `<root>/<step>/` in the background, and removes old ones.

    `save` returns as soon as the host has a copy of the state: its buffers may be donated to the next step. An error
    while writing is raised, as OSError, by the next `check`, `save` or `wait`. A step that exists is replaced. Steps
    above the one just saved belong to a continuation that was given up, and are removed.

    Args:
        root: made if missing; what a crashed writer left in it is removed.
        keep_last: newest checkpoints to keep, at least 1.
        keep_every_steps: besides, keep those at multiples of this step.
        keep_best: besides, keep this many with the lowest `metric`.
        keep_steps: besides, keep these.
    """

    def __init__(
        self,
        root: Name,
        keep_last: int = 2,
        keep_every_steps: int | None = None,
        keep_best: int = 0,
        keep_steps: frozenset[int] = frozenset(),
    ):
        if keep_last < 1 or (keep_every_steps is not None and keep_every_steps < 1) or keep_best < 0:
            raise ValueError(
                f"keep_last and keep_every_steps must be >= 1, keep_best >= 0; got {keep_last=}, {keep_every_steps=}, "
                f"{keep_best=}"
            )
        self.root = storage.absolute(root)
        self._keep_last, self._keep_every_steps, self._keep_best = keep_last, keep_every_steps, keep_best
        self._keep_steps = keep_steps
        self._orbax = _orbax()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        if jax.process_index() == 0:
            commit.clean(self.root)

    def save(
        self,
        step: int,
        state: PyTree[Array],
        meta: Mapping[str, Any],
        metric: float | None = None,
        files: Mapping[str, Path | bytes] = {},
    ) -> None:
        """Begin to write `state`, once the write before is complete; `meta` and `files` as for `checkpoint.save`."""
        self.wait()
        final = self.root / str(step)
        partial = _begin(self._orbax, final, state, _meta_text(meta, step, metric), files)
        self._pending = self._thread.submit(self._complete, partial, final)

    def check(self) -> None:
        """Raise what went wrong in the background, if anything has by now; it waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when everything is written; raise what went wrong in the background."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()  # its error outranks the block's: what should have been saved is not
        finally:
            self._thread.shutdown()
            _close(self._orbax)

    def _complete(self, partial: Directory, final: Directory) -> None:
        with _others_wait():
            _finish(self._orbax, partial, final)
            if jax.process_index() == 0:
                self._prune(int(final.name))

    def _prune(self, newest: int) -> None:
        present = steps(self.root)
        alive = [step for step in present if step <= newest]
        every = self._keep_every_steps
        keep = {*alive[-self._keep_last :], *(step for step in alive if every and step % every == 0)}
        keep |= self._keep_steps & {*alive}
        if self._keep_best:
            ranked = []
            for step in alive:
                with contextlib.suppress(CheckpointDamaged):  # never the best, and no reason for this save to fail
                    ranked.append((read_meta(self.root / str(step))["metric"], -step))
            ranked = sorted(pair for pair in ranked if pair[0] is not None)
            keep |= {-negated for _, negated in ranked[: self._keep_best]}  # of two equals the newer
        for step in set(present) - keep:
            commit.remove(self.root / str(step))


def steps(root: Name) -> list[int]:
    """Return the steps of the complete checkpoints under `root`, ascending; [] if there is no such directory."""
    return commit.steps(storage.path(root))


def latest(root: Name) -> int | None:
    """Return the newest step under `root`, None without one; whether it is intact, `verify` says."""
    return max(steps(root), default=None)


_verify = verify  # for the functions that have an argument of its name


def restore(directory: Name, abstract_tree: PyTree, verify: Level = "full") -> PyTree[Array]:
    """Return the arrays of a checkpoint in the structure and the shardings of `abstract_tree`.

    Args:
        abstract_tree: ShapeDtypeStructs with the shardings wanted now (or arrays), whatever mesh the checkpoint was
            written on; without a sharding an array goes to the default device.
        verify: what is checked before anything is read; see `verify`.

    Raises:
        CheckpointDamaged: it is not what was written.
        ValueError: names, shapes or dtypes differ from the tree's; all of them are listed.
    """
    _verify(directory, verify)
    return _read(directory, abstract_tree)


def resume(
    root: Name, abstract_tree: PyTree, verify: Level = "full", *, use_previous: bool = False
) -> tuple[int, PyTree[Array], dict[str, Any]] | None:
    """Return (step, tree, meta) of the newest checkpoint under `root`, None without one; see `restore`.

    Args:
        use_previous: where the newest is damaged, take the newest that is intact instead of raising.

    Raises:
        CheckpointDamaged: the newest is damaged; the message names the newest that is intact.
    """
    damage: CheckpointDamaged | None = None
    for step in reversed(steps(root)):
        directory = storage.path(root) / str(step)
        try:
            _verify(directory, verify)
        except CheckpointDamaged as error:
            damage = damage or error
            continue
        if damage and not use_previous:
            raise CheckpointDamaged(f"{damage}. {directory} is intact; use_previous=True resumes from it") from damage
        if damage:
            logging.getLogger(__name__).warning("%s. Resuming from %s", damage, directory)
        return step, _read(directory, abstract_tree), read_meta(directory)
    if damage:
        raise CheckpointDamaged(f"{damage}. No other checkpoint in {root} is intact") from damage
    return None


def read_meta(directory: Name) -> dict[str, Any]:
    """Return the `meta` a checkpoint was saved with, and `format`, `step`, `metric` and `versions`.

    Raises:
        CheckpointDamaged: meta.json is not what was written.
        ValueError: a newer version of this library wrote it.
    """
    directory = storage.path(directory)
    recorded, file = digests.read(directory), directory / META
    content = file.read_bytes() if file.is_file() else None
    if content is None or digests.of(content) != recorded.get(META):
        raise CheckpointDamaged(f"{directory}: {META}: missing or damaged")
    meta = json.loads(content)
    if meta["format"] > FORMAT:
        raise ValueError(f"{directory}: format {meta['format']}; this version reads up to {FORMAT}: update wmss-jax")
    return meta


def _orbax() -> ocp.AsyncCheckpointer:
    # Directories are made in the foreground, which costs nothing: "permission denied" is raised where it belongs.
    options = ocp.AsyncOptions(timeout_secs=_TIMEOUT_S, create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)


@contextlib.contextmanager
def _opened() -> Iterator[ocp.AsyncCheckpointer]:
    orbax = _orbax()
    try:
        yield orbax
    finally:
        _close(orbax)


def _close(orbax: ocp.AsyncCheckpointer) -> None:
    with contextlib.suppress(Exception):  # of a write that failed, which was said: it would take that message's place
        orbax.close()


def _begin(
    orbax: ocp.AsyncCheckpointer, final: Directory, tree: PyTree, meta: str, files: Mapping[str, Path | bytes]
) -> Directory:
    """Return the partial directory, into which Orbax is writing the host's copy of `tree` in the background."""
    wrong = [name for name in files if Path(name).is_absolute() or {"..", STATE, META, DIGESTS} & set(Path(name).parts)]
    if wrong:
        raise ValueError(f"files carried along need other names, inside the checkpoint: {', '.join(wrong)}")
    partial = commit.begin(final)
    try:
        if jax.process_index() == 0:
            commit.clear(partial)
            for name, content in {META: meta.encode(), **files}.items():
                storage.write(partial / name, content if isinstance(content, bytes) else content.read_bytes())
        with storage.errors_of(partial):
            orbax.save(str(partial / STATE), args=ocp.args.PyTreeSave(tree))
    except Exception:
        commit.discard(partial)
        raise
    return partial


def _finish(orbax: ocp.AsyncCheckpointer, partial: Directory, final: Directory) -> None:
    """Wait for Orbax, then make a checkpoint of it; on an error remove what there is and raise OSError."""
    try:
        orbax.wait_until_finished()
        if jax.process_index() == 0:
            commit.commit(partial, final)
    except Exception as error:  # TensorStore's are ValueErrors, whatever the disk said
        room = commit.room(final.parent)
        commit.discard(partial)
        raise OSError(f"{final}: the checkpoint could not be written{room}: {error}") from error


@contextlib.contextmanager
def _others_wait() -> Iterator[None]:
    """Hold the other processes until process 0 is through the block too, or they would look for it too early.

    One that fails waits for nobody: it ends, and the others with it.
    """
    yield
    # By the coordination service, because collectives belong to the main thread.
    ocp.multihost.get_barrier_sync_fn()(key=f"wmss-checkpoint-{next(_barriers)}", timeout_ms=_TIMEOUT_S * 1000)


def _meta_text(meta: Mapping[str, Any], step: int | None = None, metric: float | None = None) -> str:
    metric = None if metric is None or not math.isfinite(metric) else float(metric)  # a diverged run is no best one
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    own = {"format": FORMAT, "step": step, "metric": metric, "versions": versions}
    if own.keys() & meta.keys():
        raise ValueError(f"meta must not have the keys {', '.join(own)}: they are written for you")
    return json.dumps({**own, **meta}, indent=1, allow_nan=False) + "\n"


def read_part(directory: Name, tree: PyTree, prefix: tuple[str, ...], dtype: str | None = None) -> PyTree:
    """Return the arrays whose path begins with `prefix`, cast to `dtype` (None: as stored); see `restore`.

    Args:
        tree: shapes and shardings of all arrays there, and nothing else.
    """
    return _read(directory, tree, prefix, dtype)


def _read(directory: Name, tree: PyTree, prefix: tuple = (), dtype: str | None = None) -> PyTree:
    state = str(storage.absolute(directory) / STATE)
    with _opened() as orbax:
        stored = ocp.tree.to_flat_dict(orbax.metadata(state).item_metadata.tree)  # pyright: ignore
        stored = {name: leaf for name, leaf in stored.items() if name[: len(prefix)] == prefix}
        wanted = ocp.tree.to_flat_dict(tree)
        _check_match(directory, stored, wanted, dtypes=not prefix)
        if prefix:
            typed = {name: leaf.update(dtype=jnp.dtype(dtype or stored[name].dtype)) for name, leaf in wanted.items()}
            tree = ocp.tree.from_flat_dict(typed)
        tree = jax.tree.map(_placed, tree)
        restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
        args = ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=bool(prefix))
        return orbax.restore(state, args=args)


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_match(directory: Name, stored: Mapping, wanted: Mapping, dtypes: bool) -> None:
    listed = [
        {f"{'.'.join(name)} {str(leaf.dtype) * dtypes}{list(leaf.shape)}" for name, leaf in leaves.items()}
        for leaves in (stored, wanted)
    ]
    if listed[0] != listed[1]:
        only = [", ".join(sorted(mine - theirs)) or "nothing" for mine, theirs in (listed, listed[::-1])]
        raise ValueError(f"{directory}: arrays differ: only in the checkpoint: {only[0]}; only asked for: {only[1]}")
