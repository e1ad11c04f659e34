"""`wmss convert`: Hugging Face directories to checkpoints of roles and back, and a check of both directions."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from wmss_jax import hf, roles, sharding, tensorfile
from wmss_jax.stages import ModelRef


def import_(source: str | os.PathLike, out: str | os.PathLike, dtype: str | None = None) -> None:
    """Write the checkpoint `out` from a Hugging Face directory or hub id.

    A plain model becomes the role "strong". A two-branch checkpoint of the released code becomes "weak" and "strong",
    with its λ in the checkpoint's meta.json.

    Args:
        dtype: of the parameters; default: that of the file.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError, ValueError: see `hf.load`.
    """
    directory = hf.resolve(source)
    if hf.is_two_branch(directory):
        model, branches, lam = hf.load_branches(directory, _mesh(), dtype)
        found, meta = {role: (model, params) for role, params in branches.items()}, {"lam": lam}
    else:
        found, meta = {"strong": hf.load(directory, _mesh(), dtype)}, {}
    roles.save(out, found, {"source": str(source), **meta}, assets_from=directory)


def export(source: str | os.PathLike, out: str | os.PathLike, role: str = "strong") -> None:
    """Write one role of the checkpoint `source`, imported or trained, as a Hugging Face directory `out`.

    An adapter is merged into its base.

    Raises:
        FileExistsError: `out` holds something.
        ValueError: the checkpoint is damaged or has no such role.
    """
    model, params = ModelRef(Path(source), role).load(_mesh())
    assets = Path(source) / roles.ASSETS
    hf.save(model, params, out, tokenizer_from=assets if assets.is_dir() else None)


def _mesh() -> Mesh | None:
    """Return a mesh on which several processes hold a part each of what is converted; None for one process."""
    return sharding.make_mesh() if jax.process_count() > 1 else None


def check(source: str | os.PathLike) -> Iterator[tuple[str, bool]]:
    """Yield one verdict a line, (text, whether it is good), on importing a directory, running it and exporting it.

    Writes to a temporary directory only.
    """
    directory = hf.resolve(source)
    try:
        model, params = hf.load(directory)
    except (ValueError, FileNotFoundError) as error:
        yield f"import: {error}", False
        return
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    yield (
        f"import: {model.arch}, {count:,} parameters, {', '.join(sorted(set(dict(model.file_dtypes).values())))}",
        True,
    )
    tokens = np.arange(8, dtype=np.int32)[None] % model.config.sizes["V"]
    logits = np.asarray(jax.jit(model.logits)(params, tokens))
    yield (
        f"forward: logits {list(logits.shape)}, standard deviation {logits.std():.3g}",
        bool(np.isfinite(logits).all()),
    )
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "export"
        hf.save(model, params, out, tokenizer_from=directory)
        _, again = hf.load(out)
        same = all(map(_same_bits, jax.tree.leaves(params), jax.tree.leaves(again)))
        yield f"export and re-import: parameters {'bit-identical' if same else 'DIFFER'}", same
        yield _compare_files(tensorfile.tensors(directory), tensorfile.tensors(out))


def _compare_files(theirs: dict[str, tensorfile.Tensor], ours: dict[str, tensorfile.Tensor]) -> tuple[str, bool]:
    """Compare what was exported with the source, tensor by tensor; the source may repeat a tied head."""
    differ = [
        name
        for name, tensor in ours.items()
        if name not in theirs
        or tensor.dtype != theirs[name].dtype
        or not _same_bits(tensor.read(), theirs[name].read())
    ]
    left_out = sorted(theirs.keys() - ours.keys())
    note = f"; left out: {', '.join(left_out)}" if left_out else ""
    if differ:
        return f"files: DIFFER in {', '.join(differ)}{note}", False
    return f"files: {len(ours)} tensors bit-identical to the source's{note}", True


def _same_bits(a: np.ndarray | jax.Array, b: np.ndarray | jax.Array) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
