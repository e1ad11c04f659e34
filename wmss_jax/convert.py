"""`wmss convert`: Hugging Face directories to checkpoints of roles and back, and a check of both directions."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from wmss_jax import card, checkpoint, encoding, hf, roles, sharding, storage, tensorfile, tokenizer
from wmss_jax.models import CausalLM
from wmss_jax.stages import ModelRef
from wmss_jax.storage import Name


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


def export(source: Name, out: str | os.PathLike, role: str = "strong") -> None:
    """Write one role of the checkpoint `source`, imported or trained, as a Hugging Face directory `out`.

    An adapter is merged into its base.

    Raises:
        FileExistsError: `out` holds something.
        ValueError: the checkpoint is damaged or has no such role.
    """
    ref = ModelRef(storage.path(source), role)
    model, params = ref.load(_mesh())
    files = card.files(Path(out).name, checkpoint.read_meta(source))
    hf.save(model, params, out, tokenizer_from=ref.assets if ref.assets.is_dir() else None, files=files)


def _mesh() -> Mesh | None:
    """Return a mesh on which several processes hold a part each of what is converted; None for one process."""
    return sharding.make_mesh() if jax.process_count() > 1 else None


def check(source: str | os.PathLike) -> Iterator[tuple[str, bool]]:
    """Yield one verdict a line, (text, whether it is good), on importing a directory, running it and exporting it.

    Writes to a temporary directory only. Of what does not fit, each tensor has its line: - only config.json has it,
    + only the file has it, ! both do, and differ.

    Raises:
        FileNotFoundError: there is no such directory, or it has no config.json or no safetensors.
        ValueError: the temporary directory has no room for an export.
    """
    directory = hf.resolve(source)
    tensors = tensorfile.tensors(directory)
    _check_room(directory, tensors)
    try:
        if hf.is_two_branch(directory):
            model, branches, _ = hf.load_branches(directory)
        else:
            model, params = hf.load(directory)
            branches = {"": params}
    except hf.TensorMismatch as error:
        yield f"import: {len(error.lines)} tensors of the file are not those that config.json asks for", False
        yield from ((line, False) for line in error.lines)
        return
    except ValueError as error:
        yield f"import: {error}", False
        return
    tensors = hf.tensors_in(directory, hf.read_config(directory))  # by the names that they are exported under
    for role, params in branches.items():
        prefix = hf.BRANCHES[role] if role else ""
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for verdict, good in _check_model(model, params, directory, own):
            yield f"{role} {verdict}".strip(), good
    if any((directory / name).exists() for name in tokenizer.FILES):
        yield _check_tokenizer(model, directory)


def _check_room(directory: Path, tensors: Mapping[str, tensorfile.Tensor]) -> None:
    needed = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    scratch = tempfile.gettempdir()
    if needed > (free := shutil.disk_usage(scratch).free):
        raise ValueError(
            f"{directory}: is checked with an export of {needed / 1e9:.3g} GB in {scratch}, where {free / 1e9:.3g} GB "
            f"are free; set TMPDIR to a directory with more"
        )


def _check_model(
    model: CausalLM, params: PyTree[jax.Array], directory: Path, tensors: dict[str, tensorfile.Tensor]
) -> Iterator[tuple[str, bool]]:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    dtypes = ", ".join(sorted(set(dict(model.file_dtypes).values())))
    yield f"import: {model.arch}, {count:,} parameters, {dtypes}", True
    tokens = np.arange(8, dtype=np.int32)[None] % model.config.sizes["V"]
    logits = np.asarray(jax.jit(model.logits)(params, tokens))
    spread = f"standard deviation {logits.std():.3g}"
    yield f"forward: logits {list(logits.shape)}, {spread}", bool(np.isfinite(logits).all())
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "export"
        hf.save(model, params, out, tokenizer_from=directory)
        again, params_again = hf.load(out)
        same = all(map(_same_bits, jax.tree.leaves(params), jax.tree.leaves(params_again))) and again == model
        yield f"export and re-import: parameters {'bit-identical' if same else 'DIFFER'}", same
        yield from _compare_files(tensors, tensorfile.tensors(out))


def _compare_files(
    theirs: Mapping[str, tensorfile.Tensor], ours: Mapping[str, tensorfile.Tensor]
) -> Iterator[tuple[str, bool]]:
    """Compare what was exported with the source, tensor by tensor; the source may repeat a tied head."""
    differ = []
    for name, tensor in ours.items():
        if name not in theirs:
            differ.append(f"+ {name}: source none, export {_shown(tensor)}")
        elif (_shown(theirs[name]), theirs[name].read().tobytes()) != (_shown(tensor), tensor.read().tobytes()):
            differ.append(f"! {name}: source {_shown(theirs[name])}, export {_shown(tensor)}, other bits")
    left_out = sorted(theirs.keys() - ours.keys())
    note = f"; left out: {', '.join(left_out)}" if left_out else ""
    same = f"{len(ours)} tensors bit-identical to the source's{note}"
    yield (f"files: {len(differ)} of {len(ours)} tensors DIFFER{note}", False) if differ else (f"files: {same}", True)
    yield from ((line, False) for line in differ)


def _shown(tensor: tensorfile.Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"


def _check_tokenizer(model: CausalLM, directory: Path) -> tuple[str, bool]:
    """Return what is to be said of a directory's tokenizer: whether it fits the model, and what ends an answer."""
    try:
        made = tokenizer.load(directory)
    except ValueError as error:
        return f"tokenizer: {error}", False
    said = f"tokenizer: {len(made):,} tokens in {model.sizes['V']:,} rows"
    if len(made) > model.sizes["V"]:
        return f"{said}, too few", False
    try:
        end = encoding.stop_token(made, chat_template=made.chat_template is not None)
    except ValueError as error:
        return f"{said}; {error}", True
    ends = json.loads(hf.generation_config(directory, end))["eos_token_id"]
    known = hf.stops(directory)
    note = "" if end in known else f", which its generation settings {known} do not stop at: an export here has {ends}"
    return f"{said}; an answer ends with {made.convert_ids_to_tokens(end)!r} ({end}){note}", True


def _same_bits(a: np.ndarray | jax.Array, b: np.ndarray | jax.Array) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
