"""Causal language models as pure functions of a parameter dict; one file per family.

`ARCHS` maps Hugging Face's `model_type` to the file of that family. A family's file has `Config`, `Model`, `TABLE`,
`from_hf` and `to_hf`; everything else sees `CausalLM`.
"""

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, PyTree

from wmss_jax import attention, head, precision, sharding
from wmss_jax.models import (
    gemma2,
    gemma3,
    layers,
    llama,
    lora,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from wmss_jax.models.lora import Lora
from wmss_jax.models.table import Row

ARCHS: dict[str, ModuleType] = {
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "llama": llama,
    "mistral": mistral,
    "olmo2": olmo2,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
}


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """A model without its parameters: hashable, static under jit, and equal for equal settings.

    Attributes:
        arch: the family, a key of ARCHS.
        config: that family's `Config`.
        compute_dtype: of activations and matmuls; None computes in the dtype of the parameters.
        remat: what a layer keeps for the backward pass: "none" keeps all, "dots" matmul results, "full" nothing.
        attention: the backend (`attention.Backend`); None: the one that the devices want.
        lora: with it the trained parameters are those of an adapter: `init`, `rows` and all that follows from them are
            the adapter's, and `hidden` takes what `adapt` makes of base and adapter.
        vocab_size: tokens that exist. Rows beyond it are padding and get no probability; None: every row is a token.
        file_dtypes: (path, dtype) of the checkpoint's tensors, in which `save` writes, and (their name, dtype) of those
            that differ from others of their parameter; no part of equality.
    """

    arch: str
    config: Any
    compute_dtype: str | None = None
    remat: str = "none"
    attention: str | None = None
    vocab_size: int | None = None
    lora: Lora | None = None
    file_dtypes: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.lora is not None:
            lora.targets(self.lora, self.base.rows)  # says which target is none of this model's

    def hidden(
        self,
        params: PyTree[Array],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the final-norm hidden states, [B, T, D] in the compute dtype; arguments as of `hidden_and_metrics`."""
        return self.hidden_and_metrics(params, tokens, positions, segments)[0]

    def hidden_and_metrics(
        self,
        params: PyTree[Array],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Return the final-norm hidden states, [B, T, D] in the compute dtype, and what the layers measured, averaged.

        Of a mixture of experts that is "load_balance"; of other models, nothing.

        Args:
            positions: restart at 0 in every segment; default 0, 1, 2, ... in each row.
            segments: tokens attend within their own segment only; default one segment a row.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
        segments = jnp.ones_like(tokens) if segments is None else segments
        dtype = self.dtype(params)
        with precision.matmuls_in(dtype), attention.using(self.attention):
            return self._merge(params).hidden(tokens, positions, segments, dtype=dtype, remat=self.remat)

    def decode(
        self,
        params: PyTree[Array],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: tuple[layers.Cache, ...],
    ) -> tuple[Float[Array, "B T D"], tuple[layers.Cache, ...]]:
        """Return `hidden` of tokens that follow those in the cache, and the cache with these added.

        The same function reads a prompt (T > 1, empty cache) and continues it (T = 1).

        Args:
            positions: of the tokens, consecutive in every row and below the cache's length. Tokens at
                positions above a row's own may be anything: later ones overwrite them.
            cache: from `empty_cache`, or returned by an earlier call.
        """
        dtype = self.dtype(params)
        with precision.matmuls_in(dtype):
            return self._merge(params).decode(tokens, positions, cache, dtype=dtype)

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype | str) -> tuple[layers.Cache, ...]:
        """Return a cache for `batch` rows of up to `length` tokens, of every layer one."""
        sizes = {**self.config.sizes, "B": batch, "S": length}
        zeros = lambda letters: sharding.constrain(
            jnp.zeros([sizes[letter] for letter in letters.split()], dtype), letters
        )
        return tuple(layers.Cache(zeros("B K H S"), zeros("B K S H")) for _ in range(sizes["L"]))

    def dtype(self, params: PyTree[Array]) -> jnp.dtype:
        """Return the dtype that activations are computed in."""
        # Of a role whose hidden states are cached there is the head alone.
        return jnp.dtype(self.compute_dtype or params["embed" if "embed" in params else "unembed"].dtype)

    def unembed(self, params: PyTree[Array]) -> Float[Array, "D V"]:
        """Return the head's matrix, hidden states to logits; for tied models the embedding, transposed.

        `params` may be those of `head_row` alone.
        """
        return params["embed"].T if self.config.tied else params["unembed"]

    def logits(
        self,
        params: PyTree[Array],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Return float32 logits [B, T, V], whole: for small uses and tests; training never makes this array."""
        hidden_BTD = self.hidden(params, tokens, positions, segments)
        with precision.matmuls_in(hidden_BTD.dtype):
            return head.logits(hidden_BTD, self.unembed(params), self.vocab_size, self.softcap)

    def init(self, key: Array, dtype: str = "float32", mesh: Mesh | None = None) -> PyTree[Array]:
        """Return random parameters, of an adapter ones that change nothing; with a mesh they are born sharded."""

        def make(key: Array) -> PyTree[Array]:
            if self.lora is not None:
                return self.tree(lora.init(self.lora, self.base.rows, self.sizes, key, jnp.dtype(dtype)))
            return nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(params=key), jnp.dtype(dtype))))

        return jax.jit(make, out_shardings=self.shardings(mesh))(key)

    def abstract(self, dtype: str = "float32", mesh: Mesh | None = None) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the shapes of the parameters and, with a mesh, their shardings."""
        shape = lambda row: jax.ShapeDtypeStruct(
            row.our_shape(self.sizes), jnp.dtype(dtype), sharding=self.sharding(row, mesh)
        )
        return self.tree({row.path: shape(row) for row in self.rows})

    @property
    def base(self) -> "CausalLM":
        """The model without adapter."""
        return dataclasses.replace(self, lora=None)

    def adapt(self, base: PyTree[Array], adapter: PyTree[Array]) -> PyTree:
        """Return the parameters that `hidden` and `unembed` take, of those of the base and of its adapter."""
        return lora.adapt(self._lora, base, adapter)

    def merge(self, base: PyTree[Array], adapter: PyTree[Array], mesh: Mesh | None = None) -> PyTree[Array]:
        """Return parameters of the base's kind that compute the same without an adapter, but for rounding."""
        merge = lambda base, adapter: lora.merge(self._lora, self.base.rows, base, adapter)
        return jax.jit(merge, out_shardings=self.base.shardings(mesh))(base, adapter)

    @property
    def _lora(self) -> Lora:
        if self.lora is None:
            raise ValueError("this model has no adapter: it was made without lora")
        return self.lora

    @property
    def sizes(self) -> dict[str, int]:
        """The value of every shape letter."""
        return self.config.sizes if self.lora is None else {**self.config.sizes, "R": self.lora.rank}

    @property
    def softcap(self) -> float | None:
        """The bound that logits are squeezed into, cap·tanh(z / cap); None: there is none."""
        return getattr(self.config, "logit_softcap", None)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the family's TABLE that this config has; with `lora` those of the adapter."""
        rows = tuple(row for row in ARCHS[self.arch].TABLE if not (row.untied_only and self.config.tied))
        return rows if self.lora is None else lora.adapter_rows(self.lora, rows)

    @property
    def head_row(self) -> Row:
        """The row of the one parameter that `unembed` needs."""
        return next(row for row in self.base.rows if row.path == ("embed" if self.config.tied else "unembed"))

    @property
    def letters(self) -> PyTree[str]:
        """The shape letters of every parameter, as a tree like the parameters."""
        return self.tree({row.path: row.letters for row in self.rows})

    def shardings(self, mesh: Mesh | None) -> PyTree | None:
        """Return the shardings of the parameters on `mesh`; None without one."""
        return None if mesh is None else self.tree({row.path: self.sharding(row, mesh) for row in self.rows})

    def sharding(self, row: Row, mesh: Mesh | None) -> NamedSharding | None:
        """Return the sharding of one parameter on `mesh`; None without one."""
        return None if mesh is None else sharding.param_sharding(row.letters, row.our_shape(self.sizes), mesh)

    @property
    def vocabulary(self) -> tuple[int, int]:
        """(tokens that exist, rows of the head); roles whose logits meet must agree in the first."""
        rows = self.config.sizes["V"]
        return (rows if self.vocab_size is None else self.vocab_size, rows)

    @staticmethod
    def tree(leaves: dict[str, Any]) -> dict[str, Any]:
        """Return {"a.b": x} as {"a": {"b": x}}."""
        root: dict[str, Any] = {}
        for path, leaf in leaves.items():
            *parents, last = path.split(".")
            functools.reduce(lambda node, name: node.setdefault(name, {}), parents, root)[last] = leaf
        return root

    def _make(self, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.Module:
        return ARCHS[self.arch].Model(self.config, rngs, dtype)

    def _merge(self, params: PyTree[Array]) -> Any:
        return nnx.merge(_graphdef(self.arch, self.config), params)


@functools.cache
def _graphdef(arch: str, config: Any) -> nnx.GraphDef:
    """Return the structure of a family's module, made once per config and without allocating parameters."""
    make = lambda: ARCHS[arch].Model(config, nnx.Rngs(0), jnp.dtype("float32"))
    return nnx.split(nnx.eval_shape(make))[0]
