"""Model FLOPs: by hand, by the compiler's count, and what a weak agent adds. Run: pytest tests/test_flops.py"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny

from wmss_jax import flops, hf
from wmss_jax.models.lora import Lora
from wmss_jax.models.table import Row

CONFIGS = Path(__file__).parent.parent / "configs"
# huggingface.co/Qwen/Qwen3-8B-Base, config.json
QWEN3_8B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False, "max_position_embeddings": 32768,
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen3_8b():
    return hf.from_config(QWEN3_8B)


def test_of_the_tiny_config_by_hand():
    """3 layers: 4 matrices 96 x (3·32) and 3 of 96 x 256; no norm, no embedding, the tied head once."""
    model = hf.from_config(json.loads((CONFIGS / "tiny_qwen3.json").read_text()))
    cost = flops.forward(model, seq_len=128)
    assert cost == (2 * 3 * (4 * 96 * 96 + 3 * 96 * 256), 4 * 3 * 3 * 32 * 128, 2 * 96 * 1024)
    assert cost == (663_552, 147_456, 196_608)


def test_of_qwen3_8b_by_hand(qwen3_8b):
    body = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    assert body == 6_945_767_424  # 8.19e9 parameters, less two matrices of the vocabulary, less norms
    assert flops.forward(qwen3_8b, 4096) == (2 * body, 4 * 36 * 4096 * 4096, 2 * 4096 * 151936)


def test_the_compiler_counts_the_same_but_for_norms_and_softmax():
    """One layer, because it counts a scan's body once; no remat. It counts what is not a matrix product as well."""
    model = tiny.model(num_layers=1)
    params, tokens = model.abstract(), jax.ShapeDtypeStruct((2, 24), jnp.int32)
    counted = lambda f: jax.jit(f).lower(params, tokens).cost_analysis()["flops"]
    cost = flops.forward(model, 24)
    assert counted(model.logits) == pytest.approx(48 * sum(cost), rel=0.1)
    gradient = jax.grad(lambda params, tokens: model.logits(params, tokens).sum())
    assert counted(gradient) == pytest.approx(48 * flops.step([(cost, "trained")]), rel=0.1)


def test_a_weak_agent_adds_to_a_step_of_qwen3_8b_what_the_design_says(qwen3_8b):
    cost = flops.forward(qwen3_8b, 4096)
    for remat in (False, True):
        alone = flops.step([(cost, "trained")], remat)
        added = lambda use: flops.step([(cost, "trained"), (cost, use)], remat) / alone - 1  # noqa: B023
        assert 0.25 < added("resident") < 0.34
        assert 0.017 < added("cached") < 0.028
        assert added("trained") == pytest.approx(1)


def test_steps_by_hand():
    cost = flops.Cost(body=100, attention=10, head=1)
    assert flops.step([(cost, "trained")]) == 333
    assert flops.step([(cost, "trained")], remat=True) == 443
    assert flops.step([(cost, "trained"), (cost, "resident")], remat=True) == 443 + 111
    assert flops.step([(cost, "trained"), (cost, "cached")]) == 334
    assert flops.step([(cost, "trained"), (cost, "trained")], remat=True) == 2 * 443
    assert flops.step([(cost, "adapted"), (cost, "resident")]) == 232 + 111
    assert flops.step([(cost, "adapted")], remat=True) == 232 + 110


def test_a_model_with_an_adapter_costs_what_its_base_does():
    model = tiny.model()
    assert flops.forward(dataclasses.replace(model, lora=Lora(rank=4, alpha=8)), 24) == flops.forward(model, 24)


def test_biases_are_no_matrices(monkeypatch):
    """Also where ours have two axes."""
    model = tiny.model()
    before = flops.forward(model, 24)
    bias = Row("layers.attention.q_bias", "model.layers.{l}.self_attn.q_proj.bias", "(N H) -> N H")
    monkeypatch.setattr(type(model), "rows", property(lambda self: (bias,)))
    assert flops.forward(model, 24) == before._replace(body=0)
