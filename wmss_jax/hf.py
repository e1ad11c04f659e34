"""Hugging Face directories and hub ids to parameters and back, tensor by tensor; no pickles, no remote code."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from wmss_jax import durable, processes, streaming, tensorfile
from wmss_jax.models import ARCHS, CausalLM, multimodal
from wmss_jax.models.table import Row

# Everything besides weights and config that makes a directory usable: tokenizer, chat template, generation settings.
CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
MAX_SHARD_BYTES = 5 * 10**9
# Keys that the released two-branch checkpoints add to a Qwen3 config (their EnsembleQwen3/modeling_qwen3.py).
_BRANCH_KEYS = ("num_sub_models", "is_llmboost", "sub_model_cfgs", "fusion_lambda")
BRANCHES = {"weak": "sub_models.0.", "strong": "sub_models.1."}


class TensorMismatch(ValueError):
    """The tensors of a file are not those that its config.json asks for; `lines` has one for each, both sides of it."""

    def __init__(
        self, directory: Path, arch: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
    ):
        missing = sorted(expected.keys() - found.keys())
        extra = sorted(found.keys() - expected.keys())
        misshaped = [name for name in sorted(expected.keys() & found.keys()) if found[name] != expected[name]]
        sides = {name: f"file {list(found[name])}, config {list(expected[name])}" for name in misshaped}
        self.lines = [
            *(f"- {name}: file none, config {list(expected[name])}" for name in missing),
            *(f"+ {name}: file {list(found[name])}, config none" for name in extra),
            *(f"! {name}: {both}" for name, both in sides.items()),
        ]
        listed = {"missing": missing, "extra": extra, "misshaped": [f"{name} ({both})" for name, both in sides.items()]}
        said = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in listed.items() if names)
        super().__init__(f"{directory}: tensors and config.json ({arch}) do not match: {said}")


def load(
    path_or_hub_id: str | os.PathLike,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    *,
    compute_dtype: str | None = None,
    remat: str = "none",
    vocab_size: int | None = None,
) -> tuple[CausalLM, PyTree[Array]]:
    """Return a model and its parameters from a Hugging Face directory or hub id.

    Args:
        mesh: parameters are read straight into their shards on it; default: the default device.
        dtype: of the parameters, such as "float32" for training; default: that of the file.
        compute_dtype, remat, vocab_size: see `CausalLM`.

    Raises:
        FileNotFoundError: no such directory or hub id, or no safetensors in it.
        ValueError: the config asks for something unimplemented, or tensors are missing, extra or misshaped.
    """
    directory = resolve(path_or_hub_id)
    hf = read_config(directory)
    if "num_sub_models" in hf:
        raise ValueError(f"{directory}: holds two branches; `wmss convert import` splits them into roles")
    model = from_config(hf, compute_dtype=compute_dtype, remat=remat, vocab_size=vocab_size)
    return _read(model, directory, tensors_in(directory, hf), mesh, dtype)


def model_of(path_or_hub_id: str | os.PathLike, **settings: Any) -> CausalLM:
    """Return the model that `load` returns, without reading any parameters; `settings` are fields of `CausalLM`."""
    directory = resolve(path_or_hub_id)
    hf = read_config(directory)
    return _with_file_dtypes(from_config(hf, **settings), tensors_in(directory, hf))


def load_head(path_or_hub_id: str | os.PathLike, mesh: Mesh | None = None) -> PyTree[Array]:
    """Return the parameters that `CausalLM.unembed` needs, in the file's dtype; nothing else is read."""
    directory = resolve(path_or_hub_id)
    hf = read_config(directory)
    model, tensors = from_config(hf), tensors_in(directory, hf)
    _check_names_and_shapes(model, directory, tensors)
    row = model.head_row
    dtype = jnp.dtype(dict(_with_file_dtypes(model, tensors).file_dtypes)[row.path])
    return model.tree(
        {row.path: streaming.read(row, [tensors[row.name]], model.sizes, dtype, model.sharding(row, mesh))}
    )


def load_branches(
    path_or_hub_id: str | os.PathLike, mesh: Mesh | None = None, dtype: str | None = None
) -> tuple[CausalLM, dict[str, PyTree[Array]], float]:
    """Return (model, {"weak": params, "strong": params}, λ) of a two-branch checkpoint of the released code.

    Its `sub_models.0.` is the weak branch, `sub_models.1.` the strong one; λ is `fusion_lambda`, 0.5 if not given.
    """
    directory = resolve(path_or_hub_id)
    hf = read_config(directory)
    tensors = tensorfile.tensors(directory)
    stray = [name for name in tensors if not name.startswith(tuple(BRANCHES.values()))]
    if stray:
        raise ValueError(f"{directory}: not a two-branch checkpoint: extra {', '.join(stray)}")
    model = from_config({key: value for key, value in hf.items() if key not in _BRANCH_KEYS})
    roles = {}
    for role, prefix in BRANCHES.items():
        branch = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        model, roles[role] = _read(model, directory, branch, mesh, dtype)
    return model, roles, float(hf.get("fusion_lambda", 0.5))


def is_two_branch(path_or_hub_id: str | os.PathLike) -> bool:
    """Return whether a directory is a two-branch checkpoint of the released code."""
    return "num_sub_models" in read_config(resolve(path_or_hub_id))


def save(
    model: CausalLM,
    params: PyTree[Array],
    out_dir: str | os.PathLike,
    *,
    tokenizer_from: str | os.PathLike | None = None,
    files: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory that transformers, vLLM and lm-eval load, each tensor in its source's dtype.

    The directory appears whole, its tensors read back and compared, or not at all. On several processes all have to
    ask; process 0 writes, tensor by tensor.

    Args:
        out_dir: must not exist, or be empty.
        tokenizer_from: directory or hub id to copy tokenizer, template and generation files from, and those keys of
            config.json that say nothing about the architecture (token ids, for instance).
        files: {name: text} of further files, such as a model card; they replace those that are copied.

    Raises:
        FileExistsError: `out_dir` holds something.
        OSError: it could not be written, or reads back differently.
    """
    source = None if tokenizer_from is None else resolve(tokenizer_from)
    dtypes = dict(model.file_dtypes) or {row.path: str(leaf_of(params, row).dtype) for row in model.rows}
    if not processes.first():
        for _ in _their_tensors(model, params, dtypes):
            pass  # gives its parts of them
        return
    with new_directory(out_dir) as directory:
        config = _merged_config(model, dtypes["embed"], source)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if source is not None:
            carry(source, directory)
        write_texts(directory, files or {})
        sizes = {
            name: math.prod(row.their_shape(model.config.sizes)) * _file_dtype(dtypes, row, name).itemsize
            for row in model.rows
            for name in row.names(model.config.sizes)
        }
        tensorfile.write(directory, _their_tensors(model, params, dtypes), sizes, max_shard_bytes)


def resolve(path_or_hub_id: str | os.PathLike) -> Path:
    """Return the local directory of a path, or of a hub id after downloading it.

    Raises:
        FileNotFoundError: neither a directory nor a hub id that can be had.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name}: no such directory, and the hub gave nothing: {reason}") from error


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a directory, or that file itself, as a dict."""
    file = path if path.suffix == ".json" else path / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error


def from_config(hf: Mapping[str, Any], **settings: Any) -> CausalLM:
    """Return the model of a config.json; `settings` are the other fields of `CausalLM`.

    Raises:
        ValueError: the family, or something its config asks for, is not implemented.
    """
    hf = multimodal.text_config(hf)
    arch = hf.get("model_type")
    if arch not in ARCHS:
        known = ", ".join([*ARCHS, *multimodal.TEXT_PARTS])
        raise ValueError(f"config.json: model_type {arch!r} is not implemented; implemented: {known}")
    return CausalLM(arch, ARCHS[arch].from_hf(dict(hf)), **settings)


def tensors_in(directory: Path, hf: Mapping[str, Any]) -> dict[str, tensorfile.Tensor]:
    """Return the tensors of a model directory by their names in a text model; other parts' are left out, with a note.

    Args:
        hf: its config.json.
    """
    tensors, others = multimodal.text_tensors(hf.get("model_type", ""), tensorfile.tensors(directory))
    if others:
        parts = ", ".join(sorted({name.removeprefix("model.").partition(".")[0] for name in others}))
        logging.getLogger(__name__).warning("%s: %d tensors of %s are left out", directory, len(others), parts)
    return tensors


def carry(source: Path, directory: Path) -> None:
    """Copy what makes a directory usable besides weights and config: those of the CARRIED files that there are."""
    for name in CARRIED:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)


def write_texts(directory: Path, files: Mapping[str, str]) -> None:
    """Write text files, {name: text}."""
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


def generation_config(source: Path, stop_id: int) -> str:
    """Return generation_config.json of what was trained from a directory: its own, with `stop_id` among the ends.

    What a base model ends a text with is often not what its answers were trained to end with: served without the
    latter, it would answer without an end.
    """
    said, config = _generation_settings(source)
    ends = stops(source)
    ids = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    ends = ends if stop_id in ends else [*ends, stop_id]
    whole = {**ids, **said, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    return json.dumps(whole, indent=2) + "\n"


def stops(source: Path) -> list[int]:
    """Return the tokens that generation stops at by a directory's generation_config.json or config.json."""
    said, config = _generation_settings(source)
    ends = said.get("eos_token_id", config.get("eos_token_id"))
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _generation_settings(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    file = source / "generation_config.json"
    said = read_config(file) if file.exists() else {}
    return said, read_config(source) if (source / "config.json").exists() else {}


@contextlib.contextmanager
def new_directory(out_dir: str | os.PathLike) -> Iterator[Path]:
    """Give a directory to fill that takes its final name only when the block ends without an error.

    Raises:
        FileExistsError: `out_dir` exists and is not empty.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists already; choose another directory or remove it")
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        durable.sync_tree(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
        durable.sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _read(
    model: CausalLM, directory: Path, tensors: dict[str, tensorfile.Tensor], mesh: Mesh | None, dtype: str | None
) -> tuple[CausalLM, PyTree[Array]]:
    _check_names_and_shapes(model, directory, tensors)
    model = _with_file_dtypes(model, tensors)
    dtypes, sizes, leaves = dict(model.file_dtypes), model.config.sizes, {}
    for row in model.rows:
        parts = [tensors[name] for name in row.names(sizes)]
        leaves[row.path] = streaming.read(
            row, parts, sizes, jnp.dtype(dtype or dtypes[row.path]), model.sharding(row, mesh)
        )
    return model, model.tree(leaves)


def _with_file_dtypes(model: CausalLM, tensors: Mapping[str, tensorfile.Tensor]) -> CausalLM:
    """Return the model with each parameter's dtype in the file: where layers differ, the widest, which is exact.

    A tensor that has another than its parameter is listed too, by its own name.
    """
    dtypes: dict[str, str] = {}
    for row in model.rows:
        found = {name: tensors[name].dtype for name in row.names(model.config.sizes) if name in tensors}
        if found:
            widest = dtypes[row.path] = str(jnp.result_type(*set(found.values())))
            dtypes |= {name: str(dtype) for name, dtype in found.items() if dtype != widest}
    return dataclasses.replace(model, file_dtypes=tuple(dtypes.items()))


def _check_names_and_shapes(model: CausalLM, directory: Path, tensors: dict[str, tensorfile.Tensor]) -> None:
    """Raise ValueError with everything that is wrong, on both sides; drop a tied head that repeats the embedding."""
    sizes = model.config.sizes
    expected = {name: row.their_shape(sizes) for row in model.rows for name in row.names(sizes)}
    tied = [row for row in ARCHS[model.arch].TABLE if row.untied_only and row not in model.rows]
    embed = next(row for row in model.rows if row.path == "embed")
    for row in tied:
        head = tensors.pop(row.name, None)
        if head is not None and not np.array_equal(head.read(), tensors[embed.name].read()):
            raise ValueError(
                f"{directory}: config.json ties {row.name} to {embed.name}, but the file holds different values; "
                f"set tie_word_embeddings to false, or remove {row.name}"
            )
    found = {name: tensor.shape for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if any(found.get(name) != expected.get(name) for name in {**found, **expected}):
        raise TensorMismatch(directory, model.arch, found, expected)


def _their_tensors(model: CausalLM, params: PyTree, dtypes: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    sizes = model.config.sizes
    for row in model.rows:
        for name, array in tensors_of(row, leaf_of(params, row), sizes):
            yield name, array.astype(_file_dtype(dtypes, row, name))


def _file_dtype(dtypes: Mapping[str, str], row: Row, name: str) -> np.dtype:
    """Return the dtype of one of a row's tensors in a file, given `CausalLM.file_dtypes`."""
    return jnp.dtype(dtypes.get(name, dtypes[row.path]))


def tensors_of(row: Row, leaf: Array, sizes: Mapping[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the Hugging Face tensors that make up a parameter; no more than a layer of it is gathered at once."""
    layer, array = None, None
    for index, name in zip(row.indices(sizes), row.names(sizes), strict=True):
        if array is None or index[:1] != layer:
            layer, array = index[:1], processes.whole(leaf[index[0]] if index else leaf)
        yield name, row.to_theirs(array[index[1:]], sizes)


def leaf_of(params: PyTree, row: Row) -> Array:
    """Return the parameter that a row is about."""
    for name in row.path.split("."):
        params = params[name]
    return params


def _merged_config(model: CausalLM, dtype: str, source: Path | None) -> dict[str, Any]:
    """Return our config over what the source's config.json says besides, in a form transformers 4 and 5 both read."""
    base = read_config(source) if source is not None and (source / "config.json").exists() else {}
    base = {key: value for key, value in base.items() if key not in (*_BRANCH_KEYS, "auto_map")}
    base = multimodal.text_config(base)
    if base.get("model_type") != model.arch:
        base = {}
    ours = ARCHS[model.arch].to_hf(model.config)
    # transformers 4 before .56 reads `torch_dtype`, later ones `dtype`.
    return {**base, **ours, "dtype": dtype, "torch_dtype": dtype}
