"""A model as the rest of the library sees it, on Qwen3; test_families.py has what holds for every family."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.ad_checkpoint import print_saved_residuals

import wmss_jax as wmss
from wmss_jax import hf
from wmss_jax.models import qwen3

CASES = ("qwen3/tied", "qwen3/untied", "qwen3/bf16")


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, golden):
    model, params = wmss.load(golden / case, dtype="float32")
    want = np.load(golden / case / "golden.npz")
    logits = jax.jit(model.logits)(params, want["tokens"])
    np.testing.assert_allclose(logits, want["logits"], atol=1e-4)


def test_sharded_logits_equal_transformers(golden):
    mesh = wmss.make_mesh(2, 2, 2)
    model, params = wmss.load(golden / "qwen3/untied", mesh=mesh)
    want = np.load(golden / "qwen3/untied/golden.npz")
    np.testing.assert_allclose(jax.jit(model.logits)(params, want["tokens"]), want["logits"], atol=1e-4)
    assert params["unembed"].sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")


def test_causality():
    """The gradient of a hidden state with respect to any later embedding is exactly zero."""
    model = tiny.model()
    params = tiny.params(model)
    tokens = jnp.arange(10, dtype=jnp.int32)[None]  # distinct tokens: a row of the embedding is a position

    def of(embed, t):
        return jnp.sum(model.hidden({**params, "embed": embed}, tokens)[0, t])

    grads = jax.jit(jax.vmap(jax.grad(of), in_axes=(None, 0)))(params["embed"], jnp.arange(10))
    reach = np.abs(np.asarray(grads))[:, :10].sum(-1) > 0
    np.testing.assert_array_equal(reach, np.tril(np.ones((10, 10), bool)))


def test_segments_do_not_see_each_other_and_positions_restart():
    model = tiny.model()
    params = tiny.params(model)
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 96, (1, n)).astype(np.int32) for n in (7, 5))
    pad = np.zeros((1, 4), np.int32)
    packed = np.concatenate([a, b, pad], axis=1)
    segments = np.array([[1] * 7 + [2] * 5 + [0] * 4], np.int32)
    positions = np.array([[*range(7), *range(5), *range(4)]], np.int32)
    logits = jax.jit(model.logits)
    together = logits(params, packed, positions, segments)
    np.testing.assert_allclose(together[:, :7], logits(params, a), atol=1e-4)
    np.testing.assert_allclose(together[:, 7:12], logits(params, b), atol=1e-4)
    assert np.isfinite(together).all(), "padding rows too"


def test_rotary_positions_are_relative():
    model = tiny.model()
    params = tiny.params(model)
    tokens = np.arange(8, dtype=np.int32)[None]
    near, far = (
        jax.jit(model.logits)(params, tokens, np.arange(8, dtype=np.int32)[None] + start) for start in (0, 500)
    )
    np.testing.assert_allclose(near, far, atol=1e-3)


def test_bfloat16_activations_and_float32_norms():
    model = dataclasses.replace(tiny.model(), compute_dtype="bfloat16")
    params = tiny.params(model)
    hidden = model.hidden(params, np.arange(8, dtype=np.int32)[None])
    assert hidden.dtype == jnp.bfloat16
    text = jax.jit(model.hidden).lower(params, np.arange(8, dtype=np.int32)[None]).as_text()
    rsqrt = [line for line in text.splitlines() if "rsqrt" in line]
    softmax = [line for line in text.splitlines() if "exponential" in line]
    assert rsqrt and all("f32" in line and "bf16" not in line for line in rsqrt)
    assert any("f32" in line for line in softmax) and all("8x8" not in line or "bf16" not in line for line in softmax)


def test_padded_vocabulary_rows_have_no_probability():
    model = dataclasses.replace(tiny.model(), vocab_size=90)
    probs = jax.nn.softmax(model.logits(tiny.params(model), np.arange(8, dtype=np.int32)[None]))
    np.testing.assert_array_equal(probs[..., 90:], 0.0)
    np.testing.assert_allclose(probs.sum(-1), 1.0, rtol=1e-5)


def test_equal_models_share_a_compilation():
    run = jax.jit(lambda model, params, tokens: model.logits(params, tokens), static_argnums=0)
    for _ in range(2):
        run(tiny.model(), tiny.params(tiny.model()), np.arange(8, dtype=np.int32)[None])
    assert run._cache_size() == 1


def test_init_is_random_and_the_same_on_any_mesh():
    model = tiny.model()
    one, eight = model.init(jax.random.key(3)), model.init(jax.random.key(3), mesh=wmss.make_mesh(2, 2, 2))
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    assert 0.015 < np.std(one["layers"]["mlp"]["up_proj"]) < 0.025


# -- config.json ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["qwen3/untied_v4", "qwen3/untied_v4_51"])
def test_configs_of_transformers_4_and_5_mean_the_same(form, golden):
    read = lambda case: hf.from_config(hf.read_config(golden / case)).config
    assert read(form) == read("qwen3/untied")


def test_config_round_trip():
    assert qwen3.from_hf(json.loads(json.dumps(qwen3.to_hf(tiny.CONFIG)))) == tiny.CONFIG


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope type 'dynamic' is not implemented for qwen3"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling and rope_parameters say different things"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rope type 'yarn' needs factor"),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
            "factor: rope type 'default' here knows no such",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: rope type 'default' here knows"),
        ({"attention_bias": True}, "attention_bias=True is not implemented for qwen3, only False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented for qwen3, only 'silu'"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding_window is missing"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window is off"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0: qwen3 here knows no such feature"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not implemented; implemented: gemma2, "),
    ],
)
def test_what_a_config_asks_for_and_is_not_implemented_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        hf.from_config({**qwen3.to_hf(tiny.CONFIG), **change})


def test_what_a_layer_keeps_for_its_backward_pass(capsys):
    """Per token and layer, in numbers: "full" its input alone, "dots" the results of its products besides."""
    kept = {}
    for remat in ("none", "dots", "full"):
        model = dataclasses.replace(tiny.model(), remat=remat, compute_dtype="bfloat16")
        print_saved_residuals(model.hidden, tiny.params(model), jnp.zeros((2, 24), jnp.int32))
        shapes = re.findall(r"^bf16\[2,2,24,([\d,]+)\]", capsys.readouterr().out, re.MULTILINE)  # [L, B, T, ...]
        kept[remat] = sum(math.prod(map(int, shape.split(","))) for shape in shapes)
    D, F, N, K, H = 32, 48, 4, 2, 16
    assert kept["full"] == D
    # Of q, k, v, o, gate and up; what down gives is added to the stream, whose gradient needs it not.
    assert kept["dots"] == D + (N + 2 * K) * H + D + 2 * F
    assert kept["none"] > kept["dots"]
