"""Adapters: y = x·W + alpha/rank·(x·A)·B wherever W was, merged or not, and PEFT's names and shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import wmss_jax as wmss
from wmss_jax.models.lora import Lora

LORA = Lora(rank=4, alpha=8.0)


def adapted(lora=LORA, **settings):
    """A model with an adapter that does something, its base parameters and the adapter's."""
    model = tiny.model(lora=lora, **settings)
    adapter = model.init(jax.random.key(7))
    noise = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    return model, tiny.params(model.base, 0), jax.tree_util.tree_map_with_path(noise, adapter)


@pytest.mark.parametrize("targets", ["all", ("q_proj", "down_proj"), ("self_attn.o_proj",)])
def test_an_adapted_model_computes_what_its_merged_parameters_do(targets):
    model, base, adapter = adapted(Lora(4, 8.0, targets))
    batch = tiny.batch()
    run = jax.jit(model.base.logits)
    with_adapter = run(model.adapt(base, adapter), batch["tokens"])
    np.testing.assert_allclose(with_adapter, run(model.merge(base, adapter), batch["tokens"]), rtol=1e-4, atol=1e-5)
    assert np.abs(with_adapter - run(base, batch["tokens"])).max() > 1e-2


def test_a_fresh_adapter_changes_nothing():
    model = tiny.model(lora=LORA)
    base, batch = tiny.params(model.base, 0), tiny.batch()
    merged = model.merge(base, model.init(jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, merged, base)
    adapted = model.adapt(base, model.init(jax.random.key(0)))
    np.testing.assert_array_equal(model.logits(adapted, batch["tokens"]), model.base.logits(base, batch["tokens"]))


def test_the_adapter_alone_is_trained():
    model, base, adapter = adapted()
    tx = optax.adamw(1e-2)
    step = wmss.make_train_step(model, wmss.objectives.Sft(), tx, donate=False)
    state, metrics = step(wmss.init_state({"strong": adapter}, tx), {"base": base}, tiny.batch())
    after, _ = step(state, {"base": base}, tiny.batch())
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), adapter, after.params["strong"])
    assert min(jax.tree.leaves(moved)) > 0, "every A and B gets a gradient"
    shapes = {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(tx.init, state.params))}
    assert not shapes & {leaf.shape for leaf in jax.tree.leaves(base)} - {()}, "no optimizer state for the base"
    assert metrics["loss"] > 0


def test_gradients_equal_those_of_merged_parameters():
    """dA = scale · Wgrad·Bᵀ and dB = scale · Aᵀ·Wgrad, with Wgrad that of the matrix in full training."""
    model, base, adapter = adapted(Lora(4, 8.0, ("up_proj",)))
    batch = tiny.batch()
    value = lambda a: wmss.loss(model, wmss.objectives.Sft(), {"strong": a}, {"base": base}, batch)[0]
    full = lambda p: wmss.loss(model.base, wmss.objectives.Sft(), {"strong": p}, {}, batch)[0]
    found = jax.grad(value)(adapter)["layers"]["mlp"]["up_proj"]
    whole = jax.grad(full)(model.merge(base, adapter))["layers"]["mlp"]["up_proj"]
    a, b = (adapter["layers"]["mlp"]["up_proj"][name] for name in ("lora_a", "lora_b"))
    np.testing.assert_allclose(found["lora_a"], 2.0 * jnp.einsum("LDF,LRF->LDR", whole, b), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found["lora_b"], 2.0 * jnp.einsum("LDR,LDF->LRF", a, whole), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_shared_base_is_two_copies(trainable):
    """With weak = base, one set of weights serves both roles: the same numbers as from a second set, bit for bit."""
    model, base, adapter = adapted()
    objective, tx, batch = wmss.objectives.LogitMix(0.5), optax.adamw(1e-3), tiny.batch()
    if trainable:
        models = {"strong": model, "weak": model}
        fresh = model.init(jax.random.key(3))
        frozen, other = {"base": base}, {"base": base}
        trained, other_trained = {"strong": adapter, "weak": fresh}, {"strong": adapter, "weak": fresh}
        other["base"] = jax.tree.map(jnp.copy, base)
    else:
        models = {"strong": model, "weak": model.base}
        frozen, other = {"base": base}, {"base": base, "weak": jax.tree.map(jnp.copy, base)}
        trained = other_trained = {"strong": adapter}
    step = wmss.make_train_step(models, objective, tx, donate=False)
    shared = step(wmss.init_state(trained, tx), frozen, batch)
    copies = step(wmss.init_state(other_trained, tx), other, batch)
    jax.tree.map(np.testing.assert_array_equal, shared, copies)
    bytes_of = lambda frozen: step.lower(wmss.init_state(trained, tx), frozen, batch).compile().memory_analysis()
    if not trainable:
        saved = bytes_of(other).argument_size_in_bytes - bytes_of(frozen).argument_size_in_bytes
        assert saved >= sum(leaf.nbytes for leaf in jax.tree.leaves(base)), "the second set is not there"


def test_the_frozen_matrices_cost_no_gradient():
    """The backward pass has no product of the size of a matrix's gradient, in the layers or in the head."""
    model, base, adapter = adapted()
    sizes = model.config.sizes
    gradients = [f"tensor<{sizes['D']}x{sizes['F']}xf32>", f"tensor<{sizes['D']}x{sizes['V']}xf32>"]

    def made(model, params, frozen):
        value = lambda p: wmss.loss(model, wmss.objectives.Sft(), {"strong": p}, frozen, tiny.batch())[0]
        lines = jax.jit(jax.grad(value)).lower(params).as_text().splitlines()
        products = [line.rsplit("->", 1)[1].strip() for line in lines if "dot_general" in line]
        return [shape for shape in gradients if shape in products]

    assert made(model.base, base, {}) == gradients
    assert made(model, adapter, {"base": base}) == []


def test_adapters_are_sharded_like_their_matrices():
    model = tiny.model(lora=LORA)
    mesh = wmss.make_mesh(fsdp=2, tensor=1, data=4)
    adapter = model.init(jax.random.key(0), mesh=mesh)
    spec = adapter["layers"]["attention"]["q_proj"]["lora_a"].sharding.spec
    assert spec == jax.sharding.PartitionSpec(None, "fsdp")
    one, many = (
        wmss.loss(model, wmss.objectives.Sft(), {"strong": a}, {"base": b}, tiny.batch(), mesh=m)[0]
        for a, b, m in (
            (model.init(jax.random.key(0)), tiny.params(model.base, 0), None),
            (adapter, jax.device_put(tiny.params(model.base, 0), model.base.shardings(mesh)), mesh),
        )
    )
    np.testing.assert_allclose(one, many, rtol=1e-5)


@pytest.mark.parametrize(
    "lora, words",
    [
        (
            {"rank": 4, "alpha": 8.0, "targets": ("query", "q_proj")},
            ["'query'", "no such matrix", "q_proj", "down_proj"],
        ),
        ({"rank": 4, "alpha": 8.0, "targets": ()}, ["empty", "gate_proj"]),
        ({"rank": 4, "alpha": 8.0, "targets": ("norm",)}, ["'norm'"]),
        ({"rank": 0, "alpha": 8.0}, ["rank", "0"]),
    ],
)
def test_what_cannot_be_adapted_is_refused(lora, words):
    with pytest.raises(ValueError) as caught:
        tiny.model(lora=Lora(**lora))
    assert all(word in str(caught.value) for word in words)


def test_an_adapter_without_its_base_is_refused():
    model, base, adapter = adapted()
    with pytest.raises(ValueError, match="'base'"):
        wmss.loss(model, wmss.objectives.Sft(), {"strong": adapter}, {}, tiny.batch())
    with pytest.raises(ValueError, match="weak"):
        wmss.loss(model.base, wmss.objectives.LogitMix(), {"strong": base}, {}, tiny.batch())
    with pytest.raises(ValueError, match="no adapter"):
        dataclasses.replace(model, lora=None).adapt(base, adapter)


def test_rows_have_the_names_and_shapes_of_peft():
    model = tiny.model(lora=Lora(4, 8.0, ("q_proj", "o_proj")))
    sizes = model.sizes
    shapes = {name: row.their_shape(sizes) for row in model.rows for name in row.names(sizes)}
    D, heads = sizes["D"], sizes["N"] * sizes["H"]
    prefix = "base_model.model.model.layers.0.self_attn"
    assert shapes[f"{prefix}.q_proj.lora_A.weight"] == (4, D)
    assert shapes[f"{prefix}.q_proj.lora_B.weight"] == (heads, 4)
    assert shapes[f"{prefix}.o_proj.lora_A.weight"] == (4, heads)
    assert shapes[f"{prefix}.o_proj.lora_B.weight"] == (D, 4)
    assert len(shapes) == 4 * sizes["L"]
