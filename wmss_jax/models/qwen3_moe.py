"""Qwen3, mixture of experts (arXiv 2505.09388): Qwen3's attention, and in the MLP's place a router that sends every
token to A of E experts, each a SwiGLU of its own.

Nothing is dropped: tokens are sorted by expert, and each expert multiplies its own run of them, however long it is.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from wmss_jax import precision, sharding
from wmss_jax.models import architecture, hf_config, layers, lora, table
from wmss_jax.models.decoder import Decoder
from wmss_jax.models.layers import Attention, Block, Metrics, RMSNorm, View
from wmss_jax.models.table import Row

_MLP = "model.layers.{l}.mlp."
TABLE = (
    table.EMBED,
    *table.PRE_NORMS,
    *table.ATTENTION,
    *table.HEAD_NORMS,
    Row("layers.mlp.router", _MLP + "gate.weight", "E D -> D E"),
    Row("layers.mlp.gate_proj", _MLP + "experts.{e}.gate_proj.weight", "F D -> D F"),
    Row("layers.mlp.up_proj", _MLP + "experts.{e}.up_proj.weight", "F D -> D F"),
    Row("layers.mlp.down_proj", _MLP + "experts.{e}.down_proj.weight", "D F -> F D"),
    *table.HEAD,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(architecture.Config):
    """The architecture of one checkpoint; `intermediate_size` is that of one expert."""

    num_experts: int  # E
    experts_per_token: int  # A
    normalize_weights: bool  # whether the weights of a token's A experts add up to 1
    dense_intermediate_size: int  # of layers without experts, which there are none of; carried along

    @property
    def sizes(self) -> dict[str, int]:
        """The value of every shape letter in TABLE, and A."""
        return {**super().sizes, "E": self.num_experts, "A": self.experts_per_token}


class Experts(nnx.Module):
    """Σ over a token's A experts of weight · expert(x), the weights from a softmax over all E in float32."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: jnp.dtype):
        c, D, F, E = config, config.hidden_size, config.intermediate_size, config.num_experts
        self.per_token, self.normalize = c.experts_per_token, c.normalize_weights
        self.router = layers.matrix(rngs, dtype, c.init_std, D, E)
        self.gate_proj = layers.matrix(rngs, dtype, c.init_std, E, D, F)
        self.up_proj = layers.matrix(rngs, dtype, c.init_std, E, D, F)
        self.down_proj = layers.matrix(rngs, dtype, c.init_std, E, F, D)

    def __call__(self, x_BTD: Float[Array, "B T D"], view: View) -> tuple[Float[Array, "B T D"], Metrics]:
        with precision.matmuls_in(jnp.dtype("float32")):
            logits_BTE = layers.project("BTD,DE->BTE", x_BTD.astype(jnp.float32), self.router[...])
        probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        weights_BTA, experts_BTA = jax.lax.top_k(probs_BTE, self.per_token)
        metrics = {"load_balance": load_balance(probs_BTE, experts_BTA, view.segments_BT)}
        if self.normalize:
            weights_BTA = weights_BTA / jnp.sum(weights_BTA, axis=-1, keepdims=True)
        matrices = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        return _on_each_device(x_BTD, weights_BTA.astype(x_BTD.dtype), experts_BTA, *matrices), metrics


def load_balance(
    probs_BTE: Float[Array, "B T E"], experts_BTA: Int[Array, "B T A"], segments_BT: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Return E · Σ_e (share of tokens sent to e) · (mean probability of e) over all tokens but padding.

    Switch Transformer (arXiv 2101.03961), eq. 4, with A experts a token: A where all are used alike, more where not.
    """
    probs_BTE = jax.lax.stop_gradient(probs_BTE)
    E = probs_BTE.shape[-1]
    counted_BT1 = (segments_BT != 0)[..., None].astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(counted_BT1), 1)
    sent_BTE = jnp.sum(jax.nn.one_hot(experts_BTA, E), axis=2)
    mean = lambda x_BTE: jnp.sum(x_BTE * counted_BT1, axis=(0, 1)) / tokens
    return E * jnp.sum(mean(sent_BTE) * mean(probs_BTE))


def _on_each_device(x_BTD: Array, weights_BTA: Array, experts_BTA: Array, *matrices: Any) -> Array:
    """Return `_mixed`, of each device's own tokens: they are sorted where they are, and matrices come to them.

    Over `tensor` every device has a part of the width of all experts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _mixed(x_BTD, weights_BTA, experts_BTA, *matrices)

    def mixed(*inputs: Any) -> Array:
        return jax.lax.psum(_mixed(*inputs), "tensor")

    divisible = len(x_BTD) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    rows = P(sharding.BATCH_AXES) if divisible else P()
    of = [_specs(matrix, letters) for matrix, letters in zip(matrices, ("E D F", "E D F", "E F D"), strict=True)]
    mapped = jax.shard_map(mixed, in_specs=(rows, rows, rows, *of), out_specs=rows, check_vma=False)
    return mapped(x_BTD, weights_BTA, experts_BTA, *matrices)


def _specs(matrix: Any, letters: str) -> Any:
    """Return how the experts' matrices lie while they are used: gathered over `fsdp`; of adapted ones all three."""
    spec = lambda letters: sharding.spec(letters, sharding.ACTIVATION_AXES)
    if not isinstance(matrix, lora.Adapted):
        return spec(letters)
    experts, ins, out = letters.split()
    return dataclasses.replace(matrix, w=spec(letters), a=spec(f"{experts} {ins} R"), b=spec(f"{experts} R {out}"))


def _mixed(x_BTD: Array, weights_BTA: Array, experts_BTA: Array, gate_EDF: Any, up_EDF: Any, down_EFD: Any) -> Array:
    """Letters: M = B·T·A, one for every use of an expert; sorted by expert."""
    B, T, A = experts_BTA.shape
    E = jax.tree.leaves(gate_EDF)[0].shape[0]
    experts_M = experts_BTA.reshape(-1)
    order_M = jnp.argsort(experts_M, stable=True)
    sizes_E = jnp.bincount(experts_M, length=E).astype(jnp.int32)
    x_MD = x_BTD.reshape(B * T, -1)[order_M // A]
    gate_MF, up_MF = (lora.grouped(x_MD, w_EDF, sizes_E) for w_EDF in (gate_EDF, up_EDF))
    inner_MF = layers.gated(jax.nn.silu, gate_MF, up_MF)
    out_MD = lora.grouped(inner_MF, down_EFD, sizes_E)
    back_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(len(order_M)))
    return jnp.einsum("BTAD,BTA->BTD", out_MD[back_M].reshape(B, T, A, -1), weights_BTA)


def Model(config: Config, rngs: nnx.Rngs, dtype: jnp.dtype) -> Decoder:
    """Return the module that TABLE describes."""
    c = config
    norm = lambda size: RMSNorm(size, c.norm_eps, dtype)

    def block(rngs: nnx.Rngs) -> Block:
        attention = Attention(c, rngs, dtype, norms=(norm(c.head_dim), norm(c.head_dim)))
        return Block(attention, Experts(c, rngs, dtype), before=(norm(c.hidden_size), norm(c.hidden_size)))

    return Decoder(c, block, rngs, dtype)


def from_hf(hf: dict) -> Config:
    """Return the Config of a Hugging Face `config.json`, written by transformers 4 or 5.

    Raises:
        ValueError: a key is missing, or asks for something this file does not implement.
    """
    hf_config.refuse_unimplemented(
        hf,
        only={
            "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        },
        known={
            "head_dim", "sliding_window", "max_window_layers", "moe_intermediate_size", "num_experts",
            "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "output_router_logits",
            "router_aux_loss_coef",
        },
    )  # fmt: skip
    need = hf_config.required(hf)
    fields = hf_config.fields(hf)
    return Config(
        **{**fields, "intermediate_size": need("moe_intermediate_size")},
        dense_intermediate_size=fields["intermediate_size"],
        num_experts=need("num_experts" if "num_experts" in hf else "num_local_experts"),
        experts_per_token=need("num_experts_per_tok"),
        normalize_weights=bool(hf.get("norm_topk_prob", False)),
    )


def to_hf(config: Config) -> dict:
    """Return the `config.json` of a Config; transformers 4 and 5 both read it."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **hf_config.keys(config),
        "intermediate_size": config.dense_intermediate_size,
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.normalize_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "head_dim": config.head_dim,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "attention_bias": False,
    }
