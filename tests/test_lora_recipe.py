"""A recipe with `lora`: adapters trained on one base, in every stage; merged or exported as PEFT's."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes
from safetensors.numpy import load_file

import wmss_jax as wmss
from wmss_jax import checkpoint, convert, hf, pipeline, roles, runs, train
from wmss_jax.stages import ModelRef

LORA = ("lora={rank: 4, alpha: 8, targets: [q_proj, mlp.down_proj]}", "curriculum.min_effective_share=0")
SIZES = {"L": 2, "D": 32, "NH": 64, "F": 48}


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two rounds and a control with a trained weak agent."""
    root = recipes.write(tmp_path_factory.mktemp("lora"))
    with pytest.MonkeyPatch.context() as patch, recipes.one_device():
        patch.chdir(root)
        recipe = recipes.load(*LORA, "rounds=2", "controls={both: {weak: {trainable: true}}}")
        pipeline.run(recipe, say=lambda _: None)
    return root


@pytest.fixture
def root(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(recipes.copy(finished, tmp_path / "copy"))
    with recipes.one_device():
        yield tmp_path / "copy"


def last(root, stage):
    return root / f"run/{stage}/checkpoints/{recipes.STEPS[stage.partition('-')[0]]}"


def test_checkpoints_hold_adapters_and_say_of_what(root):
    adapter_shapes = {(2, 32, 4), (2, 4, 4, 16), (2, 48, 4), (2, 4, 32)}
    for stage in ("sft", "joint", "joint-2"):
        model, params = roles.load(last(root, stage), "strong")
        assert model.lora is not None and model.lora.targets == ("q_proj", "mlp.down_proj")
        assert {leaf.shape for leaf in jax.tree.leaves(params)} == adapter_shapes
        assert checkpoint.read_meta(last(root, stage))["base"]["directory"] == str(last(Path(), "pretrain"))
    assert roles.models(last(root, "pretrain"))["strong"].lora is None, "the base is pre-trained whole"


def test_only_the_targets_differ_between_base_and_export(root):
    _, base = ModelRef(last(root, "pretrain"), "strong").load(None)
    model, shipped = hf.load(root / "run/export")
    pairs = zip(_named(base), jax.tree.leaves(shipped), strict=True)
    changed = {name for (name, before), after in pairs if not np.array_equal(before, after)}
    assert changed == {"layers.attention.q_proj", "layers.mlp.down_proj"}
    _, merged = ModelRef(last(root, "joint-2"), "strong").load(None)
    jax.tree.map(np.testing.assert_array_equal, shipped, merged)


def test_the_second_round_has_the_first_adapter_as_its_weak_agent(root, monkeypatch):
    """M1 is the base with a frozen adapter: one base, two adapters, and still no second set of weights."""
    jobs = []
    monkeypatch.setattr(train, "train", lambda job: jobs.append(job) or 1 / 0)
    shutil.rmtree(root / "run/joint-2")
    (root / "run/stages/joint-2.json").unlink()
    with pytest.raises(ZeroDivisionError):
        pipeline.run(recipes.load(*LORA, "rounds=2", "controls={}"), say=lambda _: None)
    frozen, trained = jobs[0].frozen(), jobs[0].trained()
    assert frozen.keys() == {"base", "weak"}
    jax.tree.map(np.testing.assert_array_equal, frozen["weak"], roles.load(last(root, "sft"), "strong")[1])
    jax.tree.map(np.testing.assert_array_equal, trained["strong"], roles.load(last(root, "joint"), "strong")[1])
    assert jobs[0].models["weak"].lora == jobs[0].models["strong"].lora


def test_in_the_first_round_base_and_weak_agent_are_one(root, monkeypatch):
    jobs = []
    monkeypatch.setattr(train, "train", lambda job: jobs.append(job) or 1 / 0)
    shutil.rmtree(root / "run/joint")
    (root / "run/stages/joint.json").unlink()
    with pytest.raises(ZeroDivisionError):
        pipeline.run(recipes.load(*LORA), until="joint", say=lambda _: None)
    assert jobs[0].frozen().keys() == {"base"} and jobs[0].models["weak"].lora is None


def test_a_trained_weak_agent_is_an_adapter_too(root):
    weak = roles.load(last(root, "joint").parents[2] / f"both/checkpoints/{recipes.STEPS['joint']}", "weak")
    assert weak[0].lora is not None
    assert any(np.asarray(leaf).any() for name, leaf in _named(weak[1]) if name.endswith("lora_b")), "it moved"


def _named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def test_interrupted_it_goes_on_to_the_same_bits(root):
    expected = roles.load(last(root, "joint"), "strong")[1]
    record = root / "run/stages/joint.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "output": None}))  # as an interruption leaves it
    shutil.rmtree(last(root, "joint"))
    assert [path.name for path in last(root, "joint").parent.iterdir()] == ["4"]
    pipeline.run(recipes.load(*LORA), until="joint", say=lambda _: None)
    jax.tree.map(np.testing.assert_array_equal, roles.load(last(root, "joint"), "strong")[1], expected)


def test_another_rank_in_the_same_directory_is_refused(root):
    with pytest.raises(ValueError, match=r"lora.rank was 4, is 8"):
        pipeline.run(recipes.load("lora={rank: 8, alpha: 8, targets: [q_proj, mlp.down_proj]}"), say=lambda _: None)
    with pytest.raises(ValueError, match=r"lora.* was"):
        pipeline.run(recipes.load(), say=lambda _: None)


def test_convert_export_merges_and_score_takes_the_merged_model(root):
    convert.export(last(root, "joint"), root / "out")
    _, merged = ModelRef(last(root, "joint"), "strong").load(None)
    jax.tree.map(np.testing.assert_array_equal, hf.load(root / "out")[1], merged)
    run = runs.prepare(recipes.load(*LORA), say=lambda _: None)
    model, params = run.ref(str(last(root, "joint"))).load(None)
    assert model.lora is None
    jax.tree.map(np.testing.assert_array_equal, params, merged)


def test_a_base_that_changed_is_named(root):
    shutil.rmtree(last(root, "pretrain"))
    shutil.copytree(root / "run/pretrain/checkpoints/2", last(root, "pretrain"))
    with pytest.raises(ValueError, match="adapter of another model"):
        ModelRef(last(root, "joint"), "strong").load(None)


@pytest.fixture
def on_a_directory(root):
    """A base that others have, too: a Hugging Face directory."""
    convert.export(last(root, "pretrain"), root / "base")
    return ("pretrain=null", "model={path: base, compute_dtype: float32, remat: none}", "work_dir=run-hf", *LORA)


def test_the_adapter_alone_is_exported_as_peft_reads_it(root, on_a_directory):
    pipeline.run(recipes.load(*on_a_directory, "export.format=adapter"), say=lambda _: None)
    out = root / "run-hf/export"
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["base_model_name_or_path"] == "base"
    assert settings["r"] == 4 and settings["lora_alpha"] == 8 and settings["target_modules"] == ["down_proj", "q_proj"]
    tensors = load_file(out / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1"
    assert tensors[f"{prefix}.self_attn.q_proj.lora_A.weight"].shape == (4, SIZES["D"])
    assert tensors[f"{prefix}.self_attn.q_proj.lora_B.weight"].shape == (SIZES["NH"], 4)
    assert tensors[f"{prefix}.mlp.down_proj.lora_A.weight"].shape == (4, SIZES["F"])
    assert len(tensors) == 2 * 2 * SIZES["L"]
    assert (out / "tokenizer.json").exists()
    # PEFT's own formula, from the two files, is the model that was trained.
    base, scale = load_file(root / "base/model.safetensors"), settings["lora_alpha"] / settings["r"]
    _, merged = ModelRef(root / f"run-hf/joint/checkpoints/{recipes.STEPS['joint']}", "strong").load(None)
    model = wmss.load(root / "base")[0]
    for layer in range(SIZES["L"]):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        expected = base[f"{name}.weight"] + scale * (b @ a)
        row = next(row for row in model.rows if row.path == "layers.attention.q_proj")
        ours = row.to_theirs(np.asarray(merged["layers"]["attention"]["q_proj"][layer]), model.sizes)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_cached_weak_agent_needs_no_second_head(root, on_a_directory):
    cached = ("joint.weak.placement=cached", "model.compute_dtype=bfloat16")
    pipeline.run(recipes.load(*on_a_directory, *cached), until="joint", say=lambda _: None)
    pipeline.run(recipes.load(*on_a_directory, cached[1], "work_dir=resident"), until="joint", say=lambda _: None)
    one, other = (
        [json.loads(line) for line in (root / run / "joint/metrics.jsonl").read_text().splitlines()]
        for run in ("run-hf", "resident")
    )
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (one, other)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("lora={targets: [query]}",), ["lora.targets", "'query'", "q_proj", "up_proj"]),
        (("lora={rank: 0}",), ["lora.rank"]),
        (("export.format=adapter",), ["export.format", "lora"]),
        (("export.format=adapter", "lora={rank: 4}"), ["export.format", "model.path"]),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, monkeypatch, overrides, words):
    monkeypatch.chdir(recipes.write(tmp_path))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError) as caught, recipes.one_device():
        pipeline.run(recipes.load(*overrides), say=lambda _: None)
    assert all(word in str(caught.value) for word in words)
    assert sorted(tmp_path.iterdir()) == before
