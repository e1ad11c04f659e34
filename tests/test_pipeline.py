"""A recipe carried out, killed, gone on with, changed. Run: pytest tests/test_pipeline.py"""

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path

import jax
import kills
import numpy as np
import pytest
import recipes
import tiny

import wmss_jax as wmss
from wmss_jax import (
    checkpoint,
    cli,
    export,
    generate,
    objectives,
    pipeline,
    preemption,
    roles,
    runs,
    scoring,
    selection,
    tokenizer,
    train,
)
from wmss_jax.evals import tasks
from wmss_jax.stages import ModelRef


@pytest.fixture(scope="module", autouse=True)
def _alone_and_compiled_once(tmp_path_factory):
    with recipes.one_device(), recipes.compiled_once(tmp_path_factory):
        yield


@pytest.fixture
def finished(tmp_path, tmp_path_factory, monkeypatch):
    """A copy of the finished run, the current directory."""
    root = recipes.copy(recipes.finished(tmp_path_factory), tmp_path / "copy")
    monkeypatch.chdir(root)
    return root


def run(*overrides, until=None):
    return pipeline.run(recipes.load(*overrides), until, say=lambda _: None)


def record(name):
    return json.loads(Path(f"run/stages/{name}.json").read_text())


def forget(*names):
    """Remove stages with all they made."""
    for name in names:
        for file in Path("run/stages").glob(f"{name}.json"):
            file.unlink()
            shutil.rmtree(Path("run") / file.stem, ignore_errors=True)


def refuse(monkeypatch, *functions):
    """Fail the test if any of (module, name) is called."""
    for module, name in functions:
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


def test_what_saw_no_chat_is_not_asked_in_one(finished):
    """Neither `wmss generate` nor transformers then puts prompts into a template that was never trained on."""
    assert tokenizer.load("run/export").chat_template is None
    rows = [{"messages": [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]}]
    recipes.rows(Path("chats.jsonl"), rows)
    pairs, with_chats = recipes.load(), recipes.load("dataset.train=[train.jsonl, {path: chats.jsonl}]")
    assert not runs._in_chats(pairs) and runs._in_chats(with_chats)


# -- killed, stopped, gone on with ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_four_times_and_stopped_once_a_run_ends_bitwise_as_an_undisturbed_one(tmp_path, tmp_path_factory):
    """In a save, in a change of stages, before a checkpoint has its name, amid an export; test_chaos.py has more."""
    undisturbed = recipes.finished(tmp_path_factory)
    environment = recipes.environment(recipes.shared(tmp_path_factory))
    root = recipes.write(tmp_path)
    before = [kills.Event(moment) for moment in ("pretrain save 2", "sft done", "joint digest 4")]
    sigterm = kills.Event("joint step 5", number=signal.SIGTERM)
    with kills.forks(root, environment) as forks:
        for event in [*before, sigterm, kills.Event("export")]:
            _, code, _, said = forks.run(event)
            if event != sigterm:
                assert code == -signal.SIGKILL, f"not killed at {event}:\n{said}"
            else:
                assert code == 75 and checkpoint.latest(root / "run/joint/checkpoints") == 5
                (line,) = [text for text in said.splitlines() if text.startswith("wmss")]
                assert line == "wmss: saved step 5 of 6 in run/joint; the same command goes on from there"
                assert "Traceback" not in said
            if event.moment == "pretrain save 2":
                assert not checkpoint.steps(root / "run/pretrain/checkpoints")
            if event.moment == "joint digest 4":
                assert {path.name for path in (root / "run/joint/checkpoints").iterdir()} == {"2", "4.partial-new"}
        last = forks.run()
    assert last.code == 0, last.said
    kills.assert_same_run(root / "run", undisturbed / "run")
    assert not list((root / "run").rglob("*.partial*"))


@pytest.mark.parametrize("moment", ["scoring", "export"])
def test_sigterm_outside_of_training_exits_75_too(finished, monkeypatch, moment):
    forget("joint", "sft_continued", "export", "score-*", "curriculum-*") if moment == "scoring" else forget("export")
    stop = lambda *_, **__: signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(*{"scoring": (scoring, "score"), "export": (export.hf, "save")}[moment], stop)
    with pytest.raises(preemption.Preempted) as stopped:
        run()
    assert stopped.value.code == 75 and "the same command goes on" in stopped.value.message
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_a_kill_left_under_this_process_id_is_no_obstacle(finished, monkeypatch):
    """In a container every process may have the same id."""
    forget("export")
    (finished / f"run/export.partial-{pipeline.export.hf.os.getpid()}").mkdir()
    refuse(monkeypatch, (train, "train"), (scoring, "score"), (tasks, "evaluate"))
    run()
    assert Path("run/export/config.json").exists() and not list(Path("run").glob("export.partial-*"))


# -- finished stages --------------------------------------------------------------------------------------------------


def test_a_finished_run_does_nothing(finished, monkeypatch):
    before = recipes.files(finished / "run")
    expected = json.loads(Path("run/summary.json").read_text())
    refuse(monkeypatch, (train, "train"), (scoring, "score"), (tasks, "evaluate"), (export.hf, "save"))
    assert run() == expected
    before.pop("summary.json")
    after = recipes.files(finished / "run")
    assert {name: after[name] for name in before} == before


CHANGES = {
    "seed=7": "init.json: .*seed was 42, is 7",
    "model.tokenizer.vocab_size=270": r"assets.json: .*tokenizer.vocab_size was 280, is 270",
    "model.param_dtype=bfloat16": "init.json: .*dtype was 'float32', is 'bfloat16'",
    "pretrain.steps=5": "pretrain.json: .*stage.steps was 4, is 5",
    "dataset.seq_len=40": r"pretrain.json: .*batch was \[4, 32, 1\], is \[4, 40, 1\]",
    "optimizer.peak_lr=0.1": "pretrain.json: .*optimizer.peak_lr was 0.003, is 0.1",
    "sft.loss_on=all": "sft.json: .*loss_on was 'completion', is 'all'",
    "eval.keep_best=true": r"pretrain.json: .*held_out.every_steps was None, is 4; keep_best was False, is True",
    "score.shifted=false": r"score-\w+.json: .*shifted was True, is False",
    "curriculum.beta=0.5": "curriculum-1.json: .*beta was 0.8, is 0.5",
    "curriculum.dedup=true": "joint.json: .*draw.dedup was False, is True",
    "joint.objective={name: logit_mix, lam: 0.4}": r"joint.json: .*objective was .*lam=0.5.*lam=0.4",
    "joint.weak.trainable=true": r"joint.json: .*trained was \['strong'\], is \['strong', 'weak'\]",
    "controls.sft_continued.resample=false": r"sft_continued.json: .*draw.dedup was False, is None",
    "export.calibrate=lambda": "export.json: .*calibrate was 'none', is 'lambda'",
    "eval.tasks.sums.max_new_tokens=5": "eval-M0-sums.json: .*max_new_tokens was 4, is 5",
}


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    return recipes.copy(recipes.finished(tmp_path_factory), tmp_path_factory.mktemp("changes") / "copy")


@pytest.mark.parametrize("change, expected", CHANGES.items())
def test_a_changed_recipe_is_refused_by_the_key_that_differs(unchanged, monkeypatch, change, expected):
    monkeypatch.chdir(unchanged)
    before = recipes.files(unchanged)
    with pytest.raises(ValueError, match=rf"^run/stages/{expected}.*; choose another work_dir$"):
        run(change)
    after = recipes.files(unchanged)
    assert {name: after.get(name) for name in before} == before
    assert all(name.startswith("run/cache/") for name in after.keys() - before.keys())


def test_another_architecture_in_the_same_file_is_refused(finished):
    Path("config.json").write_text(json.dumps({**recipes.CONFIG, "intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"assets.json: .*config.intermediate_size was 48, is 64"):
        run()


def test_other_data_in_the_same_file_is_refused(finished):
    recipes.rows(Path("train.jsonl"), [{"question": "1+1=", "answer": "2"}] * 40)
    with pytest.raises(ValueError, match=r"assets.json: .*tokenizer.texts was"):
        run()


def test_what_changes_no_result_may_change(finished, monkeypatch):
    refuse(monkeypatch, (train, "train"), (scoring, "score"), (tasks, "evaluate"), (export.hf, "save"))
    before = json.loads(Path("run/summary.json").read_text())
    again = run("train.checkpoint_every_steps=3", "train.keep_last=1", "eval.tasks.sums.batch_size=2",
                "eval.every_steps=1", "curriculum.min_effective_share=0", "score.batch_size=2")  # fmt: skip
    assert again == before


def test_what_has_no_record_is_not_taken_for_a_result(finished):
    Path("run/stages/export.json").unlink()
    with pytest.raises(FileExistsError, match=r"run/export: exists, and no run/stages/export.json says from what; rem"):
        run()


def test_a_task_that_is_added_later_is_all_that_runs(finished, monkeypatch):
    refuse(monkeypatch, (train, "train"), (scoring, "score"), (export.hf, "save"))
    before, asked = recipes.files(finished / "run"), []
    answer = tasks.evaluate
    monkeypatch.setattr(tasks, "evaluate", lambda *a, **k: asked.append(a[3]) or answer(*a, **k))
    summary = run("eval.tasks.more={source: {path: held_out.jsonl, limit: 3}, grader: numeric, max_new_tokens: 4}")
    assert [len(items) for items in asked] == [3] * 4
    assert list(summary["eval"]) == ["M0", "M1", "joint", "sft_continued"]
    assert all(list(figures) == ["sums", "more"] for figures in summary["eval"].values())
    before.pop("summary.json")
    after = recipes.files(finished / "run")
    assert {name: after[name] for name in before} == before
    new = {name for name in after.keys() - before.keys() if not name.startswith("summary")}
    assert new == {f"eval/{m}-more.jsonl" for m in summary["eval"]} | {
        f"stages/eval-{m}-more.json" for m in summary["eval"]
    }


def test_a_mistake_that_stopped_a_stage_at_its_start_can_be_mended(finished):
    forget("joint", "sft_continued", "export", "eval-joint-sums", "eval-sft_continued-sums")
    long = "joint.optimizer={warmup_steps: 50}"
    with pytest.raises(ValueError, match=r"optimizer.warmup_steps: 50 steps of warm-up in a run of 6 steps"):
        run(long)
    assert record("joint")["output"] is None
    job = record("joint")["inputs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", lambda job: Path("run/sft/checkpoints/6"))
        run("joint.optimizer={warmup_steps: 5}", until="joint")
    assert job["optimizer"]["warmup_steps"] == 50 and record("joint")["inputs"]["optimizer"]["warmup_steps"] == 5


# -- arms and rounds --------------------------------------------------------------------------------------------------


def test_the_second_round_starts_from_m1_and_m2(finished, monkeypatch):
    """Scores are made of M2 alone: M1's are those of the first round."""
    jobs, scored = [], []
    real_train, real_score = train.train, selection.score
    monkeypatch.setattr(train, "train", lambda job: jobs.append(job) or real_train(job))
    monkeypatch.setattr(selection, "score", lambda run, ref: scored.append(ref.directory) or real_score(run, ref))
    summary = run("rounds=2", until="joint")
    m1, m2 = Path(summary["models"]["M1"]), Path(summary["models"]["joint"])
    assert scored == [m2] and [job.directory for job in jobs] == [Path("run/joint-2")]
    lineage = record("joint-2")["inputs"]["roles"]
    assert lineage == {role: ModelRef(path, "strong").digest for role, path in {"strong": m2, "weak": m1}.items()}
    for found, directory in ((jobs[0].trained()["strong"], m2), (jobs[0].frozen()["weak"], m1)):
        expected = roles.load(directory, "strong")[1]
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert list(summary["models"]) == ["M0", "M1", "joint", "joint-2"]
    assert list(summary["curriculum"]) == ["round 1", "round 2"]
    assert len(list(Path("run/scores").iterdir())) == 3


@pytest.fixture
def jobs(monkeypatch):
    """What would be trained; an existing checkpoint is taken for the result of each."""
    jobs = {}

    def fake(job):
        jobs[job.directory.name] = job
        return job.directory.parent / "sft/checkpoints/6"

    monkeypatch.setattr(train, "train", fake)
    return jobs


CONTROLS = (
    "controls.as_drawn={objective: {name: temperature, lam: 0.5}}",
    "controls.shuffled={resample: false}",
    "controls.both_trained={weak: {trainable: true}}",
)


def test_controls_are_as_long_as_the_joint_stage_and_draw_the_same(finished, jobs):
    forget("joint", "sft_continued", "export", "eval-*")
    run("joint.steps=null", "joint.epochs=2", "curriculum.multiplier=1.5", *CONTROLS, until="joint")
    assert list(jobs) == ["joint"]
    for control in ("as_drawn", "shuffled", "both_trained"):
        run("joint.steps=null", "joint.epochs=2", "curriculum.multiplier=1.5", *CONTROLS, until=control)
    joint = jobs.pop("joint")
    assert list(jobs) == ["as_drawn", "shuffled", "both_trained"]
    assert joint.trained_roles == ("strong",) and joint.plan.total_steps > 10
    assert len(joint.plan.draws) == 2 and len(joint.plan.draws[0]) == 60
    for name, job in jobs.items():
        assert job.plan.total_steps == joint.plan.total_steps and job.seed == joint.seed
        if name == "shuffled":
            assert np.array_equal(np.sort(job.plan.draws[0]), np.arange(40))
        else:
            np.testing.assert_array_equal(job.plan.items, joint.plan.items)
            np.testing.assert_array_equal(job.plan.offsets, joint.plan.offsets)
    assert jobs["both_trained"].trained_roles == ("strong", "weak")
    assert list(jobs["as_drawn"].models) == ["strong"] and jobs["as_drawn"].objective == objectives.Temperature(0.5)


@pytest.mark.parametrize("until, trained", [("sft", []), ("joint", ["joint"]), ("shuffled", ["joint", "shuffled"])])
def test_until_trains_no_more_than_it_needs(finished, jobs, until, trained):
    forget("joint", "sft_continued", "export", "eval-*")
    summary = run(*CONTROLS, until=until)
    assert list(jobs) == trained
    assert list(summary["models"]) == ["M0", "M1", *trained]


def test_without_resampling_nothing_is_scored(finished, jobs, monkeypatch):
    forget("joint", "sft_continued", "score-*", "curriculum-*", "export", "eval-*")
    refuse(monkeypatch, (scoring, "score"))
    summary = run("joint.resample=false", until="sft_continued")
    assert list(jobs) == ["joint", "sft_continued"] and summary["curriculum"] == {}
    assert all(np.array_equal(np.sort(job.plan.draws[0]), np.arange(40)) for job in jobs.values())


def test_a_model_that_is_there_already_is_the_base(finished, jobs):
    """Nothing is initialised or pre-trained; tokenizer and architecture are its own."""
    path = Path("run/export")
    summary = run("work_dir=other", "pretrain=null", "model={path: run/export, compute_dtype: float32}", until="sft")
    assert list(jobs) == ["sft"] and summary["models"]["M0"] == "run/export" and not Path("other/init").exists()
    assert Path("other/assets/tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, jobs["sft"].trained()["strong"], wmss.load(path)[1])
    with pytest.raises(ValueError, match=r"assets.json: .*config.head_dim was 16, is 8"):
        config_ = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config_, "head_dim": 8}))
        run("work_dir=other", "pretrain=null", "model={path: run/export, compute_dtype: float32}", until="sft")


# -- the curriculum's collapse ----------------------------------------------------------------------------------------


@pytest.fixture
def collapsing(finished):
    """Scores of a weak agent that is confidently wrong: the entropy falls on one example only."""
    forget("joint", "sft_continued", "curriculum-*", "export", "eval-*")
    shutil.rmtree("run/curriculum")
    dataset = pipeline.prepare(recipes.load(), say=lambda _: None).dataset
    strong = np.full(40, 2.0)
    strong[17] = 0.5
    for name, entropy in {"pretrain/checkpoints/4": np.ones(40), "sft/checkpoints/6": strong}.items():
        digest = ModelRef(Path("run") / name, "strong").digest
        scores = scoring.Scores(entropy, entropy, entropy, np.full(40, 3))
        scoring.write(f"run/scores/{digest}.parquet", scores, dataset, digest, True)


def test_a_collapse_is_explained_and_a_uniform_share_mends_it(collapsing, jobs, capsys, monkeypatch):
    code, _, err = command(capsys, monkeypatch, "train", "recipe.yaml", "--stage", "joint")
    assert code == 2 and not jobs
    (line,) = [text for text in err.splitlines() if text.startswith("wmss")]
    for part in (
        "error: the curriculum collapses: its effective sample size is 2 of 40 examples",
        "(3.9%, curriculum.min_effective_share is 5.0%)", "Entropy fell on 2.5% of the examples only",
        "curriculum.uniform_share=0.5", "Report: run/curriculum/round-1-collapsed.json",
    ):  # fmt: skip
        assert part in line
    assert json.loads(Path("run/curriculum/round-1-collapsed.json").read_text())["entropy_fell_on"] == 1 / 40
    code, out, _ = command(
        capsys, monkeypatch, "train", "recipe.yaml", "curriculum.uniform_share=0.5", "--stage", "joint"
    )
    assert code == 0 and "effective sample size 13.9%" in out
    drawn = jobs["joint"].plan.draws[0]
    assert len(np.unique(drawn)) > 10 and np.mean(drawn == 17) > 0.2
    report = json.loads(Path("run/curriculum/round-1.json").read_text())
    assert report["term_shares"]["uniform"] == pytest.approx(0.5) and report["effective_share"] > 0.05


def command(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["wmss", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer replaces it
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capsys.readouterr()


# -- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_calibration_multiplies_the_logits_by_lambda(finished, monkeypatch, tmp_path, tied):
    """Greedy answers stay what they were; with a schedule it is the λ of the last step."""
    model = tiny.model(tied=tied, vocab_size=280)
    with checkpoint.Writer(tmp_path / "joint") as writer:
        meta = {"roles": roles.describe({"strong": model})}
        writer.save(6, {"params": {"strong": tiny.params(model)}}, meta, None, roles.asset_files("run/assets"))
    ref = ModelRef(tmp_path / "joint/6", "strong")
    exported = {}
    for calibrate, lam in {"none": 0.25, "lambda": 0.25, "schedule": objectives.Linear(0.0, 0.5, 12)}.items():
        recipe = recipes.load(f"export.calibrate={'none' if calibrate == 'none' else 'lambda'}")
        here = dataclasses.replace(pipeline.prepare(recipe, say=lambda _: None), work=tmp_path / calibrate)
        assert export.export(here, ref, objectives.LogitMix(lam)) == str(tmp_path / calibrate / "export")
        exported[calibrate] = wmss.load(tmp_path / calibrate / "export")
    tokens = tiny.batch(rows=4, V=280)["tokens"]
    logits = jax.jit(lambda params: model.logits(params, tokens))
    z = {name: logits(params) for name, (_, params) in exported.items()}
    np.testing.assert_array_equal(z["none"], logits(tiny.params(model)))
    for name in ("lambda", "schedule"):
        np.testing.assert_allclose(z[name], 0.25 * z["none"], rtol=1e-5, atol=1e-5)
    answers = [
        generate.generate(model, params, tokens[:, :8].tolist(), max_new_tokens=8, stop_ids=())
        for _, params in exported.values()
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("objective", ["{name: sft}", "{name: logit_mix, lam: 0}"])
def test_calibration_without_lambda_is_refused_before_anything_is_made(tmp_path, monkeypatch, objective):
    monkeypatch.chdir(recipes.write(tmp_path))
    with pytest.raises(
        ValueError, match=r"export.calibrate: lambda needs a joint.objective with lam > 0.*set it to none"
    ):
        run("export.calibrate=lambda", f"joint.objective={objective}")
    assert not Path("run").exists()


# -- the other commands -----------------------------------------------------------------------------------------------


def test_wmss_score_writes_scores_of_any_model(finished, monkeypatch, capsys):
    expected = {path: path.read_bytes() for path in Path("run/scores").iterdir()}
    code, out, _ = command(capsys, monkeypatch, "score", "run/sft/checkpoints/6", "recipe.yaml", "new/m1.parquet")
    assert code == 0 and out.endswith("wrote new/m1.parquet\n")
    dataset = pipeline.prepare(recipes.load(), say=lambda _: None).dataset
    mine = scoring.read("new/m1.parquet", dataset)
    theirs = scoring.read(f"run/scores/{ModelRef(Path('run/sft/checkpoints/6'), 'strong').digest}.parquet", dataset)
    np.testing.assert_allclose(mine.entropy, theirs.entropy, rtol=1e-5)
    assert command(capsys, monkeypatch, "score", "run/export", "recipe.yaml", "export.parquet")[0] == 0
    assert {path: path.read_bytes() for path in Path("run/scores").iterdir()} == expected
    code, _, err = command(capsys, monkeypatch, "score", "run/export", "recipe.yaml", "export.parquet")
    assert code == 2 and "export.parquet: exists already" in err


def test_wmss_inspect_shows_examples_plan_and_curriculum(finished, monkeypatch, capsys):
    before = recipes.files(finished)
    code, out, _ = command(capsys, monkeypatch, "inspect", "recipe.yaml", "--show", "2")
    assert code == 0 and "example 0, train.jsonl:1" in out and "⟧" in out
    assert "effective" in out.lower() and "difficulty" in out
    assert recipes.files(finished) == before


def test_wmss_inspect_needs_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(recipes.write(tmp_path))
    code, out, _ = command(capsys, monkeypatch, "inspect", "recipe.yaml")
    assert code == 0 and "train.jsonl:3" in out and not Path("run/sft").exists()


@pytest.mark.parametrize("stage", recipes.STEPS)
def test_wmss_train_prints_the_checkpoint_of_its_stage(finished, monkeypatch, capsys, stage):
    refuse(monkeypatch, (train, "train"), (export.hf, "save"), (tasks, "evaluate"))
    code, out, _ = command(capsys, monkeypatch, "train", "recipe.yaml", "--stage", stage)
    assert code == 0 and out.splitlines()[-1] == f"run/{stage}/checkpoints/{recipes.STEPS[stage]}"


def test_wmss_run_prints_the_table(finished, monkeypatch, capsys):
    code, out, _ = command(capsys, monkeypatch, "run", "recipe.yaml")
    assert code == 0 and out.splitlines()[-1] == "exported model: run/export"
    assert [line.split()[0] for line in out.splitlines()[-5:-1]] == ["M0", "M1", "joint", "sft_continued"]
