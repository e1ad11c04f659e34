"""A cached weak agent is the resident one: its hidden states, its losses, and what a user may get wrong with it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import recipes
import tiny

import wmss_jax as wmss
from wmss_jax import data, epochs, pipeline, roles, scoring, train, weak_cache
from wmss_jax.objectives import LogitMix

MODEL = tiny.model(vocab_size=300)
BF16 = dataclasses.replace(MODEL, compute_dtype="bfloat16")


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Forty random examples of 3 to 24 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 25, 40)
    offsets = np.cumsum([0, *lengths])
    tokens = rng.integers(0, 300, offsets[-1]).astype(np.int32)
    report = data.Report(40, int(offsets[-1]), 0, 0, 0, 24)
    return data.Dataset(
        tokens, rng.random(offsets[-1]) < 0.7, offsets, np.zeros((40, 2), int), ("x:",), "fp", "tok", report
    )


def made(dataset, directory, seq_len, batch_size, model=BF16):
    """The weak agent's cache, by the pass that scores."""
    identity = {"model": "weak"}
    with weak_cache.Writer(directory, dataset, 32, identity) as writer:
        scoring.score(model, tiny.params(MODEL, 1), dataset, seq_len=seq_len, batch_size=batch_size, keep=writer.add)
    return weak_cache.WeakCache.open(directory, dataset, identity)


def both(dataset, cache, seq_len, batch_size, model=BF16):
    """(cached and computed hidden states of all real tokens as integers, the two losses and gradients) of a step."""
    plan = epochs.plan(dataset.lengths, seq_len=seq_len, batch_size=batch_size, seed=0, epochs=1)
    batch = data.batch(dataset, plan, 0, weak_hidden=cache.read)
    strong, weak = tiny.params(MODEL, 0), tiny.params(MODEL, 1)
    resident = {name: value for name, value in batch.items() if name != "weak_hidden"}
    hidden = jax.jit(model.hidden)(weak, batch["tokens"], batch["positions"], batch["segments"])
    hidden = hidden.astype(jnp.bfloat16)
    bits = [np.asarray(h)[batch["segments"] > 0].view(np.int16).astype(int) for h in (batch["weak_hidden"], hidden)]
    value = jax.jit(
        jax.value_and_grad(lambda p, frozen, batch: wmss.loss(model, LogitMix(), {"strong": p}, frozen, batch)[0])
    )
    head_alone = {"unembed": weak["unembed"]}
    return bits, value(strong, {"weak": head_alone}, batch), value(strong, {"weak": weak}, resident)


def test_in_the_same_rows_cached_is_resident_bit_for_bit(dataset, tmp_path):
    (cached, computed), with_cache, without = both(dataset, made(dataset, tmp_path / "c", 32, 8), 32, 8)
    np.testing.assert_array_equal(cached, computed)
    jax.tree.map(np.testing.assert_array_equal, with_cache, without)


def test_in_other_rows_it_is_the_same_up_to_the_last_place(dataset, tmp_path):
    """Of float32 layers, whose sums depend on the rows in the seventh digit only, whatever the CPU can do."""
    (cached, computed), with_cache, without = both(dataset, made(dataset, tmp_path / "c", 24, 3, MODEL), 64, 4, MODEL)
    assert np.mean(cached == computed) >= 0.999
    assert np.abs(cached - computed).max() <= 1, "within one unit in the last place"
    np.testing.assert_allclose(with_cache[0], without[0], rtol=1e-5)


def test_in_other_rows_bfloat16_layers_differ_by_less_than_they_are_wrong(dataset, tmp_path):
    """A sum that rounds the other way changes all that follows it: on CPUs that multiply bfloat16 as such, in one value
    of twenty; on those that widen it first, in one of a thousand."""
    cache = made(dataset, tmp_path / "c", 24, 3)
    (cached, computed), with_cache, without = both(dataset, cache, 64, 4)
    (_, exact), *_ = both(dataset, cache, 64, 4, MODEL)
    value = lambda bits: bits.astype(np.int16).view(ml_dtypes.bfloat16).astype(float)
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    assert np.mean(cached == computed) >= 0.9
    assert rms(value(cached) - value(computed)) <= rms(value(computed) - value(exact)) / 3
    np.testing.assert_allclose(with_cache[0], without[0], rtol=1e-4)


def test_rows_have_hidden_states_where_they_have_tokens(dataset):
    """Every token gets the vector of its own example and place, also in rows that are empty."""
    hidden = [np.full((n, 2), [i, 0], ml_dtypes.bfloat16) + np.arange(n)[:, None] * np.array([0, 1]) for i, n in
              enumerate(dataset.lengths)]  # fmt: skip
    hidden = [h.astype(ml_dtypes.bfloat16) for h in hidden]
    plan = epochs.plan(dataset.lengths, seq_len=64, batch_size=16, seed=0, epochs=1)
    for step in range(plan.total_steps):
        batch = data.batch(dataset, plan, step, weak_hidden=lambda indices: [hidden[i] for i in indices])
        real = batch["segments"] > 0
        found = batch["weak_hidden"].astype(int)
        np.testing.assert_array_equal(found[real][:, 0], batch["example_index"][real])
        np.testing.assert_array_equal(found[real][:, 1], batch["positions"][real])
        assert not found[~real].any() and batch["weak_hidden"].dtype == ml_dtypes.bfloat16
        assert batch["weak_hidden"].shape == (16, 64, 2)


@pytest.mark.parametrize("options", [{"micro_batches": 4}, {"mesh": (2, 4, 1)}, {"mesh": (1, 4, 2)}])
def test_micro_batches_and_devices_do_not_matter(options):
    batch = tiny.batch()
    batch["weak_hidden"] = np.random.default_rng(0).normal(0, 1, (8, 24, 32)).astype(ml_dtypes.bfloat16)
    model, tx = tiny.model(), optax.sgd(0.1)
    mesh = wmss.make_mesh(*options.pop("mesh")) if "mesh" in options else None

    def train(mesh, **options):
        place = (lambda s: tiny.params(model, s)) if mesh is None else (lambda s: tiny.sharded(model, s, mesh))
        step = wmss.make_train_step(model, LogitMix(), tx, mesh=mesh, donate=False, **options)
        frozen = {"weak": {"unembed": place(1)["unembed"]}}
        return step(wmss.init_state({"strong": place(0)}, tx), frozen, batch)

    (state, metrics), (other, other_metrics) = train(None), train(mesh, **options)
    np.testing.assert_allclose(other_metrics["loss"], metrics["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other.params, state.params)


def test_the_weak_body_is_neither_loaded_nor_run():
    model, tx = tiny.model(tied=True), optax.sgd(0.1)
    step = wmss.make_train_step(model, LogitMix(), tx, donate=False)
    batch = tiny.batch()
    batch["weak_hidden"] = np.zeros((8, 24, 32), ml_dtypes.bfloat16)
    state, head = wmss.init_state({"strong": tiny.params(model, 0)}, tx), {"embed": tiny.params(model, 1)["embed"]}
    with_cache = step.lower(state, {"weak": head}, batch).compile()
    state_sft = wmss.make_train_step(model, wmss.objectives.Sft(), tx, donate=False).lower(state, {}, tiny.batch())
    products = lambda compiled: compiled.as_text().count(" dot(") + compiled.as_text().count("__onednn$matmul")
    assert products(with_cache) == products(state_sft.compile()) + 1, "the weak agent costs one product: its head"


# -- a recipe ---------------------------------------------------------------------------------------------------------

CACHED = ("joint.weak.placement=cached", "model.compute_dtype=bfloat16")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A recipe with a cached weak agent, carried out up to M1."""
    root = recipes.write(tmp_path_factory.mktemp("cached"))
    with pytest.MonkeyPatch.context() as patch, recipes.one_device():
        patch.chdir(root)
        pipeline.run(recipes.load(*CACHED), until="sft", say=lambda _: None)
    return root


@pytest.fixture
def root(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(recipes.copy(begun, tmp_path / "copy"))
    with recipes.one_device():
        yield tmp_path / "copy"


def m0(root):
    return str(root / f"run/pretrain/checkpoints/{recipes.STEPS['pretrain']}")


def losses(root, stage="joint", run="run"):
    lines = map(json.loads, (root / run / stage / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_a_recipe_with_a_cached_weak_agent_trains_as_with_a_resident_one(root, monkeypatch):
    shutil.copytree("run", "resident")
    said = []
    loaded, load = [], roles.load

    def spy(*arguments, head_only=False, **options):
        loaded.append(head_only)
        return load(*arguments, head_only=head_only, **options)

    monkeypatch.setattr(roles, "load", spy)
    pipeline.run(recipes.load(*CACHED, "train.checkpoint_every_steps=3"), until="joint", say=said.append)
    assert any("on disk" in line and "training step reads" in line for line in said), "the price is said"
    assert loaded.count(True) == 1, "of the weak agent, the joint stage reads the head"
    pipeline.run(recipes.load(CACHED[1], "work_dir=resident"), until="joint", say=lambda _: None)
    ours, theirs = losses(root), losses(root, run="resident")
    assert len(ours) == recipes.STEPS["joint"]
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def test_a_cache_made_by_the_command_serves_a_run(root, capsys):
    base = m0(root)
    pipeline.score_model(recipes.load(*CACHED), base, root / "m0.parquet", root / "m0-hidden", say=lambda _: None)
    given = recipes.load(*CACHED, f"joint.weak.cache={root / 'm0-hidden'}")
    pipeline.run(given, until="joint", say=lambda _: None)
    assert len(losses(root)) == recipes.STEPS["joint"]
    assert not (root / "run/weak_cache").exists()


def make(root):
    base = m0(root)
    pipeline.score_model(recipes.load(*CACHED), base, root / "m0.parquet", root / "hidden", say=lambda _: None)
    return recipes.load(*CACHED, f"joint.weak.cache={root / 'hidden'}")


def run(recipe):
    pipeline.run(recipe, until="joint", say=lambda _: None)


def test_a_cache_of_another_model_is_refused_by_name(root):
    m1 = str(root / f"run/sft/checkpoints/{recipes.STEPS['sft']}")
    pipeline.score_model(recipes.load(*CACHED), m1, root / "m1.parquet", root / "m1-hidden", say=lambda _: None)
    with pytest.raises(ValueError, match="m1-hidden: made for another model"):
        run(recipes.load(*CACHED, f"joint.weak.cache={root / 'm1-hidden'}"))


def test_a_flipped_bit_stops_the_run_by_name_and_a_new_cache_finishes_it(root):
    recipe = make(root)
    shard = max((path for path in (root / "hidden").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(weak_cache.CacheDamaged, match="hidden: damaged"):
        run(recipe)
    shutil.rmtree(root / "hidden")
    (root / "m0.parquet").unlink()
    run(make(root))
    assert len(losses(root)) == recipes.STEPS["joint"]


def test_what_is_refused_is_refused_before_the_sft(root, monkeypatch):
    monkeypatch.setattr(train, "train", lambda job: pytest.fail("it trains"))
    shutil.rmtree("run/sft")
    (root / "run/stages/sft.json").unlink()
    with pytest.raises(weak_cache.CacheDamaged, match="nowhere"):
        run(recipes.load(*CACHED, "joint.weak.cache=nowhere"))
    with pytest.raises(ValueError, match="cache_budget_gb"):
        run(recipes.load(*CACHED, "joint.weak.cache_budget_gb=1e-6"))


def test_a_truncated_cache_is_refused_at_the_start(root):
    recipe = make(root)
    shard = max((path for path in (root / "hidden").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(weak_cache.CacheDamaged, match=r"hidden: .* bytes instead of"):
        run(recipe)


def test_a_budget_that_is_too_small_is_refused_before_anything_is_written(root):
    with pytest.raises(ValueError, match=r"need .*KB.*cache_budget_gb"):
        run(recipes.load(*CACHED, "joint.weak.cache_budget_gb=1e-6"))
    assert not list((root / "run").glob("weak_cache*/*"))
    run(recipes.load(*CACHED))
    assert len(losses(root)) == recipes.STEPS["joint"], "mended in the same work_dir"


def test_a_cache_that_was_removed_is_made_again(root):
    run(recipes.load(*CACHED))
    first = losses(root)
    shutil.rmtree(root / "run/weak_cache")
    run(recipes.load(*CACHED))
    assert not (root / "run/weak_cache").exists(), "a finished stage needs none"
    shutil.rmtree(root / "run/joint")
    (root / "run/stages/joint.json").unlink()
    run(recipes.load(*CACHED))
    assert losses(root) == first


def test_wmss_score_caches_hidden_states(root, monkeypatch, capsys):
    from wmss_jax import cli

    base = m0(root)
    monkeypatch.setattr("sys.argv", ["wmss", "score", base, "recipe.yaml", "s.parquet", *CACHED, "--cache-hidden", "h"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code in (0, None)
    assert "unique tokens" in capsys.readouterr().out
    assert (root / "h/meta.json").exists() and (root / "s.parquet").exists()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("joint.weak.placement=cached", "joint.weak.trainable=true"), ["cached", "trainable"]),
        (("joint.weak.cache=somewhere",), ["cache", "placement"]),
        ((*CACHED, "joint.weak.cache=somewhere", "rounds=2"), ["joint.weak.cache", "rounds"]),
        ((*CACHED, "joint.weak.cache_budget_gb=0"), ["cache_budget_gb"]),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, monkeypatch, overrides, words):
    monkeypatch.chdir(recipes.write(tmp_path))
    with pytest.raises(ValueError) as caught:
        recipes.load(*overrides)
    assert all(word in str(caught.value) for word in words)
