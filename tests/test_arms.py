"""Arms of a recipe: every objective, weak source and control from the YAML to the step; what is refused, and why."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes
import tiny

from wmss_jax import arms, checkpoint, curriculum, pipeline, roles, train
from wmss_jax.config import ConfigError
from wmss_jax.neftune import Neftune
from wmss_jax.objectives import ControlledMix, Distill, LogitMix, SelfDistill, Sft, Undial
from wmss_jax.weak_source import EarlyExit, Ema, Interpolation, Noise

pytestmark = pytest.mark.usefixtures("compiled_once")

CONTROLS = {
    "step1": {"weak": {"source": {"name": "sft_step", "step": 3}}},
    "noise": {"weak": {"source": {"name": "noise", "std": 0.3}}},
    "blend": {"weak": {"source": {"name": "interpolation", "t": 0.25}}},
    "exit": {"weak": {"source": {"name": "early_exit", "layer": 1}}},
    "tail": {"weak": {"control": "permuted_tail"}},
    "constant": {"weak": {"control": "constant"}},
    "self": {"objective": {"name": "self_distill"}},
    "undial": {"objective": {"name": "undial"}},
    "undial_base": {"objective": {"name": "undial"}, "reference": "base"},
    "teacher": {"objective": {"name": "distill"}, "teacher": "run/sft/checkpoints/6"},
    "noisy": {"objective": {"name": "sft"}, "neftune": {}},
    "uniform": {"curriculum": {"control": "uniform", "dedup": True}},
    "random": {"curriculum": {"control": "random"}},
}
EMA = "joint.weak.source={name: ema, decay: 0.5}"
PLAIN = ("eval={}", "curriculum.min_effective_share=0", f"controls={json.dumps(CONTROLS)}")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A recipe carried out up to its joint stage, whose weak agent is an average."""
    root = recipes.write(tmp_path_factory.mktemp("arms"))
    with pytest.MonkeyPatch.context() as patch, recipes.one_device():
        patch.chdir(root)
        pipeline.run(recipes.load(EMA, *PLAIN), until="joint", say=lambda _: None)
    return root


@pytest.fixture
def root(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(recipes.copy(begun, tmp_path / "copy"))
    with recipes.one_device():
        yield tmp_path / "copy"


@pytest.fixture
def job(root, monkeypatch):
    """The job of an arm, which is not carried out."""
    done = {}

    def fake(job):
        done[job.directory.name] = job
        return job.directory.parent / "sft/checkpoints/6"

    def make(name):
        with monkeypatch.context() as patch:
            patch.setattr(train, "train", fake)
            pipeline.run(recipes.load(EMA, *PLAIN), until=name, say=lambda _: None)
        return done[name]

    return make


def strong(stage, step):
    return roles.load(f"run/{stage}/checkpoints/{step}", "strong")[1]


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_an_average_as_weak_agent_resumes_to_the_same_bits(root):
    expected = strong("joint", 6)
    record = root / "run/stages/joint.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "output": None}))  # as an interruption leaves it
    shutil.rmtree("run/joint/checkpoints/6")
    pipeline.run(recipes.load(EMA, *PLAIN), until="joint", say=lambda _: None)
    assert_equal(strong("joint", 6), expected)
    assert json.loads(record.read_text())["inputs"]["weak_source"] == "Ema(decay=0.5)"


def test_the_average_belongs_to_the_inputs_of_the_stage(root):
    with pytest.raises(ValueError, match=r"weak_source was 'Ema\(decay=0.5\)', is 'Ema\(decay=0.6\)'"):
        pipeline.run(recipes.load(EMA.replace("0.5", "0.6"), *PLAIN), until="joint", say=lambda _: None)


def test_a_step_of_the_sft_that_a_weak_agent_is_of_is_kept(root, job):
    """Step 3 is no multiple of checkpoint_every_steps, and keep_last would have removed it."""
    assert checkpoint.steps("run/sft/checkpoints") == [3, 4, 6]
    found = job("step1")
    assert found.weak_source is None
    assert_equal(found.frozen()["weak"], strong("sft", 3))
    unkept = json.dumps({"late": {"weak": {"source": {"name": "sft_step", "step": 5}}}})
    with pytest.raises(ValueError, match=r"controls.late.weak.source.step: 5 was not kept .* there are 3, 4, 6"):
        pipeline.run(recipes.load(EMA, *PLAIN, f"controls={unkept}"), until="late", say=lambda _: None)


def test_noise_is_on_the_base_and_made_once(job):
    found, base = job("noise"), strong("pretrain", 4)
    assert found.weak_source is None
    assert_equal(found.frozen()["weak"], jax.jit(lambda p: Noise(0.3)(None, {"weak": p}))(base))


def test_moving_sources_come_with_what_they_are_made_of(job):
    blend, leave = job("blend"), job("exit")
    assert blend.weak_source == Interpolation(0.25) and leave.weak_source == EarlyExit(1)
    assert_equal(blend.frozen()["weak"], strong("pretrain", 4))
    assert leave.frozen() == {} and leave.models["weak"].sizes["L"] == 1
    assert leave.models["strong"].sizes["L"] == 2


def test_objectives_get_the_models_that_they_name(job):
    made = {name: job(name) for name in ("tail", "constant", "self", "undial", "undial_base", "teacher", "noisy")}
    assert {name: found.objective for name, found in made.items()} == {
        "tail": ControlledMix(LogitMix(0.5), "permuted_tail"), "constant": ControlledMix(LogitMix(0.5), "constant"),
        "self": SelfDistill(), "undial": Undial(), "undial_base": Undial(), "teacher": Distill(), "noisy": Sft(),
    }  # fmt: skip
    assert made["constant"].frozen() == {} and made["noisy"].frozen() == {}
    # Without a weak section of its own a control has the joint stage's, an average; with one, all of that section.
    assert made["self"].weak_source == Ema(0.5) and made["self"].frozen() == {}
    assert made["tail"].weak_source is None
    assert_equal(made["tail"].frozen()["weak"], strong("pretrain", 4))
    assert_equal(made["undial"].frozen()["reference"], strong("sft", 6))
    assert_equal(made["undial_base"].frozen()["reference"], strong("pretrain", 4))
    assert_equal(made["teacher"].frozen()["teacher"], strong("sft", 6))
    assert made["noisy"].neftune == Neftune() and made["tail"].neftune is None


def test_an_arms_own_curriculum_draws_its_examples_as_long_as_the_joint_stage(job):
    uniform, dealt = job("uniform"), job("random")
    joint = np.load("run/curriculum/round-1.npy")
    np.testing.assert_allclose(np.load("run/curriculum/round-1-uniform.npy"), 1 / len(joint))
    mine = np.load("run/curriculum/round-1-random.npy")
    np.testing.assert_allclose(np.sort(mine), np.sort(joint))
    assert curriculum.effective_share(mine) == pytest.approx(curriculum.effective_share(joint))
    assert not np.allclose(mine, joint)
    assert uniform.plan.total_steps == dealt.plan.total_steps == 6
    assert len(np.unique(uniform.plan.draws[0])) == len(uniform.plan.draws[0]), "without duplicates"
    assert len(np.unique(dealt.plan.draws[0])) < len(dealt.plan.draws[0])


@pytest.mark.slow
def test_lora_holds_a_teacher_and_a_step_of_the_sft_beside_its_base(root, monkeypatch):
    """The teacher is whole; the step of the SFT is an adapter on the one base."""
    jobs = {}
    fake = lambda job: jobs.setdefault(job.directory.name, job) and job.directory.parent / "sft/checkpoints/6"
    controls = {name: CONTROLS[name] for name in ("step1", "teacher")}
    settings = (
        "work_dir=other",
        "lora={rank: 2}",
        "eval={}",
        "joint.resample=false",
        f"controls={json.dumps(controls)}",
    )
    pipeline.run(recipes.load(*settings, "joint.steps=1"), until="joint", say=lambda _: None)
    monkeypatch.setattr(train, "train", fake)
    for name in controls:
        pipeline.run(recipes.load(*settings, "joint.steps=1"), until=name, say=lambda _: None)
    assert jobs["step1"].frozen().keys() == {"base", "weak"}
    assert_equal(jobs["step1"].frozen()["weak"], roles.load("other/sft/checkpoints/3", "strong")[1])
    frozen = jobs["teacher"].frozen()
    assert frozen.keys() == {"base", "teacher"} and jobs["teacher"].models["teacher"].lora is None
    assert_equal(frozen["teacher"], strong("sft", 6))


# -- what is refused --------------------------------------------------------------------------------------------------

WEAK = "joint.weak"


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["joint.objective={name: distill}"], "joint.teacher: distill learns from a teacher; name its directory"),
        (["joint.teacher=x"], "joint.teacher: logit_mix has none; leave it out, or use distill"),
        (["joint.reference=base"], "joint.reference: logit_mix holds on to none"),
        (["joint.objective={name: sft}", f"{WEAK}.control=permuted_tail"], "joint.weak: sft has no weak agent"),
        (["joint.objective={name: gift}", f"{WEAK}.trainable=true"], "joint.weak: gift has no weak agent"),
        (
            ["joint.objective={name: self_distill}", f"{WEAK}.trainable=true"],
            "joint.weak.trainable: self_distill learns from its weak agent",
        ),
        (
            ["joint.objective={name: self_distill}", f"{WEAK}.control=shuffled_tokens"],
            "joint.weak.control: shuffled_tokens is a control of logit_mix, not of self_distill",
        ),
        (["joint.objective={name: undial, gamma: -1}"], "joint.objective: gamma must be >= 0, got -1.0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(tmp_path, monkeypatch, overrides, words):
    monkeypatch.chdir(recipes.write(tmp_path))
    with pytest.raises(ConfigError) as caught:
        pipeline.run(recipes.load(*overrides))
    assert words in str(caught.value) and not Path("run").exists()


def test_controls_without_a_weak_agent_may_inherit_the_joint_stages(tmp_path):
    recipe = recipes.load_in(recipes.write(tmp_path), f"{WEAK}.control=permuted_tail")
    assert arms.objective(recipe, "joint") == ControlledMix(LogitMix(0.5), "permuted_tail")
    assert arms.objective(recipe, "sft_continued") == Sft()


@pytest.mark.parametrize(
    "control, words",
    [
        ({"weak": {"source": {"name": "early_exit", "layer": 2}}}, "early_exit after layer 2 of 2"),
        ({"weak": {"source": {"name": "sft_step", "step": 7}}}, "controls.late.weak.source.step: 7, and the SFT stage"),
        ({"objective": {"name": "distill"}, "teacher": "small"}, "controls.late.teacher: small has rows for 96 tokens"),
    ],
)
def test_what_only_the_models_tell_is_refused_before_the_sft(tmp_path, monkeypatch, control, words):
    monkeypatch.chdir(recipes.write(tmp_path))
    roles.save("small", {"strong": (tiny.model(), tiny.params(tiny.model()))}, {})
    monkeypatch.setattr(train, "train", lambda job: 1 / 0)
    with recipes.one_device(), pytest.raises(ValueError, match=words):
        recipe = recipes.load("pretrain=null", f"controls={json.dumps({'late': control})}", "eval={}")
        pipeline.run(recipe, until="late", say=lambda _: None)


def test_noise_of_no_size_is_none(tmp_path):
    stage = recipes.load_in(recipes.write(tmp_path), "joint.neftune={alpha: 0}").joint
    assert arms.neftune(stage) is None
