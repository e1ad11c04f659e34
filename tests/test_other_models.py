"""Roles of other sizes and families: their vocabularies are compared, their padding may differ. pytest tests/test_o*"""

import dataclasses
import json
from pathlib import Path

import chats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import tiny

import wmss_jax as wmss
from wmss_jax import agents, hf, pipeline, programs, roles, sharding, tokenizer, train
from wmss_jax.models.lora import Lora
from wmss_jax.objectives import OBJECTIVES, LogitMix

SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2}


# -- heads of different padding ---------------------------------------------------------------------------------------


def with_tokens(tokens, rows, seed, **size):
    """(model that knows some of its head's rows, its parameters, the same model and parameters without the others)."""
    padded, exact = tiny.model(vocab_size=rows, **size), tiny.model(vocab_size=tokens, **size)
    params = tiny.params(padded, seed)
    cut = params | {"embed": params["embed"][:tokens], "unembed": params["unembed"][:, :tokens]}
    return dataclasses.replace(padded, vocab_size=tokens), params, exact, cut


@pytest.mark.parametrize(("strong_rows", "weak_rows", "mesh"), [(96, 104, None), (104, 96, (2, 2, 2))])
def test_heads_of_different_padding_are_mixed_as_if_there_were_none(strong_rows, weak_rows, mesh):
    strong, strong_params, strong_cut, strong_params_cut = with_tokens(92, strong_rows, 0)
    weak, weak_params, weak_cut, weak_params_cut = with_tokens(92, weak_rows, 1, **SMALL)
    batch, mesh = tiny.batch(V=92), None if mesh is None else wmss.make_mesh(*mesh)

    def value_and_grads(models, params, frozen, mesh):
        if mesh is not None:
            params, frozen = (
                {role: jax.device_put(tree, models[role].shardings(mesh)) for role, tree in given.items()}
                for given in (params, frozen)
            )
        loss = lambda p: wmss.loss(models, LogitMix(lam=0.5), p, frozen, batch, mesh=mesh)[0]
        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        return value, jax.device_get(grads["strong"])

    models = {"strong": strong, "weak": weak}
    value, grads = value_and_grads(models, {"strong": strong_params}, {"weak": weak_params}, mesh)
    models = {"strong": strong_cut, "weak": weak_cut}
    expected, expected_grads = value_and_grads(models, {"strong": strong_params_cut}, {"weak": weak_params_cut}, None)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert grads["unembed"].shape == (32, strong_rows) and not grads["unembed"][:, 92:].any()
    cut = grads | {"embed": grads["embed"][:92], "unembed": grads["unembed"][:, :92]}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), cut, expected_grads)


def test_paddings_that_differ_are_to_be_said():
    models = {"strong": tiny.model(), "weak": tiny.model(vocab_size=104)}
    params = {role: tiny.params(model) for role, model in models.items()}
    with pytest.raises(ValueError, match=r"strong has \(96, 96\), weak has \(104, 104\) .*load both with vocab_size=n"):
        wmss.loss(models, LogitMix(), {"strong": params["strong"]}, {"weak": params["weak"]}, tiny.batch())


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_vocabularies_are_compared_token_by_token():
    same, more = chats.plain(), chats.with_template(chats.QWEN3)
    assert tokenizer.differences(same, chats.plain()) == ([], [])
    assert tokenizer.differences(same, more) == ([], []), "what only they have is never asked for"
    assert tokenizer.differences(more, same) == ([], [repr(token) for token in chats.ADDED])
    swapped = chats.plain()
    swapped.get_vocab = lambda: same.get_vocab() | {"1": same.get_vocab()["2"], "2": same.get_vocab()["1"]}
    one, two = same.get_vocab()["1"], same.get_vocab()["2"]
    assert tokenizer.differences(same, swapped)[0] == [f"'1' is {one}, there {two}", f"'2' is {two}, there {one}"]
    other = chats.plain()
    other.get_vocab = lambda: {"<Z>" if token == "1" else token: id_ for token, id_ in same.get_vocab().items()}
    assert tokenizer.differences(same, other) == ([f"{one} is '1', there '<Z>'"], [])


# -- recipes ----------------------------------------------------------------------------------------------------------

SHORT = (
    "pretrain=null", "controls={}", "eval={}", "sft={steps: 2}", "joint.steps=2", "train.checkpoint_every_steps=9",
    "curriculum.min_effective_share=0",
)  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(recipes.write(tmp_path))
    with recipes.one_device():
        yield tmp_path


def other(directory, made=None, rows=304, **size):
    """A model of another size and padding, with a tokenizer where one is given."""
    model = tiny.model(vocab_size=rows, **(size or SMALL))
    hf.save(model, tiny.params(model, 7), directory)
    if made is not None:
        made.save_pretrained(directory)
    return directory


def own_tokenizer(root):
    rows = map(json.loads, (root / "train.jsonl").read_text().splitlines())
    return tokenizer.train((f"{row['question']}{row['answer']}" for row in rows), 280, root / "tokenizer")


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize(
    "overrides",
    [
        ("joint.weak.placement=cached", "model.compute_dtype=bfloat16"),
        ("joint.weak.trainable=true",),
        ("lora={rank: 2}", "joint.weak.placement=cached", "model.compute_dtype=bfloat16"),
    ],
)
@pytest.mark.slow
def test_a_smaller_weak_agent_from_elsewhere(root, monkeypatch, overrides):
    other(root / "weak", own_tokenizer(root))
    jobs = []
    monkeypatch.setattr(train, "train", lambda job, real=train.train: jobs.append(job) or real(job))
    recipe = recipes.load(*SHORT, "joint.weak.path=weak", "model.tokenizer=tokenizer", *overrides)
    pipeline.run(recipe, say=lambda _: None)
    joint = jobs[-1]
    assert joint.models["weak"].sizes["D"] == 16 and joint.models["strong"].sizes["D"] == 32
    assert {model.vocabulary for model in joint.models.values()} == {(300, 300), (300, 304)}
    scored = [json.loads(path.read_text())["output"] for path in Path("run/stages").glob("score-*.json")]
    assert {Path(one["model"]).name for one in scored} == {"weak", "2"}, "M1's and the other agent's, not M0's"
    exported, _ = wmss.load("run/export")
    assert exported.sizes["D"] == 32 and exported.sizes["V"] == 300
    planned = programs.of(recipe, "joint", sharding.make_mesh(devices=jax.devices()[:1]))
    shapes = lambda tree: {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
    assert shapes(planned.arguments["frozen"]) == shapes(joint.frozen()), "what `wmss plan` counts is what is held"
    assert shapes(planned.arguments["parameters"]) == shapes(joint.trained())


@dataclasses.dataclass(frozen=True)
class Imitate:
    """Cross-entropy with the teacher's distribution."""

    roles = ("strong", "teacher")

    def __call__(self, logits, targets_N, ctx):
        p_NV = jax.nn.softmax(logits["teacher"])
        return -jnp.sum(jnp.where(p_NV > 0, p_NV * jax.nn.log_softmax(logits["strong"]), 0), axis=-1), {}


@pytest.mark.usefixtures("compiled_once")
def test_a_larger_teacher_from_a_checkpoint(root, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "imitate", Imitate)
    larger = tiny.model(vocab_size=300, hidden_size=48, num_layers=3)
    roles.save("teacher", {"strong": (larger, tiny.params(larger, 3))}, {})
    settings = (*SHORT, "joint.objective={name: imitate}", "joint.resample=false")
    with pytest.raises(ValueError, match=r"^joint.teacher: imitate learns from a teacher; name its"):
        pipeline.run(recipes.load(*settings), say=lambda _: None)
    said = []
    pipeline.run(recipes.load(*settings, "joint.teacher=teacher"), say=said.append)
    assert "joint.teacher: teacher has no tokenizer: of its vocabulary only the size is known to fit" in said
    losses = [json.loads(line).get("loss") for line in Path("run/joint/metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([loss for loss in losses if loss is not None]).all()


def test_other_vocabularies_are_refused_before_anything_is_trained(root):
    own_tokenizer(root)
    other(root / "few", rows=200)
    file = other(root / "foreign", tokenizer.load("tokenizer"), rows=400) / "tokenizer.json"
    vocab = (state := json.loads(file.read_text()))["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(state))
    for path, message in {
        "few": r"joint.weak.path: few has rows for 200 tokens, the recipe's tokenizer has 2\d\d; give another model",
        "foreign": r"joint.weak.path: foreign has another vocabulary: 2 tokens have other ids, e.g. 'a' is \d+, there",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            pipeline.run(
                recipes.load(*SHORT, f"joint.weak.path={path}", "model.tokenizer=tokenizer"), say=lambda _: None
            )
        assert "\n" not in str(error.value)
    assert not Path("run/init").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("joint.weak={path: w, source: {name: noise, std: 0.1}}",),
            "path: names the weak agent, and source noise would make it of another; give one",
        ),
        (("joint.weak.path=w", "rounds=2"), "joint.weak.path: is of one weak agent, and rounds > 1 have several"),
        (
            ("joint.weak={path: w, trainable: true}", "lora={rank: 2}"),
            "joint.weak.trainable: adapters are of one base, so with lora a weak agent from elsewhere stays frozen",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(root, overrides, message):
    with pytest.raises(ValueError, match=message):
        recipes.load(*overrides)


def test_an_adapter_from_elsewhere_is_merged(tmp_path):
    """As the weak agent of whole models."""
    base = tiny.model()
    hf.save(base, tiny.params(base, 0), tmp_path / "base")
    ref = agents.ModelRef(tmp_path / "base", None)
    adapted = tiny.model(lora=Lora(2, 4.0, "all"))
    adapter = jax.tree.map(lambda x: x + 0.1, adapted.init(jax.random.key(0)))
    roles.save(tmp_path / "c", {"strong": (adapted, adapter)}, {"base": ref.described()})
    weak = agents.ModelRef(tmp_path / "c", "strong")
    found = agents.whole({"strong": ref, "weak": weak}, ("strong",), None, "float32", frozenset())
    assert found.models["weak"] == found.models["strong"]
    merged = adapted.merge(tiny.params(base, 0), adapter)
    jax.tree.map(np.testing.assert_array_equal, found.frozen()["weak"], merged)
