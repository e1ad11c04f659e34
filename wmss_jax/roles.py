"""The roles of a checkpoint: which models its parameters belong to, and the way to one of them alone.

A checkpoint of training and one that was imported look alike: "params" holds a tree for every role, and meta.json says
under "roles" what models these are.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from wmss_jax import checkpoint, hf
from wmss_jax.digests import Level
from wmss_jax.models import ARCHS, CausalLM
from wmss_jax.models.lora import Lora
from wmss_jax.storage import Name

ASSETS = "assets"  # the directory of a checkpoint that serves `hf.save` as `tokenizer_from`


def describe(models: Mapping[str, CausalLM]) -> dict[str, Any]:
    """Return {role: what `load` makes its model of}; put it into `meta` as "roles"."""
    return {
        role: {
            "arch": model.arch,
            "config": ARCHS[model.arch].to_hf(model.config),
            "compute_dtype": model.compute_dtype,
            "remat": model.remat,
            "vocab_size": model.vocab_size,
            "lora": None if model.lora is None else dataclasses.asdict(model.lora),
            "file_dtypes": dict(model.file_dtypes),
        }
        for role, model in models.items()
    }


def asset_files(source: str | os.PathLike) -> dict[str, Path]:
    """Return `files` with what makes a Hugging Face directory or hub id usable besides its weights.

    They come to lie in `<checkpoint>/assets`, which serves `hf.save` as `tokenizer_from`.
    """
    directory = hf.resolve(source)
    present = [name for name in ("config.json", *hf.CARRIED) if (directory / name).exists()]
    return {f"{ASSETS}/{name}": directory / name for name in present}


def save(
    directory: Name,
    roles: Mapping[str, tuple[CausalLM, PyTree[Array]]],
    meta: Mapping[str, Any],
    assets_from: str | os.PathLike | None = None,
) -> None:
    """Write a checkpoint of parameters alone, {role: (model, params)}, laid out like one of training; see
    `checkpoint.save`.
    """
    tree = {"params": {role: params for role, (_, params) in roles.items()}}
    meta = {**meta, "roles": describe({role: model for role, (model, _) in roles.items()})}
    checkpoint.save(directory, tree, meta, {} if assets_from is None else asset_files(assets_from))


def models(directory: Name) -> dict[str, CausalLM]:
    """Return the models of a checkpoint's roles, without parameters."""
    found = {}
    for role, said in checkpoint.read_meta(directory).get("roles", {}).items():
        config = ARCHS[said["arch"]].from_hf(said["config"])
        lora = said.get("lora")
        if lora is not None:
            targets = lora["targets"] if lora["targets"] == "all" else tuple(lora["targets"])
            lora = Lora(lora["rank"], lora["alpha"], targets)
        dtypes = tuple(said["file_dtypes"].items())
        found[role] = CausalLM(**{**said, "config": config, "lora": lora, "file_dtypes": dtypes})
    return found


def load(
    directory: Name,
    role: str,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    verify: Level = "full",
    *,
    head_only: bool = False,
) -> tuple[CausalLM, PyTree[Array]]:
    """Return model and parameters of one role, of a training checkpoint too: its optimizer state is not restored.

    Of an adapter (`CausalLM.lora`), that is the adapter without its base.

    Args:
        mesh, dtype: as for `hf.load`; default: the default device, and the dtype in the checkpoint.
        verify: what is checked first, of the whole checkpoint; see `checkpoint.verify`.
        head_only: read the parameters that `CausalLM.unembed` needs, and no others.

    Raises:
        CheckpointDamaged: it is not what was written.
        ValueError: it has no such role, or not the arrays that the role's config asks for.
    """
    checkpoint.verify(directory, verify)
    found = models(directory)
    if role not in found:
        raise ValueError(f"{directory}: has no role {role!r}; it has: {', '.join(sorted(found)) or 'none'}")
    model = found[role]
    params, prefix = model.abstract(mesh=mesh), ("params", role)
    if head_only:
        path = model.head_row.path
        params, prefix = {path: params[path]}, (*prefix, path)
    return model, checkpoint.read_part(directory, {"params": {role: params}}, prefix, dtype)["params"][role]
