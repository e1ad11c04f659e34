"""The model card: README.md of a directory that is shipped, with the lineage of what lies in it."""

import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECIPE = "wmss_recipe.yaml"
_LIBRARIES = ("wmss-jax", "jax", "jaxlib", "flax", "optax", "transformers", "numpy")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*", re.ASCII)


def files(name: str, meta: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return {file name: text}: the card and, of what a recipe made, the recipe.

    Args:
        name: heading of the card.
        meta: of the checkpoint that is shipped (`checkpoint.read_meta`), trained or imported.
        facts: further rows of its table.
    """
    recipe = meta.get("recipe")
    rows = {**_lineage(meta), **(facts or {}), "versions": _versions()}
    table = "".join(f"| {key} | {_cell(value)} |\n" for key, value in rows.items() if value is not None)
    base = _base(meta)
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [weak-driven-learning, wmss]"]
    if base is not None and _HUB_ID.fullmatch(base) and not Path(base).exists():
        front.insert(0, f"base_model: {base}")
    how = "It was converted by `wmss convert`, its parameters unchanged."
    if recipe is not None:
        how = (
            "It is the strong branch, alone, of weak-driven training (WMSS, "
            "[arXiv 2602.08222](https://arxiv.org/abs/2602.08222)); "
            f" `{RECIPE}` beside this file is the whole recipe, and `wmss run {RECIPE}` carries it out again."
        )
    text = "---\n" + "\n".join(front) + f"\n---\n\n# {name}\n\n{how}\n\n| | |\n|---|---|\n{table}"
    return {"README.md": text} if recipe is None else {"README.md": text, RECIPE: json.dumps(recipe, indent=1) + "\n"}


def _base(meta: Mapping[str, Any]) -> str | None:
    return meta["recipe"]["model"]["path"] if "recipe" in meta else meta.get("source")


def _lineage(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of where it comes from."""
    if "recipe" not in meta:
        return {"source": meta.get("source"), "λ of the two branches": meta.get("lam")}
    recipe, lineage = meta["recipe"], meta.get("lineage", {})
    joint = recipe["joint"]
    weak = joint["weak"].get("path") or "the base, before fine-tuning"
    digest = lambda role: f" (digest {lineage[role]})" if role in lineage else ""
    sources = ", ".join(source["path"] for source in recipe["dataset"]["train"])
    return {
        "base": _base(meta) or f"random parameters, {recipe['model']['config']}",
        "stage": f"{meta['stage']}, {meta['step']} steps" if "stage" in meta else None,
        "objective": lineage.get("objective"),
        "started from": f"the SFT checkpoint{digest('strong')}" if "weak" in lineage else None,
        "weak agent": f"{weak}{digest('weak')}" if "weak" in lineage else None,
        "teacher": f"{joint.get('teacher')}{digest('teacher')}" if "teacher" in lineage else None,
        "data": sources + (f" (digest {lineage['data']})" if "data" in lineage else ""),
        "seed": recipe["seed"],
    }


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return ", ".join(found)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
