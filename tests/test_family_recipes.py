"""WMSS end to end for every family: a tiny recipe from M0 to what is shipped."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes
import transformers

import wmss_jax as wmss
from wmss_jax import config, hf, pipeline, roles, tokenizer
from wmss_jax.models import ARCHS


def configs():
    """{family: config.json} of the golden directories: of each family in ARCHS the first variant, by name."""
    found = {}
    for file in sorted((Path(__file__).parent / "golden").glob("*/*/config.json")):
        found.setdefault(json.loads(file.read_text()).get("model_type"), file)
    return {family: file for family, file in found.items() if family in ARCHS}


CONFIGS = configs()
OVERRIDES = (
    "pretrain=null", "controls={}", "eval={}", "sft={steps: 2}", "joint.steps=2", "train.checkpoint_every_steps=9",
    "train.diagnose_every_steps=null", "dataset.seq_len=24", "dataset.chat_template=true",
    "curriculum.min_effective_share=0",
)  # fmt: skip
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def test_every_family_has_a_golden_config():
    assert set(CONFIGS) == set(ARCHS)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("family", CONFIGS)
def test_a_recipe_from_start_to_export(family, tmp_path, monkeypatch):
    monkeypatch.chdir(recipes.write(tmp_path))
    Path("config.json").write_text(json.dumps(json.loads(CONFIGS[family].read_text()) | {"vocab_size": 304}))
    recipe = recipes.load(*OVERRIDES)
    with recipes.one_device():
        summary = pipeline.run(recipe, say=lambda _: None)
    lines = [json.loads(line) for line in Path("run/joint/metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    model, params = wmss.load(summary["export"])
    start, before = roles.load("run/init", "strong")
    assert model.arch == family and model.sizes == start.sizes
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), before, params)
    assert all(jax.tree.leaves(moved)), "every parameter was trained, and is in the export"
    check_card(Path(summary["export"]), recipe)


def check_card(export: Path, recipe) -> None:
    """What is shipped says of what it was made, and can be made again."""
    card = (export / "README.md").read_text()
    meta = json.loads(next(Path("run/joint/checkpoints").glob("*/meta.json")).read_text())
    for said in (
        "pipeline_tag: text-generation", "| objective | LogitMix(lam=0.5", f"(digest {meta['lineage']['weak']})",
        f"(digest {meta['lineage']['data']})", f"digest {config.digest(recipe)}", "jax ", "| stage | joint, 2 steps |",
    ):  # fmt: skip
        assert said in card, said
    assert config.load(export / "wmss_recipe.yaml") == recipe
    assert (
        json.loads((export / "tokenizer_config.json").read_text())["chat_template"]
        or (export / "chat_template.jinja").exists()
    )
    assert hf.stops(export) == [1], "the tokenizer's end of turn"
    made, config_there = tokenizer.load(export), transformers.AutoConfig.from_pretrained(export)
    assert [getattr(made, key) for key in IDS] == [getattr(config_there, key) for key in IDS]
