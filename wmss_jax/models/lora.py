"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x·W + alpha/rank · (x·A)·B, with W frozen and A, B trained.

An adapter is a parameter tree of its own, with `lora_a` and `lora_b` where the base has a matrix; `adapt` joins the
two into a tree that the model takes in the base's place. Its conversion rows are made from the base's rows, with the
tensor names of PEFT. R is the rank.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from wmss_jax import matmul
from wmss_jax.models.table import Row


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which matrices get adapters, and of what rank.

    Attributes:
        targets: Hugging Face module names, matched at the end as PEFT does ("q_proj", "mlp.up_proj"), or "all" for
            every matrix of the layers.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | Literal["all"] = "all"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be >= 1, got {self.rank}")

    @property
    def scale(self) -> float:
        """The factor on the adapter's product."""
        return self.alpha / self.rank


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "a", "b"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A matrix with its adapter, in the place of the matrix in a parameter tree."""

    w: Array
    a: Array
    b: Array
    scale: float

    def __getitem__(self, whole: Any) -> "Adapted":
        assert whole is Ellipsis  # how a module reads its parameters
        return self


def project(equation: str, x: Array, weight: Array | Adapted) -> Array:
    """Return the einsum of `x` and a matrix, both in x's dtype; with an adapter, plus its low-rank product.

    The equation is like "BTD,DNH->BTNH": the matrix' letters are those it sums over with x, then new ones.
    """
    if not isinstance(weight, Adapted):
        return matmul.project(equation, x, weight)
    ins, out = equation.split("->")
    x_letters, w_letters = ins.split(",")
    summed = "".join(letter for letter in w_letters if letter in x_letters)
    kept = "".join(letter for letter in x_letters if letter not in summed)
    low = matmul.project(f"{x_letters},{summed}R->{kept}R", x, weight.a)
    added = matmul.project(f"{kept}R,R{w_letters.replace(summed, '')}->{out}", low, weight.b)
    return matmul.project(equation, x, jax.lax.stop_gradient(weight.w)) + weight.scale * added


def grouped(x_MD: Array, weight_EDF: Array | Adapted, sizes_E: Array) -> Array:
    """Return `matmul.grouped`, both in x's dtype; with adapters, plus the low-rank products of the same groups."""
    if not isinstance(weight_EDF, Adapted):
        return matmul.grouped(x_MD, weight_EDF, sizes_E)
    low_MR = matmul.grouped(x_MD, weight_EDF.a, sizes_E)
    added_MF = matmul.grouped(low_MR, weight_EDF.b, sizes_E)
    frozen = jax.lax.stop_gradient(weight_EDF.w)
    return matmul.grouped(x_MD, frozen, sizes_E) + weight_EDF.scale * added_MF


def targets(lora: Lora, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return the rows of the base's TABLE that get adapters.

    Raises:
        ValueError: a target matches no matrix of the layers.
    """
    matrices = {row: _module(row) for row in rows if row.stacked and len(row.their_axes) == 2}
    if lora.targets == "all":
        return tuple(matrices)
    matches = lambda module, target: module == target or module.endswith(f".{target}")
    unmatched = [t for t in lora.targets if not any(matches(module, t) for module in matrices.values())]
    if unmatched or not lora.targets:
        known = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in matrices.values()))
        what = f"{', '.join(map(repr, unmatched))}: no such matrix" if unmatched else "the list is empty"
        raise ValueError(f"lora.targets: {what}; the layers of this model have: {known}")
    return tuple(row for row, module in matrices.items() if any(matches(module, t) for t in lora.targets))


def adapter_rows(lora: Lora, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return the conversion rows of an adapter: PEFT's lora_A [rank, in] and lora_B [out, rank] of every target."""
    found = []
    for row in targets(lora, rows):
        out, in_ = row.their_axes
        name = "base_model.model." + row.name.removesuffix(".weight")
        found.append(Row(f"{row.path}.lora_a", f"{name}.lora_A.weight", f"R ({in_}) -> {in_} R"))
        found.append(Row(f"{row.path}.lora_b", f"{name}.lora_B.weight", f"({out}) R -> R {out}"))
    return tuple(found)


def init(lora: Lora, rows: Sequence[Row], sizes: Mapping[str, int], key: Array, dtype: Any) -> dict[str, Array]:
    """Return {path: array} of a fresh adapter, PEFT's default: A uniform in ±1/sqrt(in), B zero, so that A·B is 0."""
    leaves = {}
    for number, row in enumerate(adapter_rows(lora, rows)):
        shape = row.our_shape(sizes)
        bound = math.prod(row.their_shape(sizes)[1:]) ** -0.5 if row.path.endswith("lora_a") else 0.0
        draw = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
        leaves[row.path] = (draw if row.path.endswith("lora_a") else jnp.zeros(shape)).astype(dtype)
    return leaves


def adapt(lora: Lora, base: PyTree[Array], adapter: PyTree[Array]) -> PyTree:
    """Return the base's tree with `Adapted` matrices where the adapter has some; nothing is computed or copied."""
    if "lora_a" in adapter:
        return Adapted(base, adapter["lora_a"], adapter["lora_b"], lora.scale)
    return {**base, **{name: adapt(lora, base[name], inner) for name, inner in adapter.items()}}


def merge(lora: Lora, rows: Sequence[Row], base: PyTree[Array], adapter: PyTree[Array]) -> PyTree[Array]:
    """Return the base's tree with alpha/rank · A·B added to its matrices: in float32, rounded to the base's dtype."""
    axes = {row.path: row.letters.replace(" ", "") for row in targets(lora, rows)}
    low = {row.path: row.letters.replace(" ", "") for row in adapter_rows(lora, rows)}

    def added(path: str, leaf: Adapted) -> Array:
        equation = f"{low[path + '.lora_a']},{low[path + '.lora_b']}->{axes[path]}"
        a, b = leaf.a.astype(jnp.float32), leaf.b.astype(jnp.float32)
        delta = jnp.einsum(equation, a, b, precision="highest")
        return (leaf.w.astype(jnp.float32) + leaf.scale * delta).astype(leaf.w.dtype)

    def merged(path: tuple, leaf: Any) -> Any:
        return added(".".join(key.key for key in path), leaf) if isinstance(leaf, Adapted) else leaf

    adapted = adapt(lora, base, adapter)
    return jax.tree_util.tree_map_with_path(merged, adapted, is_leaf=lambda x: isinstance(x, Adapted))


def _module(row: Row) -> str:
    return row.name.removesuffix(".weight")
