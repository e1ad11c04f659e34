"""What every family's model is: an embedding, its layers in one scan, a final norm.

Layers of a model have parameters of equal shapes, stacked along a leading axis L, but may differ in kind: in their
sliding window and in how they know positions. They are compiled once for all of them: the kind is a traced number, by
which a layer picks its turn from a table and its window. So a pattern of any period, with or without a remainder,
is the same program; grouping layers by period would compile one body for each layer of a period, and copy parameters
wherever the number of layers is no multiple of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from wmss_jax import sharding
from wmss_jax.attention import OneOf
from wmss_jax.models import layers, rope
from wmss_jax.models.architecture import Config, Kind
from wmss_jax.models.rope import Rope

# What a layer keeps for its backward pass: everything, the results of matmuls, or only its input.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Decoder(nnx.Module):
    """Tokens to final-norm hidden states; the head is applied elsewhere, chunk by chunk.

    Args:
        block: makes one layer.
        kinds: of the layers, in order; default: the config's.
        norm_offset: of the final norm, see `RMSNorm`.
        embed_scale: factor on embeddings, rounded to the activations' dtype as transformers does.
    """

    def __init__(
        self,
        config: Config,
        block: Callable[[nnx.Rngs], nnx.Module],
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        *,
        kinds: Sequence[Kind] | None = None,
        norm_offset: float = 0.0,
        embed_scale: float | None = None,
    ):
        self.head_dim, self.embed_scale = config.head_dim, embed_scale
        self.kinds = config.kinds if kinds is None else tuple(kinds)
        self.embed = layers.matrix(rngs, dtype, config.init_std, config.vocab_size, config.hidden_size)
        self.layers = nnx.vmap(block)(rngs.split(config.num_layers))
        self.final_norm = layers.RMSNorm(config.hidden_size, config.norm_eps, dtype, norm_offset)
        if not config.tied:
            self.unembed = layers.matrix(rngs, dtype, config.init_std, config.hidden_size, config.vocab_size)

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        *,
        dtype: jnp.dtype,
        remat: str = "none",
    ) -> tuple[Float[Array, "B T D"], layers.Metrics]:
        """Return the hidden states after the final norm, computed in `dtype`, and the layers' metrics, averaged."""
        view_of = self._views(positions_BT, segments_BT, rope.lengths(positions_BT, segments_BT))
        x_BTD, _, metrics = self._run(tokens_BT, view_of, None, dtype, remat)
        return x_BTD, metrics

    def decode(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        cache: tuple[layers.Cache, ...],
        *,
        dtype: jnp.dtype,
    ) -> tuple[Float[Array, "B T D"], tuple[layers.Cache, ...]]:
        """Return `hidden` of tokens that follow those in `cache`, and the cache with them added."""
        room_BT = jnp.full_like(positions_BT, cache[0].k_BKHS.shape[-1])
        view_of = self._views(positions_BT, jnp.ones_like(tokens_BT), room_BT)
        x_BTD, cache, _ = self._run(tokens_BT, view_of, cache, dtype, "none")
        return x_BTD, cache

    def _views(
        self, positions_BT: Array, segments_BT: Array, lengths_BT: Array
    ) -> Callable[[tuple[Array, Array]], layers.View]:
        """Return (numbers of a layer's rope and window) -> its View."""
        ropes, windows = self._distinct
        turns = None if ropes == (None,) else rope.turns(ropes, self.head_dim, positions_BT, lengths_BT)

        def view(numbers: tuple[Array, Array]) -> layers.View:
            number_of_rope, number_of_window = numbers
            turn = jax.tree.map(lambda x: x[0 if len(ropes) == 1 else number_of_rope], turns)
            window = windows[0] if len(windows) == 1 else OneOf(windows, number_of_window)
            return layers.View(positions_BT, segments_BT, turn, window)

        return view

    @property
    def _distinct(self) -> tuple[tuple[Rope | None, ...], tuple[int | None, ...]]:
        distinct = lambda values: tuple(dict.fromkeys(values))
        return distinct(kind.rope for kind in self.kinds), distinct(kind.window for kind in self.kinds)

    def _run(
        self,
        tokens_BT: Array,
        view_of: Callable[[tuple[Array, Array]], layers.View],
        cache: tuple[layers.Cache, ...] | None,
        dtype: jnp.dtype,
        remat: str,
    ) -> tuple[Array, Any, layers.Metrics]:
        """Return the hidden states, the cache with these tokens added (None without one) and, without one, metrics."""
        x_BTD = layers.embed(self.embed[...], tokens_BT, dtype)
        if self.embed_scale is not None:
            x_BTD = x_BTD * jnp.asarray(self.embed_scale, dtype)
        x_BTD = sharding.constrain(layers.noised(x_BTD), "B T D")
        ropes, windows = self._distinct
        numbers_L = (
            np.array([ropes.index(kind.rope) for kind in self.kinds], np.int32),
            np.array([windows.index(kind.window) for kind in self.kinds], np.int32),
        )
        graphdef, params = nnx.split(self.layers)

        def step(x_BTD: Array, layer: tuple) -> tuple[Array, tuple]:
            layer_params, layer_cache, numbers = layer
            x_BTD, *rest = nnx.merge(graphdef, layer_params)(x_BTD, view_of(numbers), layer_cache)
            return sharding.constrain(x_BTD, "B T D"), tuple(rest)

        if cache is not None:
            # One by one: a scan would copy every layer's cache out of a stack of them and back, for each token.
            caches = []
            for layer, layer_cache in enumerate(cache):
                of_layer = lambda x, layer=layer: x[layer]
                layer_params = jax.tree.map(of_layer, params, is_leaf=lambda x: isinstance(x, layers.Apart))
                numbers = jax.tree.map(of_layer, numbers_L)
                x_BTD, (layer_cache, _) = step(x_BTD, (layer_params, layer_cache, numbers))
                caches.append(layer_cache)
            return self.final_norm(x_BTD), tuple(caches), {}
        if REMAT_POLICIES[remat] is not None:
            step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
        x_BTD, (cache, metrics) = jax.lax.scan(step, x_BTD, (params, cache, numbers_L))
        return self.final_norm(x_BTD), cache, jax.tree.map(lambda x_L: jnp.mean(x_L), metrics)
