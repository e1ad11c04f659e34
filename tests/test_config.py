"""config.py: what a recipe may say, and what a mistake in it is answered with."""

import dataclasses
import json
import math
import re
import types
import typing
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wmss_jax import config, sources, stage_config, training_config, weak_config
from wmss_jax.config import ConfigError, RunConfig, build, digest, json_schema, load
from wmss_jax.evals.graders import GRADERS

MINIMAL = {"work_dir": "runs/x", "model": {"path": "org/base"}, "dataset": {"train": "train.jsonl"}}
WEAK_KEYS = "path, trainable, source, control, placement, cache, cache_budget_gb"
CONTROL_KEYS = "objective, weak, teacher, reference, resample, curriculum, neftune"
NEW = {"config": "tiny/config.json"}  # a model of random parameters


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe, sections on top of MINIMAL, and returns its path."""

    def write(**sections):
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(MINIMAL | sections))
        return path

    return write


def complaint(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value).replace(str(path), "FILE")


# -- sections ---------------------------------------------------------------------------------------------------------


def train(**source):
    return {"dataset": {"train": [{"path": "a.jsonl"} | source]}}


def weak(**given):
    return {"joint": {"weak": given}}


def task(**changes):
    return {"eval": {"tasks": {"svamp": {"source": "svamp.json", "grader": "numeric"} | changes}}}


BAD_SECTIONS = [
    ({"optimizer": {"peak_lrr": 1}}, "optimizer.peak_lrr: unknown key; did you mean 'peak_lr'?"),
    ({"optimizer": {"peak_lr": 0}}, "optimizer.peak_lr: must be > 0, got 0"),
    ({"optimizer": {"b2": 1}}, "optimizer.b2: must be < 1, got 1"),
    ({"optimizer": {"min_lr_ratio": 1.5}}, "optimizer.min_lr_ratio: must be <= 1, got 1.5"),
    (
        {"optimizer": {"schedule": "cosin"}},
        "optimizer.schedule: expected 'constant', 'linear' or 'cosine', got 'cosin'",
    ),
    (
        {"optimizer": {"warmup_steps": 5, "warmup_fraction": 0.1}},
        "optimizer: warmup_steps (5) and warmup_fraction (0.1) are both given; keep one (null and 0 are off)",
    ),
    ({"optimizer": 3}, "optimizer: expected a mapping, got 3"),
    ({"optimizer": None}, "optimizer: expected a mapping, got null"),
    ({"curriculum": {"alpha": -1}}, "curriculum.alpha: must be >= 0, got -1"),
    ({"curriculum": {"dedup": 1}}, "curriculum.dedup: expected true or false, got 1"),
    ({"curriculum": {"uniform_share": 1.01}}, "curriculum.uniform_share: must be <= 1, got 1.01"),
    (
        {"curriculum": {"alpha": 0, "beta": 0, "gamma": 0}},
        "curriculum: alpha, beta and gamma are all 0; at least one must be > 0",
    ),
    ({"seed": True}, "seed: expected a whole number, got true"),
    ({"seed": 1.0}, "seed: expected a whole number, got 1.0"),
    ({"work_dir": 7}, "work_dir: expected a string, got 7"),
    ({"work_dir": ""}, "work_dir: string should have at least 1 character, got ''"),
    ({"data": ["a"]}, "data: expected a string, got a list"),
    ({"rounds": 0}, "rounds: must be > 0, got 0"),
    ({"mesh": {"data": 0}}, "mesh.data: must be >= 1, or -1 for all remaining devices, got 0"),
    ({"mesh": {"data": -1}}, "mesh: only one axis can be -1 (all remaining devices), got data, fsdp"),
    ({"model": {}}, "model: give exactly one of path and config, got neither"),
    ({"model": {"path": "a", "config": "b"}}, "model: give exactly one of path and config, got both"),
    ({"model": NEW | {"tokenizer": 3}}, "model.tokenizer: expected a string or a mapping, got 3"),
    (
        {"model": NEW | {"tokenizer": {"vocab_size": 0}}},
        "model.tokenizer.vocab_size: must be > 0, got 0",
    ),
    (
        {"model": {"path": "a", "tokenizer": {"vocab_size": 300}}},
        "model: a new tokenizer is for a new model (config); the one at path knows another vocabulary",
    ),
    # the data
    ({"dataset": {"train": []}}, "dataset.train: the list is empty; give at least one source"),
    ({"dataset": {"train": 3}}, "dataset.train: expected a list, got 3"),
    ({"dataset": {"train": None}}, "dataset.train: expected a list, got null"),
    ({"dataset": {"train": ["a.jsonl", 3]}}, "dataset.train.1: expected a mapping, got 3"),
    (
        {"dataset": {"train": {"path": "a.jsonl", "promt": "{q}"}}},
        "dataset.train.0.promt: unknown key; did you mean 'prompt'?",
    ),
    (train(path=""), "dataset.train.0.path: string should have at least 1 character, got ''"),
    (train(limit=0), "dataset.train.0.limit: must be > 0, got 0"),
    (
        train(messages="chat", text="{a}"),
        "dataset.train.0: messages and text are given; keep messages, or text, or prompt and completion",
    ),
    (
        train(text="{a}", prompt="{q}", completion="{a}"),
        "dataset.train.0: text and prompt and completion are given; keep messages, or text, or prompt and completion",
    ),
    (train(completion="{a}"), "dataset.train.0: completion is given without prompt"),
    (
        train(prompt="{q}"),
        "dataset.train.0: prompt is given without completion (to train on) or answer (to grade with)",
    ),
    (
        train(prompt="{q}", answer="{a}"),
        "dataset.train: source 0 has a prompt without completion, so it has nothing to take a loss on",
    ),
    (
        {"eval": {"data": ["a.jsonl", {"path": "b.jsonl", "prompt": "{q}", "answer": "{a}"}]}},
        "eval.data: source 1 has a prompt without completion, so it has nothing to take a loss on",
    ),
    (
        {"dataset": {"train": "a.jsonl", "chat_template": False, "system_prompt": "Think."}},
        "dataset: system_prompt needs chat_template; without it, write that text into the prompt's template",
    ),
    (
        {"dataset": {"train": "a.jsonl", "batch_size": 10}, "train": {"micro_batches": 3}},
        "train.micro_batches: 3 does not divide dataset.batch_size 10",
    ),
    # the stages
    ({"sft": {"epochs": {}}}, "sft.epochs: expected a whole number, got a mapping"),
    ({"sft": None}, "sft: expected a mapping, got null"),
    ({"sft": {"optimizer": {"b1": 1}}}, "sft.optimizer.b1: must be < 1, got 1"),
    ({"sft": {"optimiser": {}}}, "sft.optimiser: unknown key; did you mean 'optimizer'?"),
    ({"pretrain": {"steps": 5}}, "pretrain: only a model of random parameters (model.config) is pre-trained"),
    ({"joint": {"objective": {"lam": 0.5}}}, "joint.objective.name: required key is missing"),
    ({"joint": {"weak": {"zz": 1}}}, f"joint.weak.zz: unknown key; valid: {WEAK_KEYS}"),
    ({"joint": {"eval_every_steps": 5}}, "joint.eval_every_steps: needs eval.data with held-out examples"),
    ({"controls": {"a": {"weak": {"zz": 1}}}}, f"controls.a.weak.zz: unknown key; valid: {WEAK_KEYS}"),
    ({"controls": {"a": {}}}, f"controls.a: is the joint stage over again; give one of {CONTROL_KEYS}"),
    (
        {"controls": {"a": {"resample": False, "curriculum": {"control": "uniform"}}}},
        "controls.a.curriculum: nothing is drawn by it; set resample to true",
    ),
    (
        {"curriculum": {"control": "entropy_change", "beta": 0, "gamma": 0}},
        "curriculum: control: entropy_change is left with the terms of drop and rise, whose weights are 0",
    ),
    (weak(source={"name": "ema"}), "joint.weak.source: ema needs decay and no other number, got none"),
    (
        weak(source={"name": "ema", "decay": 0.9, "t": 0.5}),
        "joint.weak.source: ema needs decay and no other number, got decay, t",
    ),
    (weak(source={"step": 3}), "joint.weak.source: base takes no number, got step"),
    (
        weak(source={"name": "ema", "decay": 0.9}, placement="cached"),
        "joint.weak: placement: cached: source ema changes in every step; use placement: resident",
    ),
    (
        weak(source={"name": "early_exit", "layer": 1}, placement="cached"),
        "joint.weak: placement: cached: source early_exit changes in every step; use placement: resident",
    ),
    (
        weak(source={"name": "interpolation", "t": 0.5}, placement="cached"),
        "joint.weak: placement: cached: source interpolation changes in every step; use placement: resident",
    ),
    (
        weak(source={"name": "noise", "std": 0.1}, placement="cached"),
        "joint.weak: placement: cached: source noise is no checkpoint, which hidden states are kept of; use placement: "
        "resident",
    ),
    (
        weak(source={"name": "noise", "std": 0.1}, trainable=True),
        "joint.weak: trainable: a weak agent made by source noise has no parameters of its own to train",
    ),
    (
        weak(control="constant", trainable=True),
        "joint.weak: trainable: control constant replaces what a trained weak agent would learn from",
    ),
    (
        weak(source={"name": "ema", "decay": 0.9}) | {"lora": {}},
        "joint.weak.source: ema is made of whole models' parameters; with lora use base or sft_step",
    ),
    (
        weak(control="shuffled_examples") | {"dataset": {"train": "a.jsonl", "batch_size": 1}},
        "joint.weak.control: shuffled_examples needs dataset.batch_size >= 2, rows to trade",
    ),
    ({"controls": {"a/b": {"resample": False}}}, "controls.a/b: not a name: a letter, then letters, digits and _"),
    (
        {"controls": {"sft": {"resample": False}}},
        "controls.sft: the name is taken, as are pretrain, score, curriculum, joint, export, eval, init, stages, "
        "assets, cache, scores, weak_cache, M0, M1",
    ),
    # evaluation and export
    ({"eval": {"keep_best": True}}, "eval: keep_best needs data with held-out examples"),
    (
        {"eval": {"keep_best": True, "data": "held.jsonl"}, "sft": {"optimizer": {"ema_decay": 0.9}}},
        "eval.keep_best: not with optimizer.ema_decay, whose average is made at a stage's end only",
    ),
    ({"eval": {"every_steps": 5}}, "eval: every_steps needs data with held-out examples"),
    (
        {"eval": {"tasks": {"1": {"source": "a.json", "grader": "exact"}}}},
        "eval.tasks.1: not a name: a letter, then letters, digits and _",
    ),
    (
        task(grader="best"),
        "eval.tasks.svamp.grader: expected 'exact', 'numeric', 'equation', 'letter' or 'math', got 'best'",
    ),
    (task(grader=None), "eval.tasks.svamp: source needs a grader: when does an answer count?"),
    (task(task="gsm8k"), "eval.tasks.svamp: give a task by name, or a source with a grader"),
    (
        task(source={"path": "a.jsonl", "answer": "{a}"}),
        "eval.tasks.svamp: source needs prompt and answer, or neither and rows with question and answer",
    ),
    (
        task(source={"path": "a.jsonl", "messages": "chat"}),
        "eval.tasks.svamp: source needs prompt and answer, or neither and rows with question and answer",
    ),
    ({"export": {"calibrate": True}}, "export.calibrate: expected 'none' or 'lambda', got true"),
]


@pytest.mark.parametrize("sections, line", BAD_SECTIONS)
def test_a_mistake_is_one_line_with_its_path(recipe, sections, line):
    assert complaint(recipe(**sections)) == f"FILE: {line}"


def test_all_mistakes_are_reported_at_once(recipe):
    path = recipe(train={"keep_last": "x", "keep": 1}, curriculum={"gamma": -0.5}, rouns=2)
    lines = complaint(path, ["sft.epochs=0"]).splitlines()
    assert sorted(lines) == sorted(
        [  # in which order, releases of pydantic differ
            "FILE: train.keep_last: expected a whole number, got 'x'",
            "FILE: train.keep: unknown key; did you mean 'keep_last'?",
            "override 'sft.epochs=0': sft.epochs: must be > 0, got 0",
            "FILE: curriculum.gamma: must be >= 0, got -0.5",
            "FILE: rouns: unknown key; did you mean 'rounds'?",
        ]
    )


@pytest.mark.parametrize(
    "template, line",
    [
        ("{q", "'{q' is no template: expected '}' before end of string; a brace of the text is written twice"),
        (
            "{q}}",
            "'{q}}' is no template: Single '}' encountered in format string; a brace of the text is written twice",
        ),
        ("question", "'question' is the same for every row; a column's value is written {column}"),
        ("{{q}}", "'{{q}}' is the same for every row; a column's value is written {column}"),
        *[
            (f"{{{field}}}", f"{{{field}}} is no column: write {{column}}, {{column[0]}} or {{column[key]}}")
            for field in ("", "0", "0[a]", "q.a", "q[0].a", "q[]")
        ],
    ],
)
def test_templates_that_could_not_be_filled(recipe, template, line):
    assert complaint(recipe(**train(text=template))) == f"FILE: dataset.train.0.text: {line}"


@pytest.mark.parametrize(
    "template, filled",
    [
        ("{Body} {Question}", "A. B?"),
        ("{lEquations[0]}", "x=1"),
        ("{info[answer][0]}", "7"),
        ("{@ID}: {Answer:g}", "z-1: 32"),
        ("{{{2x}}}", "{q}"),
    ],
)
def test_templates_are_format_strings_over_columns(recipe, template, filled):
    row = {"Body": "A.", "Question": "B?", "lEquations": ["x=1"], "info": {"answer": [7]}, "@ID": "z-1", "2x": "q"}
    (source,) = load(recipe(**train(text=template))).dataset.train
    assert source.text is not None and source.text.format_map(row | {"Answer": 32.0}) == filled


@pytest.mark.parametrize(
    "written, paths",
    [
        ("a.jsonl", ["a.jsonl"]),
        ({"path": "a.jsonl"}, ["a.jsonl"]),
        (["a.jsonl", {"path": "b.json", "limit": 5}, "org/c"], ["a.jsonl", "b.json", "org/c"]),
    ],
)
def test_sources_are_written_as_a_path_a_source_or_a_list(recipe, written, paths):
    eval_ = {"data": written}
    loaded = load(recipe(dataset={"train": written}, eval=eval_))
    assert [source.path for source in loaded.dataset.train] == paths
    assert loaded.eval.data == loaded.dataset.train
    assert load(recipe(**task(source="org/c"))).eval.tasks["svamp"].source == sources.SourceConfig(path="org/c")


def test_arms_are_the_joint_stage_with_the_differences_of_the_controls(recipe):
    joint = {"steps": 7, "optimizer": {"peak_lr": 1e-3}, "weak": {"trainable": True}}
    controls = {
        "more_sft": {"objective": {"name": "sft"}},
        "frozen": {"weak": {"trainable": False}},
        "uniform": {"resample": False, "objective": {"name": "logit_mix", "lam": 0.9}},
    }
    arms = load(recipe(joint=joint, controls=controls)).arms()
    expected = {"joint": joint} | {name: joint | control for name, control in controls.items()}
    assert arms == {name: stage_config.JointConfig.model_validate(arm) for name, arm in expected.items()}
    assert list(arms) == ["joint", "more_sft", "frozen", "uniform"]


def test_graders_are_those_that_exist():
    named, _ = typing.get_args(config.TaskConfig.model_fields["grader"].annotation)
    assert typing.get_args(named) == (*GRADERS, "math")


def test_sections_are_frozen(recipe):
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        load(recipe()).train.keep_last = 3


def test_overrides_reach_every_kind_of_section(recipe):
    path = recipe(optimizer={"b1": 0.5}, **task())
    overrides = [
        "optimizer.clip_norm=",
        "dataset.train=b.jsonl",
        "pretrain.steps=5",
        "model={config: tiny}",
        "joint.objective={name: other, schedule: [1, a=b]}",
        "controls.more.resample=false",
        "eval.tasks.svamp.limit=3",
    ]
    loaded = load(path, overrides)
    assert loaded.optimizer == training_config.OptimizerConfig(b1=0.5, clip_norm=None)
    assert loaded.dataset.train == (sources.SourceConfig(path="b.jsonl"),)
    assert loaded.pretrain == stage_config.PretrainConfig(steps=5)
    assert loaded.joint.objective.model_dump() == {"name": "other", "schedule": [1, "a=b"]}
    assert loaded.controls["more"].resample is False
    assert loaded.eval.tasks["svamp"].limit == 3


# -- round trip -------------------------------------------------------------------------------------------------------

# What YAML can write without escapes; JSON does not escape the rest of its own accord.
TEXTS = st.text(st.characters(categories=("L", "N", "P", "S"), include_characters=" "), min_size=1)
NAMES = st.from_regex(r"[a-z][a-z0-9_]*", fullmatch=True).filter(lambda name: name not in config.RESERVED)
MEANINGS = [{}, {"messages": "m"}, {"text": "{t}"}, {"prompt": "{a[0]} {b}", "completion": "{c}", "answer": "{d}"}]


def values(hint: Any, metadata=()) -> st.SearchStrategy:
    """Values that satisfy a field of a section, read off its type and its bounds."""
    if typing.get_origin(hint) is Annotated:
        inner, *more = typing.get_args(hint)
        flat = [m for info in more for m in getattr(info, "metadata", [info])]
        return values(inner, [*metadata, *flat])
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return st.one_of([values(member, metadata) for member in typing.get_args(hint)])
    if typing.get_origin(hint) is tuple:
        return st.lists(values(typing.get_args(hint)[0]), min_size=1, max_size=2)
    if typing.get_origin(hint) is dict:
        return st.dictionaries(NAMES, values(typing.get_args(hint)[1]), max_size=2)
    if isinstance(hint, type) and issubclass(hint, pydantic.BaseModel):
        return sections(hint)
    bounds = {k: getattr(m, k) for m in metadata for k in ("ge", "gt", "le", "lt") if hasattr(m, k)}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if hint is float:
        exclude_low, exclude_high = bounds.get("gt"), bounds.get("lt")
        floats = st.floats(low, high, allow_nan=False, allow_infinity=False)
        return floats.filter(lambda x: x != exclude_low and x != exclude_high)
    if hint is int:
        return st.integers(1 if low is None else low + ("gt" in bounds))
    return {bool: st.booleans(), str: TEXTS, types.NoneType: st.none()}[hint]


@st.composite
def sections(draw, model):
    """Arguments of a section: any subset of the optional fields."""
    if model is sources.SourceConfig:
        path = draw(st.sampled_from([{"path": "a.jsonl"}, {"path": "owner/name", "split": "test"}]))
        return path | {"limit": draw(st.none() | st.integers(1, 9))} | draw(st.sampled_from(MEANINGS))
    drawn = {
        name: draw(values(field.annotation, field.metadata))
        for name, field in model.model_fields.items()
        if field.is_required() or draw(st.booleans())
    }
    if model is training_config.ModelConfig:
        origins = [{"path": "p", "config": None, "tokenizer": "t"}, {"config": "c", "path": None}]
        drawn |= draw(st.sampled_from(origins))
    if model is training_config.TrainConfig and drawn.get("checkpoint_bucket") is not None:
        drawn["checkpoint_bucket"] = "gs://bucket/name"
    if model is training_config.OptimizerConfig and drawn.get("warmup_steps") is not None:
        drawn.pop("warmup_fraction", None)
    if model is stage_config.CurriculumConfig:
        drawn |= {"gamma": 0.5}
    if model is stage_config.ObjectiveConfig:
        scalars = st.one_of(st.none(), st.booleans(), st.integers(), TEXTS)
        drawn |= draw(st.dictionaries(st.sampled_from(["lam", "tau"]), scalars))
    if model is weak_config.WeakConfig:
        drawn["path"] = None  # goes with few of the others
        resident = {"placement": "resident", "cache": None, "cache_budget_gb": None}
        checkpoint = {"source": draw(st.sampled_from([{"name": "base"}, {"name": "sft_step", "step": 3}]))}
        drawn |= checkpoint | draw(st.sampled_from([{"placement": "cached", "trainable": False}, resident]))
        if drawn.get("trainable"):
            drawn["control"] = "none"
    if model is stage_config.JointConfig and drawn.get("curriculum") is not None:
        drawn["resample"] = True
    if model is config.ExportConfig:
        drawn["format"] = "model"
    if model is training_config.DatasetConfig and drawn.get("system_prompt") is not None:
        drawn["chat_template"] = True
    if model is stage_config.ControlConfig:
        drawn["resample"] = drawn.get("curriculum") is not None or draw(st.booleans())
    if model is config.TaskConfig:
        own = {"task": None, "grader": "exact", "source": {"path": "a.jsonl", "prompt": "{q}", "answer": "{a}"}}
        drawn |= draw(st.sampled_from([own, {"task": "gsm8k", "source": None}]))
    if model is config.EvalConfig:
        drawn.setdefault("data", ["held_out.jsonl"])
    if model is RunConfig:
        drawn.setdefault("eval", {"data": "held_out.jsonl"})
        if "shuffled_examples" in json.dumps(drawn):
            drawn["dataset"]["batch_size"] = 8
        drawn.setdefault("train", {})["micro_batches"] = drawn["dataset"].get("batch_size", 256)
        if drawn["model"].get("config") is None:
            drawn["pretrain"] = None
        if drawn.get("joint", {}).get("weak", {}).get("cache") is not None:
            drawn["rounds"] = 1
        if "ema_decay" in json.dumps(drawn):  # the two together are refused
            drawn["eval"]["keep_best"] = False
    return drawn


# Time limits off, because a busy machine is no defect of the config.
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(sections(RunConfig))
def test_every_config_survives_a_file_and_a_row_of_overrides(tmp_path_factory, drawn):
    original = RunConfig.model_validate_json(json.dumps(drawn))
    path = tmp_path_factory.mktemp("trip") / "recipe.yaml"
    path.write_text(original.model_dump_json(), encoding="utf-8")
    assert load(path) == original
    assert digest(load(path)) == digest(original)

    dumped = original.model_dump(mode="json")
    overrides = [
        f"{section}.{key}={json.dumps(value, ensure_ascii=False)}"
        for section, pairs in dumped.items()
        if isinstance(pairs, dict)
        for key, value in pairs.items()
    ]
    rest = {key: value for key, value in dumped.items() if not isinstance(value, dict)}
    path.write_text(json.dumps(rest, ensure_ascii=False), encoding="utf-8")
    assert load(path, overrides) == original


def test_digest_depends_on_values_alone():
    plain = RunConfig.model_validate(MINIMAL)
    spelt_out = RunConfig.model_validate(dict(reversed(MINIMAL.items())) | {"rounds": 1})
    other = RunConfig.model_validate(MINIMAL | {"rounds": 2})
    assert re.fullmatch("[0-9a-f]{16}", digest(plain))
    assert digest(plain) == digest(spelt_out) != digest(other)


# -- build -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ramp:
    """From start to stop."""

    start: float
    stop: float
    steps: int = 10

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")


@dataclasses.dataclass(frozen=True)
class Mix:
    """Mixed logits."""

    lam: float | Ramp = 0.5
    """Share of the strong logits."""
    precision: Literal["float32", "bfloat16"] = "float32"
    layers: tuple[str, ...] = ()
    top: int | Literal["all"] | None = None
    ramps: tuple[Ramp, ...] = ()
    roles: ClassVar[tuple[str, ...]] = ("strong", "weak")
    seen: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        if isinstance(self.lam, float) and not 0 <= self.lam <= 1:
            raise ValueError(f"lam must be in [0, 1], got {self.lam}")


@dataclasses.dataclass(frozen=True)
class Tilt:
    tau: float


TABLE = {"mix": Mix, "tilt": Tilt}
RAMP = {"start": 0, "stop": 1}


@pytest.mark.parametrize(
    "spec, built",
    [
        ({"name": "mix"}, Mix()),
        ({"name": "mix", "lam": 1}, Mix(1.0)),
        ({"name": "mix", "lam": RAMP}, Mix(Ramp(0.0, 1.0))),
        ({"name": "mix", "layers": ["a", "b"], "top": "all"}, Mix(layers=("a", "b"), top="all")),
        ({"name": "mix", "top": 3, "ramps": [RAMP]}, Mix(top=3, ramps=(Ramp(0.0, 1.0),))),
        ({"name": "tilt", "tau": 2}, Tilt(2.0)),
    ],
)
def test_build(spec, built):
    made = build(TABLE, spec, "objective")
    assert made == built and type(made) is type(built)
    assert hash(made) == hash(built)  # static under jit, so a list must not get in
    if spec.get("lam") == 1:
        assert type(made.lam) is float


@pytest.mark.parametrize(
    "name, arguments, line",
    [
        ("mixx", {}, ".name: unknown name 'mixx'; did you mean 'mix'?"),
        ("kl", {}, ".name: unknown name 'kl'; valid: mix, tilt"),
        (3, {}, ".name: unknown name 3; valid: mix, tilt"),
        ("mix", {"lamb": 1}, ".lamb: unknown key; did you mean 'lam'?"),
        ("mix", {"seen": 1}, ".seen: unknown key; valid: lam, precision, layers, top, ramps"),
        ("mix", {"roles": []}, ".roles: unknown key; valid: lam, precision, layers, top, ramps"),
        ("mix", {"precision": "f32"}, ".precision: expected 'float32' or 'bfloat16', got 'f32'"),
        ("mix", {"layers": ["a", 3]}, ".layers.1: expected a string, got 3"),
        ("mix", {"layers": "a"}, ".layers: expected a list, got 'a'"),
        ("mix", {"top": 1.5}, ".top: expected a whole number or 'all', got 1.5"),
        ("mix", {"lam": 2}, ": lam must be in [0, 1], got 2.0"),
        ("mix", {"lam": "fast"}, ".lam: expected a number or a mapping, got 'fast'"),
        ("mix", {"lam": RAMP | {"steps": 0}}, ".lam: steps must be >= 1, got 0"),
        ("mix", {"lam": RAMP | {"stop": "b"}}, ".lam.stop: expected a number, got 'b'"),
        ("mix", {"lam": RAMP | {"step": 2}}, ".lam.step: unknown key; did you mean 'steps'?"),
        ("mix", {"lam": {"stop": 1}}, ".lam.start: required key is missing"),
        ("mix", {"ramps": [RAMP, {"stop": 1}]}, ".ramps.1.start: required key is missing"),
        ("mix", {"ramps": [RAMP | {"x": 1}]}, ".ramps.0.x: unknown key; valid: start, stop, steps"),
        ("tilt", {}, ".tau: required key is missing"),
        ("tilt", {"tau": True}, ".tau: expected a number, got true"),
        ("tilt", {"tau": math.nan}, ".tau: expected a finite number, got nan"),
    ],
)
def test_build_reports_with_the_path(name, arguments, line):
    with pytest.raises(ConfigError) as caught:
        build(TABLE, {"name": name} | arguments, "objective")
    assert str(caught.value) == f"objective{line}"


def test_build_needs_a_name():
    with pytest.raises(ConfigError, match=r"^at\.name: required key is missing; valid: mix, tilt$"):
        build(TABLE, {"lam": 1}, "at")


def test_build_reports_all_mistakes():
    with pytest.raises(ConfigError) as caught:
        build(TABLE, {"name": "mix", "lam": "x", "top": -0.5, "z": 1}, "a.yaml: objective")
    assert len(str(caught.value).splitlines()) == 3


# -- JSON schema ------------------------------------------------------------------------------------------------------


def test_schema_describes_every_field():
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["required"]) == set(MINIMAL)
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is (section["title"] == "ObjectiveConfig")
        assert all(len(field["description"]) > 20 for field in section["properties"].values())
    optimizer = schema["$defs"]["OptimizerConfig"]["properties"]
    assert optimizer["peak_lr"]["exclusiveMinimum"] == 0
    assert optimizer["b1"] | {"minimum": 0, "exclusiveMaximum": 1, "default": 0.9} == optimizer["b1"]
    assert schema["$defs"]["MeshConfig"]["properties"]["fsdp"]["default"] == -1


def test_schema_takes_a_path_a_source_or_a_list():
    one = [{"$ref": "#/$defs/SourceConfig"}, {"minLength": 1, "type": "string"}]
    definitions = json_schema()["$defs"]
    assert definitions["TaskConfig"]["properties"]["source"]["anyOf"] == [*one, {"type": "null"}]
    for section, key in (("DatasetConfig", "train"), ("EvalConfig", "data")):
        several = {"items": {"anyOf": one}, "type": "array"}
        assert definitions[section]["properties"][key]["anyOf"] == [*one, several]


def test_every_reference_of_the_schema_resolves():
    schema = json_schema({"objective": TABLE})
    references = re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(schema))
    assert references and set(references) == set(schema["$defs"])


@pytest.mark.parametrize("table", [TABLE, {"tilt": Tilt}])
def test_schema_of_a_table_is_one_of_its_rows(table):
    definitions = json_schema({"objective": table})["$defs"]
    reference = {"$ref": "#/$defs/ObjectiveConfig"}
    joint = definitions["JointConfig"]["properties"]["objective"]
    assert joint["default"] == {"name": "logit_mix", "lam": 0.5} and joint | reference == joint
    assert definitions["ControlConfig"]["properties"]["objective"]["anyOf"] == [reference, {"type": "null"}]
    objective = definitions["ObjectiveConfig"]
    rows = {row["properties"]["name"]["const"]: row for row in objective["oneOf"]}
    assert list(rows) == list(table) and objective["description"]
    assert all(row["additionalProperties"] is False for row in rows.values())
    assert rows["tilt"]["required"] == ["name", "tau"]
    if "mix" in rows:
        assert rows["mix"]["required"] == ["name"]
        assert set(rows["mix"]["properties"]) == {"name", "lam", "precision", "layers", "top", "ramps"}
        assert rows["mix"]["properties"]["lam"]["description"] == "Share of the strong logits."


@pytest.mark.parametrize("key", ["work_dir", "data"])
def test_a_bucket_has_to_be_mounted(recipe, key):
    with pytest.raises(ValueError, match=rf"{key}: .*gs://bucket/run is no directory: a bucket has to be mounted"):
        load(recipe(), [f"{key}=gs://bucket/run"])
