"""configs/: every recipe loads and says what to expect; the presets differ where the paper's versions do."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from wmss_jax import examples
from wmss_jax.config import RunConfig, build, load
from wmss_jax.objectives import OBJECTIVES

DIRECTORY = Path(__file__).parent.parent / "configs"
RECIPES = sorted(DIRECTORY.glob("*.yaml"))
FAMILIES = ("paper_v1", "paper_v2", "released_code")
SIZES = {"qwen3_4b": "Qwen/Qwen3-4B-Base", "qwen3_8b": "Qwen/Qwen3-8B-Base"}

# PAPER.md §0.1, rows in its order; what a version leaves open has the value of another one or ours.
DIFFER: dict[str, tuple[Any, Any, Any]] = {
    "joint.weak.trainable": (False, True, True),
    "curriculum.variant": ("v1", "v2", "v1"),  # the meaning of alpha and beta
    "curriculum.normalize_terms": (False, False, True),
    "curriculum.dedup": (False, True, False),
    "dataset.batch_size": (256, 512, 256),
    "dataset.seq_len": (8192, 4096, 4096),
    "optimizer.warmup_fraction": (0.0, 0.1, 0.0),
    "joint.loss_on": ("completion", "completion", "all"),
    "joint.objective.mix_dtype": ("float32", "float32", "bfloat16"),  # §14, item 10
    "score.shifted": (True, True, False),  # §14, item 12
    "model.param_dtype": ("float32", "float32", "bfloat16"),  # §5
}
# PAPER.md §5: said by at least one of them and contradicted by none.
ALIKE: dict[str, Any] = {
    "seed": 42,
    "dataset.loss_on": "completion",
    "dataset.too_long": "truncate",
    "optimizer.peak_lr": 1e-5,
    "optimizer.schedule": "linear",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 1.0,
    "sft.epochs": 1,
    "sft.loss_on": "completion",
    "curriculum.alpha": 0.1,
    "curriculum.beta": 0.8,
    "curriculum.gamma": 0.1,
    "curriculum.multiplier": 1.0,
    "curriculum.uniform_share": 0.0,
    "curriculum.min_effective_share": 0.0,
    "joint.epochs": 1,
    "joint.objective.name": "logit_mix",
    "joint.objective.lam": 0.5,
    "joint.resample": True,
    "rounds": 1,
    "export.calibrate": "none",
}


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """{dotted path: value} of everything that is no mapping."""
    if not isinstance(node, dict):
        return {path: node}
    return {
        leaf: value for key, inner in node.items() for leaf, value in flat(inner, f"{path}.{key}".strip(".")).items()
    }


def preset(family: str, size: str) -> dict[str, Any]:
    return flat(load(DIRECTORY / f"{family}_{size}.yaml").model_dump())


def test_there_are_few_and_the_presets_are_among_them():
    names = {path.stem for path in RECIPES}
    assert len(names) <= 12
    assert names >= {f"{family}_{size}" for family in FAMILIES for size in SIZES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_objectives_exist(path):
    config = load(path)
    assert isinstance(config, RunConfig)
    for name, arm in config.arms().items():
        build(OBJECTIVES, arm.objective.model_dump(), name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_opens_with_what_to_expect(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    for word in ("command:", "hardware:", "time:", "result:"):
        (line,) = [line for line in comment if line.startswith(f"# {word}")]
        assert len(line.removeprefix(f"# {word}").strip()) > 10
    assert f"configs/{path.name}" in "".join(line for line in comment if line.startswith("# command:"))


@pytest.mark.parametrize("size", SIZES)
def test_families_differ_in_the_knobs_on_which_the_versions_do(size):
    loaded = [preset(family, size) for family in FAMILIES]
    differing = {key: tuple(one[key] for one in loaded) for key in loaded[0] if key != "work_dir"}
    differing = {key: values for key, values in differing.items() if len(set(map(str, values))) > 1}
    assert differing == DIFFER
    assert all(one | ALIKE == one for one in loaded)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_a_family_differ_in_the_model_alone(family):
    loaded = {size: preset(family, size) for size in SIZES}
    for size, one in loaded.items():
        assert one.pop("model.path") == SIZES[size]
        assert one.pop("work_dir") == f"runs/{family}_{size}"
    assert loaded["qwen3_4b"] == loaded["qwen3_8b"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_presets_leave_no_such_knob_to_a_default(family, size):
    written = flat(yaml.safe_load((DIRECTORY / f"{family}_{size}.yaml").read_text(encoding="utf-8")))
    assert {*DIFFER, *ALIKE} - {*written} == set()


def test_gemma_reads_the_answers_without_their_tags(tmp_path):
    """PAPER.md §6 [V2 E.4]: the tags go, their text stays; the system prompt is for the template to put somewhere."""
    recipe = load(DIRECTORY / "paper_v2_gemma3_4b.yaml")
    answer = "<think>\n1 + 1 = 2\n</think> <answer>\\boxed{2}</answer>"
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": answer}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (source,) = recipe.dataset.train
    (example,) = examples.read(source, tmp_path)
    assert example.messages is not None and example.messages[1]["content"] == "\n1 + 1 = 2\n \\boxed{2}"
    assert "<" not in str(recipe.dataset.system_prompt)
