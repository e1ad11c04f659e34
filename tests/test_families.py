"""What holds for every family: the logits of transformers, bit-exact round trips, packing, decoding, eight devices,
WMSS gradients. Parametrised over ARCHS and the golden directories; a new family is tested once it has both."""

import functools
import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import wmss_jax as wmss
from wmss_jax import convert, hf, tensorfile
from wmss_jax.models import ARCHS, multimodal, rope
from wmss_jax.models.lora import Lora

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    str(file.parent.relative_to(GOLDEN)) for file in sorted(GOLDEN.glob("*/*/golden.npz")) if "qwen3/" not in str(file)
]
ONE_EACH = list({case.split("/")[0]: case for case in reversed(CASES) if case != "gemma3/multimodal"}.values())
TIED = [case for case in CASES if json.loads((GOLDEN / case / "config.json").read_text()).get("tie_word_embeddings")]
each_case = pytest.mark.parametrize("case", CASES)
one_each = pytest.mark.parametrize("case", ONE_EACH)
each_family = pytest.mark.parametrize("case", ["qwen3/tied", *ONE_EACH])


TOLERANCE = 1e-4  # of float32 logits with a standard deviation of 2; found are at most 3e-5


def loaded(case, **settings):
    model, params = wmss.load(GOLDEN / case, dtype="float32", **settings)
    return model, params, np.load(GOLDEN / case / "golden.npz")


@functools.cache
def compiled(case):
    """The same, and one compiled forward pass for all tests."""
    model, params, want = loaded(case)
    return model, params, want, jax.jit(model.logits)


def whole(tokens):
    """Positions and segments of rows that are one segment each."""
    index = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return index, np.ones_like(index)


def test_every_family_has_a_golden_directory():
    kinds = {hf.from_config(hf.read_config(GOLDEN / case)).arch for case in CASES}
    assert kinds | {"qwen3"} == set(ARCHS) and {case.split("/")[0] for case in CASES} >= set(multimodal.TEXT_PARTS)


@each_case
def test_logits_equal_transformers_also_of_packed_rows_and_never_look_ahead(case):
    """Two prefixes packed into one row have the logits of the whole rows; so has a row whose end is another."""
    _, params, want, run = compiled(case)
    tokens, logits = want["tokens"], want["logits"]
    np.testing.assert_allclose(run(params, tokens, *whole(tokens)), logits, atol=TOLERANCE)
    packed = np.stack([np.r_[tokens[0, :17], tokens[1, :20], [0] * 3], np.r_[tokens[1, :30], tokens[0, :10]]])
    segments = np.array([[1] * 17 + [2] * 20 + [0] * 3, [1] * 40], np.int32)
    positions = np.stack([np.r_[:17, :20, :3], np.r_[:40]]).astype(np.int32)
    found = run(params, packed, positions, segments)
    np.testing.assert_allclose(found[0, :17], logits[0, :17], atol=TOLERANCE)
    np.testing.assert_allclose(found[0, 17:37], logits[1, :20], atol=TOLERANCE)
    np.testing.assert_allclose(found[1, :30], logits[1, :30], atol=TOLERANCE)
    assert np.isfinite(found).all(), "padding too"


def test_a_short_sequence_has_longrope_frequencies_of_its_own_wherever_it_is_packed():
    model, params, want = loaded("phi3/longrope")
    tokens, length = want["tokens"], want["short_tokens"].shape[1]
    packed = np.concatenate([tokens[:, :24], want["short_tokens"]], axis=1)
    segments = np.repeat(np.array([[1] * 24 + [2] * length], np.int32), 2, axis=0)
    positions = np.repeat(np.array([[*range(24), *range(length)]], np.int32), 2, axis=0)
    found = jax.jit(model.logits)(params, packed, positions, segments)
    np.testing.assert_allclose(found[:, :24], want["logits"][:, :24], atol=TOLERANCE)
    np.testing.assert_allclose(found[:, 24:], want["short_logits"], atol=TOLERANCE)


@each_case
def test_decoding_with_a_cache_equals_the_whole_forward_pass(case):
    model, params, want, forward = compiled(case)

    @jax.jit
    def run(params, tokens, cache, positions):
        hidden, cache = model.decode(params, tokens, positions, cache)
        logits = wmss.head.logits(hidden, model.unembed(params), model.vocab_size, model.softcap)
        return logits, cache

    cache, found = model.empty_cache(2, 40, "float32"), []
    for t in range(40):
        logits, cache = run(params, want["tokens"][:, t : t + 1], cache, np.full((2, 1), t, np.int32))
        found.append(logits[:, 0])
    expected = forward(params, want["tokens"], *whole(want["tokens"]))
    np.testing.assert_allclose(np.stack(found, 1), expected, atol=TOLERANCE)


@one_each
def test_gradients_on_eight_devices_and_logits_there(case):
    """Of WMSS, with both roles as arguments: every matrix of the strong one gets some, the frozen one none."""
    mesh = wmss.make_mesh(4, 2, 1) if "gemma" in case else wmss.make_mesh(2, 2, 2)
    model, weak, want = loaded(case, mesh=mesh)
    strong = jax.tree.map(lambda x: x * 1.01, weak)
    tokens = np.tile(want["tokens"], (4, 1))
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_weights": np.ones(tokens.shape, np.float32)}

    def loss(strong, weak):
        objective = wmss.objectives.LogitMix(0.5)
        with wmss.sharding.use(mesh):
            logits = model.logits(weak, tokens)
        return wmss.loss(model, objective, {"strong": strong}, {"weak": weak}, batch, mesh=mesh)[0], logits

    (of_strong, of_weak), logits = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(strong, weak)
    np.testing.assert_allclose(logits[:2], want["logits"], atol=TOLERANCE)
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_strong):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(of_weak))


@each_case
def test_the_table_covers_every_parameter_and_all_have_a_sharding(case):
    model = hf.from_config(hf.read_config(GOLDEN / case))
    made = nnx.eval_shape(lambda: ARCHS[model.arch].Model(model.config, nnx.Rngs(0), jnp.dtype("float32")))
    state = nnx.to_pure_dict(nnx.state(made))
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, model.abstract())
    shardings = model.shardings(wmss.make_mesh(4, 2, 1))
    assert all(any(of.spec) for of in jax.tree.leaves(shardings) if len(of.spec) > 0)


# -- Hugging Face directories --------------------------------------------------------------------------------------


@each_case
def test_a_round_trip_is_bit_exact_and_transformers_reads_the_same_config(case, tmp_path):
    import transformers

    model, params = wmss.load(GOLDEN / case)
    wmss.save(model, params, tmp_path / "out", tokenizer_from=GOLDEN / case)
    again, params_again = wmss.load(tmp_path / "out")
    assert again == model and again.file_dtypes == model.file_dtypes
    theirs = hf.tensors_in(GOLDEN / case, hf.read_config(GOLDEN / case))
    ours = tensorfile.tensors(tmp_path / "out")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and tensor.read().tobytes() == ours[name].read().tobytes(), name
    read = lambda path: transformers.AutoConfig.from_pretrained(path).get_text_config().to_dict()
    source, exported = read(GOLDEN / case), read(tmp_path / "out")
    differ = {key for key in source if exported.get(key) != source[key]}
    assert differ <= {"architectures", "transformers_version", "_name_or_path"} | MORE_EXPLICIT.get(case, set())


# Where transformers has two forms for one thing, and an export has the more explicit one.
MORE_EXPLICIT = {
    "gemma3/multimodal": {"_sliding_window_pattern", "sliding_window_pattern", "dtype"},
    "gemma3_text/tied": {"_sliding_window_pattern"},
    "phi3/longrope": {"rope_parameters"},
    "smollm3/nope": {"no_rope_layer_interval"},
}


@each_family
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_each_tensor_keeps_its_dtype_and_its_bits_whatever_its_neighbours_have(case, dtype, tmp_path, rng):
    """Two layers of one parameter, or two experts, may differ; training in float32 changes nothing of it."""
    source = shutil.copytree(GOLDEN / case, tmp_path / "model")
    kinds = [np.dtype(name) for name in ("float32", "float16", jnp.bfloat16)]
    tensors = {
        name: rng.normal(0, 1, tensor.shape).astype(kinds[rng.integers(3)])
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors")
    model, params = wmss.load(source, dtype=dtype)
    wmss.save(model, params, tmp_path / "out", tokenizer_from=source)
    ours = load_file(tmp_path / "out/model.safetensors")
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(tensor.tobytes() == ours[name].tobytes() for name, tensor in tensors.items())
    assert len({tensor.dtype for tensor in tensors.values()}) == 3


@each_family
def test_rows_that_are_no_tokens_change_no_logits_never_win_and_are_exported_as_they_were(case, tmp_path, rng):
    """As checkpoints have them, and as a tensor axis needs them: here ones that would win everywhere."""
    source = shutil.copytree(GOLDEN / case, tmp_path / "model")
    tensors, config = load_file(source / "model.safetensors"), hf.read_config(source)
    V = config["vocab_size"]
    for name in [name for name in tensors if name.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        loud = rng.normal(0, 20 * tensors[name].std(), (8, tensors[name].shape[1])).astype(np.float32)
        tensors[name] = np.concatenate([tensors[name], loud])
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": V + 8}))
    mesh = wmss.make_mesh(4, 2, 1) if "gemma" in case else wmss.make_mesh(2, 2, 2)
    model, params = wmss.load(source, mesh=mesh, dtype="float32", vocab_size=V)
    want = np.load(GOLDEN / case / "golden.npz")

    @jax.jit
    def run(params, tokens):
        with wmss.sharding.use(mesh):
            hidden = model.hidden(params, tokens)
            head = wmss.head.logits(hidden, model.unembed(params), softcap=model.softcap)
            return wmss.head.logits(hidden, model.unembed(params), model.vocab_size, model.softcap), head

    logits, unmasked = run(params, np.tile(want["tokens"], (4, 1)))
    np.testing.assert_allclose(logits[:2, :, :V], want["logits"], atol=TOLERANCE)
    assert logits.argmax(-1).max() < V <= unmasked.argmax(-1).max()
    assert logits[..., V:].max() < -1e20
    wmss.save(model, params, tmp_path / "out", tokenizer_from=source)
    ours = load_file(tmp_path / "out/model.safetensors")
    assert hf.read_config(tmp_path / "out")["vocab_size"] == V + 8
    assert all(tensor.tobytes() == ours[name].tobytes() for name, tensor in tensors.items())


@each_case
def test_configs_of_transformers_4_and_5_mean_the_same(case):
    read = lambda name: hf.from_config(json.loads((GOLDEN / case / name).read_text()))
    assert read("config_v4.json") == read("config.json")


@pytest.mark.parametrize("case", TIED)
def test_a_tied_config_with_a_differing_head_is_refused(case, tmp_path):
    source = shutil.copytree(GOLDEN / case, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    embed = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    save_file({**tensors, "lm_head.weight": embed + np.ones_like(embed)}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"ties lm_head.weight to model.embed_tokens.weight, but the file holds diff"):
        wmss.load(source)


def test_the_text_part_of_a_multimodal_checkpoint_in_either_layout(tmp_path, caplog):
    """The golden file has the names of published checkpoints; transformers 5 has others in memory."""
    source = shutil.copytree(GOLDEN / "gemma3/multimodal", tmp_path / "model")
    model, params = wmss.load(source)
    tensors = load_file(source / "model.safetensors")
    renamed = {
        "model." + name.replace("language_model.model.", "language_model."): tensor for name, tensor in tensors.items()
    }
    save_file(renamed, source / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        _, again = wmss.load(source)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert model.arch == "gemma3_text" and "tensors of multi_modal_projector, vision_tower are left out" in caplog.text
    save_file({**renamed, "audio_tower.stray": np.zeros(2, np.float32)}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"extra: audio_tower.stray"):
        wmss.load(source)


def test_a_published_multimodal_config_leaves_most_to_its_family():
    """huggingface.co/google/gemma-3-4b-it, config.json."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    config = hf.from_config({"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16"}).config
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert config.tied and config.windows == ((*[1024] * 5, None) * 6)[:34]
    assert config.rope == rope.Rope(1e6, rope.Linear(8.0)) and config.kinds[0].rope == rope.Rope(1e4)


# Name and total parameters as their model cards and indices have them; what their config.json says, defaults left out.
PUBLISHED = {
    "Llama-3.1-8B": (8_030_261_248, {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "pretraining_tp": 1,
        "rope_theta": 500000.0, "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    }),
    "Mistral-7B-v0.1": (7_241_732_096, {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 4096,
    }),
    "Qwen2.5-3B": (3_085_938_688, {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_window_layers": 36, "sliding_window": 32768, "use_sliding_window": False,
        "tie_word_embeddings": True, "use_mrope": False,
    }),
    "gemma-2-9b": (9_241_705_984, {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336,
        "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
        "query_pre_attn_scalar": 256, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid",
    }),
    "gemma-3-1b": (999_885_952, {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None,
        "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "attn_logit_softcapping": None,
    }),
    "Qwen3-30B-A3B": (30_532_122_624, {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "router_aux_loss_coef": 0.001, "output_router_logits": False, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_window_layers": 48, "use_sliding_window": False, "sliding_window": None,
    }),
    "Phi-4-mini": (3_836_021_760, {
        "model_type": "phi3", "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "sliding_window": 262144, "tie_word_embeddings": True,
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "resid_pdrop": 0.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    }),
    "SmolLM3-3B": (3_075_098_624, {
        "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0, "no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4, "pretraining_tp": 2,
        "layer_types": ["full_attention"] * 36, "max_window_layers": 28, "use_sliding_window": False,
    }),
    "OLMo-2-1124-7B": (7_298_617_344, {
        "model_type": "olmo2", "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
        "rope_theta": 500000, "rope_scaling": None, "tie_word_embeddings": False,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_give_the_published_number_of_parameters(name):
    total, config = PUBLISHED[name]
    model = hf.from_config(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.abstract())) == total
    again = hf.from_config(json.loads(json.dumps(ARCHS[model.arch].to_hf(model.config))))
    assert again == model


@pytest.mark.parametrize(
    "case, change, message",
    [
        ("llama/llama3", {"mlp_bias": True}, "mlp_bias=True is not implemented for llama, only False"),
        ("llama/llama3", {"num_local_experts": 8}, "num_local_experts=8: llama here knows no such feature"),
        ("gemma3_text/tied", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not impl"),
        ("gemma3_text/tied", {"layer_types": ["chunked_attention"] * 7}, "chunked_attention is not implemented"),
        ("qwen3_moe/normed", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not implemented for qwen3_moe"),
        ("qwen3_moe/normed", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not implemented for qwen3_moe"),
        ("smollm3/nope", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 5 layers"),
        ("olmo2/untied", {"clip_qkv": 8.0}, "clip_qkv=8.0: olmo2 here knows no such feature"),
        ("gemma3/multimodal", {"text_config": None}, "text_config: model_type 'gemma3' needs one of type"),
    ],
)
def test_what_a_family_does_not_implement_is_refused_by_name(case, change, message):
    with pytest.raises(ValueError, match=message):
        hf.from_config({**hf.read_config(GOLDEN / case), **change})


# -- adapters, experts, rope ---------------------------------------------------------------------------------------


@one_each
def test_adapters_have_names_of_modules_of_the_file(case):
    model = hf.from_config(hf.read_config(GOLDEN / case), lora=Lora(2, 4.0))
    names = {name for row in model.rows for name in row.names(model.sizes)}
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight" for name in names}
    theirs = tensorfile.tensors(GOLDEN / case)
    matrices = {name for name, tensor in theirs.items() if ".layers." in name and len(tensor.shape) == 2}
    assert modules == matrices


@pytest.mark.parametrize("case", ["phi3/window", "qwen3_moe/normed"])
def test_an_adapter_of_fused_or_of_many_matrices_computes_what_the_merged_ones_do(case):
    model = hf.from_config(hf.read_config(GOLDEN / case), lora=Lora(2, 4.0))
    _, base, want = loaded(case)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), model.abstract())
    run = jax.jit(model.base.logits)
    found = run(model.adapt(base, adapter), want["tokens"])
    np.testing.assert_allclose(found, run(model.merge(base, adapter), want["tokens"]), atol=1e-3)
    assert np.abs(found - want["logits"]).max() > 0.1


def test_load_balance_is_that_of_transformers_and_a_metric_of_the_step():
    model, params, want = loaded("qwen3_moe/tied")
    _, metrics = jax.jit(model.hidden_and_metrics)(params, want["tokens"])
    np.testing.assert_allclose(metrics["load_balance"], want["load_balance"], rtol=1e-5)
    batch = {"tokens": want["tokens"], "targets": want["tokens"], "loss_weights": np.ones((2, 40), np.float32)}
    _, metrics = jax.jit(lambda p: wmss.loss(model, wmss.objectives.Sft(), {"strong": p}, {}, batch))(params)
    np.testing.assert_allclose(metrics["load_balance/strong"], want["load_balance"], rtol=1e-5)


def test_yarn_lengthens_by_its_factor_or_by_the_ratio_of_two_scales():
    """arXiv 2309.00071, eq. 22, and DeepSeek's variant of it."""
    yarn = lambda **settings: rope.Yarn(factor=4.0, original_max_position_embeddings=16, **settings).length
    assert yarn() == pytest.approx(0.1 * np.log(4) + 1)
    assert yarn(attention_factor=1.5) == 1.5
    assert yarn(mscale=2.0, mscale_all_dim=1.0) == pytest.approx((0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1))


def test_a_multimodal_directory_is_checked_by_the_names_of_its_text_part():
    verdicts = list(convert.check(GOLDEN / "gemma3/multimodal"))
    assert all(good for _, good in verdicts), verdicts
    assert verdicts[-1][0].startswith("files: 28 tensors bit-identical")
