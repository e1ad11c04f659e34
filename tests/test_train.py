"""One training stage: bitwise resume, what it ends with, and when it stops. Run: pytest tests/test_train.py"""

import dataclasses
import json
import os
import signal
import time
import warnings
from typing import ClassVar

import jax
import jax.numpy as jnp
import kills
import numpy as np
import optax
import pytest
import recipes
import tiny

from wmss_jax import (
    checkpoint,
    convert,
    epochs,
    flops,
    hf,
    objectives,
    optim,
    preemption,
    roles,
    runs,
    stages,
    storage,
    tokenizer,
    train,
    train_state,
    training_config,
)

TOTAL = 6
ADAM = training_config.OptimizerConfig(peak_lr=3e-3, warmup_fraction=0.4, schedule="cosine", weight_decay=0.1)
EMA = ADAM.model_copy(update={"ema_decay": 0.6})


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The tiny recipe's examples, tokenizer and architecture."""
    root = recipes.write(tmp_path_factory.mktemp("train"))
    recipe = recipes.load_in(root, f"work_dir={root}/run", f"data={root}", f"model.config={root}/config.json")
    with recipes.one_device():
        return runs.prepare(recipe, say=lambda _: None)


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """Jobs trained without interruption, once each: name -> (job, the checkpoint it returned)."""
    done = {}

    def trained(name):
        if name not in done:
            job = JOBS[name](run, tmp_path_factory.mktemp(name))
            done[name] = job, train.train(job)
        return done[name]

    return trained


def make_job(run, directory, **changes):
    model = hf.from_config(recipes.CONFIG, compute_dtype="float32")
    d = run.recipe.dataset
    given = {
        "directory": directory,
        "models": {"strong": model, "weak": model},
        "trained_roles": ("strong",),
        "param_dtype": "float32",
        "objective": objectives.Sft(),
        "optimizer": ADAM,
        "dataset": run.dataset,
        "plan": epochs.plan(run.dataset.lengths, seq_len=d.seq_len, batch_size=d.batch_size, seed=1, steps=TOTAL),
        "loss_on": "completion",
        "loop": run.recipe.train,
        "seed": 0,
        "mesh": None,
        "meta": {"stage": "test"},
        "assets": run.work / "assets",
    } | changes  # fmt: skip
    roles = {"strong": tiny.params(model, 0), "weak": tiny.params(model, 1)}
    trained = given["trained_roles"]
    given["trained"] = lambda: {role: roles[role] for role in trained}
    given["frozen"] = lambda: {role: roles[role] for role in given["objective"].roles if role not in trained}
    return train.Job(**given)


def plain(run, directory):
    loop = run.recipe.train.model_copy(update={"checkpoint_every_steps": 1, "keep_last": 99})
    return make_job(run, directory, loop=loop)


def ema(run, directory):
    return make_job(run, directory, optimizer=EMA)


def joint(run, directory):
    """Both roles trained, their average kept, in micro-batches, the held-out loss measured at odd moments."""
    loop = run.recipe.train.model_copy(update={"micro_batches": 2, "checkpoint_every_steps": 4})
    return make_job(
        run, directory, objective=objectives.LogitMix(objectives.Linear(0.7, 0.4, TOTAL)), optimizer=EMA, loop=loop,
        trained_roles=("strong", "weak"), held_out=held_out(run, every_steps=3),
    )  # fmt: skip


def best(run, directory):
    """A rate so high that the held-out loss does not fall to the end."""
    rate = training_config.OptimizerConfig(peak_lr=0.03, schedule="constant")
    plan = epochs.plan(run.dataset.lengths[:8], seq_len=32, batch_size=4, seed=1, steps=10)
    loop = run.recipe.train.model_copy(update={"checkpoint_every_steps": 4})
    return make_job(
        run, directory, optimizer=rate, plan=plan, held_out=held_out(run, every_steps=2, keep_best=True), loop=loop
    )


JOBS = {"plain": plain, "ema": ema, "joint": joint, "best": best}


def held_out(run, **settings):
    rows = epochs.plan(run.held_out.lengths, seq_len=32, batch_size=4, seed=0, epochs=1)
    return train.HeldOut(run.held_out, rows, **settings)


def state_of(job, directory):
    tx, _ = optim.make(job.optimizer, job.plan.total_steps)
    params = {role: job.models[role].abstract() for role in job.trained_roles}
    return checkpoint.restore(directory, train_state.abstract_state(params, tx))


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, wanted)


TIMES = {"time", "tokens_per_s", "step_time_s", "loader_wait_s", "model_tflops_per_s", "mfu"}


def lines(job):
    return [json.loads(line) for line in (job.directory / "metrics.jsonl").read_text().splitlines()]


def metrics(job):
    """(step, its metrics) of every line, without those that depend on the time."""
    return [(line.pop("step"), {k: v for k, v in line.items() if k not in TIMES}) for line in lines(job)]


def steps_of(job):
    return checkpoint.steps(job.directory / "checkpoints")


def at_step(monkeypatch, number, act):
    """Have `act` called in the middle of a step."""
    report = train._Reporter.__call__

    def call(self, current, *arguments):
        if current == number:
            act()
        return report(self, current, *arguments)

    monkeypatch.setattr(train._Reporter, "__call__", call)


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, stop_at", [("plain", 3), ("joint", 3), ("best", 5)])
def test_stopping_and_going_on_is_bitwise_the_same(undisturbed, run, tmp_path, monkeypatch, name, stop_at):
    whole, expected = undisturbed(name)
    job = JOBS[name](run, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        at_step(patch, stop_at, sigterm)
        with pytest.raises(preemption.Preempted) as stopped:
            train.train(job)
    assert stopped.value.code == 75 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert stopped.value.message.startswith(f"saved step {stop_at} of {job.plan.total_steps}")
    assert max(steps_of(job)) == stop_at
    last = train.train(job)
    assert last.name == expected.name
    final = str(job.plan.total_steps)
    for number in {final, last.name}:
        directory = job.directory / "checkpoints" / number
        assert_same(state_of(job, directory), state_of(whole, whole.directory / "checkpoints" / number))
    assert metrics(job) == metrics(whole)
    told = [(number, *values) for number, values in metrics(job)]
    assert len(told) == len(set(told))


def test_in_a_bucket_stopping_and_going_on_is_bitwise_the_same(gcs, undisturbed, run, tmp_path, monkeypatch):
    """Where the newest is damaged from an older one when asked; and what others read there is the same."""
    whole, expected = undisturbed("joint")
    job = joint(run, tmp_path / "stage")
    job = dataclasses.replace(job, loop=job.loop.model_copy(update={"checkpoint_bucket": "gs://bucket/elsewhere"}))
    root = storage.path("gs://bucket/elsewhere/stage/checkpoints")

    def stop_at(number):
        with monkeypatch.context() as patch, pytest.raises(preemption.Preempted):
            at_step(patch, number, sigterm)
            train.train(job)

    stop_at(2), stop_at(3)
    assert checkpoint.steps(root) == [2, 3] and not (tmp_path / "stage/checkpoints").exists()
    gcs.write("elsewhere/stage/checkpoints/3/state/_METADATA", b"{}")
    expected_error = r"gs://.*/3: state/_METADATA: .*/2 is intact; train.resume_from=newest_intact"
    with pytest.raises(checkpoint.CheckpointDamaged, match=expected_error):
        train.train(job)
    asked = dataclasses.replace(job, loop=job.loop.model_copy(update={"resume_from": "newest_intact"}))
    last = train.train(asked)
    assert str(last) == f"{root}/{expected.name}"
    assert_same(state_of(job, last), state_of(whole, expected))
    convert.export(str(last), tmp_path / "exported")
    convert.export(str(expected), tmp_path / "expected")
    for file in (tmp_path / "expected").glob("*[!d]"):  # the card has the checkpoint's digest
        assert (tmp_path / "exported" / file.name).read_bytes() == file.read_bytes()
    mine, theirs = (stages.ModelRef.named(str(where)) for where in (last, expected))
    assert mine.role == "strong" and mine.model == theirs.model and tokenizer.load(mine.assets)
    with pytest.raises(FileNotFoundError, match="gs://bucket/elsewhere: no checkpoint"):
        stages.ModelRef.named("gs://bucket/elsewhere")


def test_a_finished_stage_is_not_trained_again(undisturbed, monkeypatch):
    job, expected = undisturbed("plain")
    before = recipes.files(job.directory)
    monkeypatch.setattr(train.step, "make_train_step", None)
    assert train.train(dataclasses.replace(job, frozen=None)) == expected == job.directory / f"checkpoints/{TOTAL}"
    assert recipes.files(job.directory) == before


def test_sigterm_at_the_last_step_stops_the_run_all_the_same(run, tmp_path, monkeypatch):
    job = make_job(run, tmp_path / "last", optimizer=EMA)
    with monkeypatch.context() as patch:
        at_step(patch, TOTAL, sigterm)
        with pytest.raises(preemption.Preempted) as stopped:
            train.train(job)
    assert stopped.value.message.startswith(f"saved step {TOTAL} of {TOTAL}")
    assert train.train(job).name == str(TOTAL)


def test_a_damaged_checkpoint_is_gone_on_from_only_by_an_older_one_and_only_when_asked(
    undisturbed, run, tmp_path, monkeypatch
):
    whole, path = undisturbed("plain")
    job = plain(run, recipes.copy(whole.directory, tmp_path / "damaged"))
    last = job.directory / f"checkpoints/{TOTAL}"
    recipes.flip_a_bit(last)
    expected = rf"checkpoints/{TOTAL}: state/.*crc32c.*checkpoints/{TOTAL - 1} is intact; train.resume_from=newest_inta"
    with monkeypatch.context() as patch, pytest.raises(checkpoint.CheckpointDamaged, match=expected):
        patch.setattr(train.step, "make_train_step", None)
        train.train(job)
    asked = job.loop.model_copy(update={"resume_from": "newest_intact", "keep_last": 1, "keep_every_steps": 2})
    assert train.train(dataclasses.replace(job, loop=asked)) == last
    assert checkpoint.steps(last.parent) == [2, 4, TOTAL]
    checkpoint.verify(last)
    kills.assert_same_state(last, path)


# -- what a stage ends with -------------------------------------------------------------------------------------------


def test_held_out_loss_is_the_mean_over_all_completion_tokens(undisturbed, run):
    """Directly: whole logits of every example alone in its row."""
    job, _ = undisturbed("joint")
    model, measured = job.models["strong"], {n: v["held_out_loss"] for n, v in metrics(job) if "held_out_loss" in v}
    assert list(measured) == [3, TOTAL]
    _, params = roles.load(job.directory / f"checkpoints/{TOTAL}", "strong")
    assert measured[TOTAL] == pytest.approx(direct_loss(model, params, run.held_out), rel=1e-5)


def direct_loss(model, params, dataset):
    tokens = np.zeros((len(dataset), 32), np.int32)
    trained = np.zeros((len(dataset), 32), bool)
    for row in range(len(dataset)):
        tokens[row, : len(dataset.tokens(row))] = dataset.tokens(row)
        trained[row, : len(dataset.mask(row))] = dataset.mask(row)
    log_probs = jax.nn.log_softmax(model.logits(params, jnp.asarray(tokens)))[:, :-1]
    nll = -np.take_along_axis(np.asarray(log_probs), tokens[:, 1:, None], axis=2)[..., 0]
    return nll[trained[:, 1:]].mean()


def test_keep_best_returns_the_checkpoint_with_the_lowest_held_out_loss(undisturbed, run):
    job, result = undisturbed("best")
    measured = {n: v["held_out_loss"] for n, v in metrics(job) if "held_out_loss" in v}
    assert list(measured) == list(range(2, 11, 2))
    lowest = min(measured, key=measured.get)
    assert lowest < 10, "the rate is too low for this test"
    assert result.name == str(lowest) and steps_of(job) == [lowest, 8, 10]
    _, params = roles.load(result, "strong")
    assert measured[lowest] == pytest.approx(direct_loss(job.models["strong"], params, run.held_out), rel=1e-5)


def test_ema_ships_the_average_of_the_parameters(undisturbed):
    job, result = undisturbed("ema")
    whole, _ = undisturbed("plain")  # the same steps: an average changes none
    model, _ = roles.load(result, "strong")
    mean = jax.tree.map(np.asarray, tiny.params(model, 0))
    for number in range(1, TOTAL + 1):
        _, params = roles.load(whole.directory / f"checkpoints/{number}", "strong")
        mean = jax.tree.map(lambda m, p: 0.6 * m + 0.4 * np.asarray(p), mean, params)
    shipped = roles.load(result, "strong")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), shipped, mean)
    assert_same(shipped, optax.tree.get(state_of(job, result).opt_state, "average")["strong"])
    middle = state_of(job, job.directory / "checkpoints/4")  # from which training goes on: no average
    assert_same(middle.params, state_of(whole, whole.directory / "checkpoints/4").params)


# -- a loss that is not finite ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spoiled:
    """SFT whose loss, or whose gradient alone, is NaN in one step, counted from 0."""

    at: int
    gradient_only: bool
    roles: ClassVar[tuple[str, ...]] = ("strong",)

    def __call__(self, logits, targets_N, ctx):
        losses_N, metrics = objectives.Sft()(logits, targets_N, ctx)
        zero_N = 0.0 * jnp.sum(logits["strong"], axis=-1)
        if self.gradient_only:  # √ has an infinite slope at 0
            return losses_N + jnp.sqrt(jnp.where(ctx.step == self.at, zero_N, 1.0)), metrics
        return losses_N + jnp.where(ctx.step == self.at, jnp.nan, 0.0), metrics


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_loss_that_is_not_finite_names_step_and_examples(run, tmp_path, gradient_only):
    job = make_job(run, tmp_path / "nan", objective=Spoiled(3, gradient_only))
    expected = {run.dataset.location(index) for row in job.plan.rows_of(3) for index in row}
    with pytest.raises(train.NonFiniteLoss, match=r"the loss of step 4 is .*gradient norm.*its examples: ") as caught:
        train.train(job)
    named = str(caught.value).partition("its examples: ")[2].split(", ")
    assert len(named) > 4 and set(named) == expected
    assert all("train.jsonl:" in place and place.rpartition(":")[2].isdecimal() for place in named)
    assert steps_of(job) == [2]  # not 4, which would be due
    checkpoint.verify(job.directory / "checkpoints/2")
    assert max(number for number, _ in metrics(job)) == 3


def test_a_held_out_loss_that_is_not_finite_stops_too(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_held_out_loss", lambda *_: lambda params: float("nan"))
    job = make_job(
        run, tmp_path / "nan", held_out=held_out(run, every_steps=2, keep_best=True), objective=Spoiled(9, False)
    )
    with pytest.raises(train.NonFiniteLoss, match="held-out loss after step 2 is nan"):
        train.train(job)
    assert steps_of(job) == []


# -- how fast it was, and where the time went -------------------------------------------------------------------------


def test_speed_is_model_flops_of_real_tokens(undisturbed, run, tmp_path, monkeypatch):
    """Of a stage with a frozen weak agent, every second step logged, on a device with a known peak."""
    assert "mfu" not in lines(undisturbed("plain")[0])[0]  # a CPU's peak is not known
    monkeypatch.setattr(train.hardware, "peak_flops", lambda device: 1e12)
    loop = run.recipe.train.model_copy(update={"log_every_steps": 2})
    job = make_job(run, tmp_path / "speed", objective=objectives.LogitMix(0.5), loop=loop)
    train.train(job)
    forward = flops.forward(job.models["strong"], seq_len=32)
    per_token = flops.step([(forward, "trained"), (forward, "resident")])
    tokens = {
        n: sum(job.dataset.lengths[list(row)].sum() for row in job.plan.rows_of(n - 1)) for n in range(1, TOTAL + 1)
    }
    told = {line["step"]: line for line in lines(job)}
    assert list(told) == [1, 2, 4, 6]
    for number, before in [(1, 0), (2, 1), (4, 2), (6, 4)]:
        line, steps = told[number], number - before
        seen = sum(tokens[n] for n in range(before + 1, number + 1))
        assert line["tokens_per_s"] == pytest.approx(seen / (steps * line["step_time_s"]))
        assert line["model_tflops_per_s"] == pytest.approx(line["tokens_per_s"] * per_token / 1e12)
        assert line["mfu"] == pytest.approx(line["model_tflops_per_s"])
        assert line["loader_wait_s"] > 0


def test_step_time_has_the_waiting_for_batches_in_it_but_no_evaluation_and_no_checkpoint(run, tmp_path, monkeypatch):
    batches, save = train.data.batches, train.checkpoint.Writer.save

    def slow_batches(*arguments, **settings):
        for batch in batches(*arguments, **settings):
            time.sleep(0.3)
            yield batch

    def slow_save(*arguments):
        time.sleep(1)
        save(*arguments)

    monkeypatch.setattr(train, "_held_out_loss", lambda *_: lambda params: time.sleep(1) or 1.0)
    monkeypatch.setattr(train.data, "batches", slow_batches)
    monkeypatch.setattr(train.checkpoint.Writer, "save", slow_save)
    job = make_job(run, tmp_path / "slow", held_out=held_out(run, every_steps=2))
    train.train(job)
    told = [line for line in lines(job) if "step_time_s" in line][1:]  # the first compiles
    assert [line["step"] for line in told] == [2, 3, 4, 5, 6]
    assert all(0.3 <= line["loader_wait_s"] <= line["step_time_s"] < 1 for line in told)


def test_profile_traces_steps_and_changes_none(undisturbed, run, tmp_path):
    whole, _ = undisturbed("plain")
    loop = whole.loop.model_copy(update={"profile": 2})
    job = make_job(run, tmp_path / "traced", loop=loop)
    train.train(job)
    assert metrics(job) == metrics(whole)
    (file,) = (job.directory / "profile").rglob("*.xplane.pb")
    assert traced(file) == [3, 4]


def test_profile_is_written_where_the_loop_ends_early(run, tmp_path):
    loop = run.recipe.train.model_copy(update={"profile": 99})
    job = make_job(run, tmp_path / "nan", objective=Spoiled(3, False), loop=loop)
    with pytest.raises(train.NonFiniteLoss):
        train.train(job)
    (file,) = (job.directory / "profile").rglob("*.xplane.pb")
    assert traced(file) == [3, 4]


def traced(file):
    """The steps in a trace."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of its reader's own types
        trace = jax.profiler.ProfileData.from_file(str(file))
        events = (event for plane in trace.planes for line in plane.lines for event in line.events)
        return sorted(dict(event.stats)["step_num"] for event in events if event.name == "train")
