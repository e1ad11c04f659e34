"""Studies: what may differ, what is compiled, which rate is chosen, what a table says. Run: pytest tests/test_lab.py"""

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import evidence
from wmss_jax import intervals, pipeline, roles, selection
from wmss_jax.config import ConfigError
from wmss_jax.lab import bench, problems, results, run, study, table, workers
from wmss_jax.lab.results import Row
from wmss_jax.lab.workers import Run
from wmss_jax.weak_config import WeakConfig

TASK = {"grader": "exact", "max_new_tokens": 4, "batch_size": 8}
STUDY = {
    "work_dir": "lab",
    "problems": {"addition": {"digits": 2}, "train": 40, "validation": 8, "test": 16},
    "seeds": 2,
    "rates": [1e-3, 3e-3],
    "reference": "sft",
    "recipe": {
        "model": recipes.RECIPE["model"],
        "dataset": recipes.RECIPE["dataset"],
        "optimizer": recipes.RECIPE["optimizer"],
        "train": {"diagnose_every_steps": 6},
        "pretrain": {"steps": 4},
        "sft": {"steps": 6},
        "joint": {"steps": 6},
        "eval": {"tasks": {name: {"source": f"{name}.jsonl", **TASK} for name in ("validation", "test", "train")}},
    },
    "arms": {
        "sft": {"joint": {"objective": {"name": "sft"}, "resample": False}},
        "wmss": {},
        "wmss_uniform": {"joint": {"resample": False}},
    },
}


def changed(*changes):
    """STUDY with `path=value` overrides."""
    return study.load(json.loads(json.dumps(STUDY)), changes)


# -- what a study may say ---------------------------------------------------------------------------------------------


def test_an_arm_departs_in_the_joint_stage_alone():
    found = changed(
        "arms.other={joint: {objective: {lam: 0.3}, steps: 6}, curriculum: {beta: 0.5}, optimizer: {b2: 0.9}}"
    )
    base, other = (recipe.model_dump() for recipe in (found.base, found.arms["other"]))
    assert found.arms["sft"].joint.objective.model_dump() == {"name": "sft"}, "a name replaces, lam does not stay"
    assert found.arms["wmss"] == found.base
    assert other.pop("joint")["objective"] == {"name": "logit_mix", "lam": 0.3}
    assert other.pop("curriculum") == base["curriculum"] | {"beta": 0.5}
    assert other.pop("optimizer") == base["optimizer"] | {"b2": 0.9}
    assert other.items() <= base.items()


@pytest.mark.parametrize(
    "change, said",
    [
        ("arms.wmss={joint: {objectiv: {}}}", "arms.wmss: joint.objectiv: unknown key; did you mean 'objective'?"),
        ("arms.wmss={sft: {steps: 9}}", "arms.wmss.sft: unknown key"),
        ("arms.M1={}", "arms: M1 is the name of a starting point"),
        ("arms.wmss={optimizer: {peak_lr: 1e-3}}", "arms.wmss.optimizer.peak_lr: give rates: [...] instead"),
        ("arms.wmss={joint: {steps: 7}}", "arms.wmss.joint.steps: 7, and the reference takes 6; arms of other lengths"),
        ("arms.wmss={joint: {weak: {placement: cached}}}", "arms.wmss.joint.weak.placement: a lab keeps"),
        ("recipe.joint={epochs: 1}", "arms.sft.joint.steps: give it, or recipe.joint.steps"),
        ("recipe.rounds=2", "recipe.rounds: a lab compares whole models"),
        ("recipe.train={checkpoint_bucket: gs://b/run}", "recipe.train.checkpoint_bucket: the runs of all seeds would"),
        ("recipe.seed=3", "recipe.seed: is the study's to set"),
        ("contrasts=[[wmss, stf]]", "contrasts: unknown arm 'stf'; did you mean 'sft'?"),
        ("reference=sftt", "unknown arm 'sftt'; did you mean 'sft'?"),
        ("validation=valid", "validation: unknown task 'valid' of recipe.eval.tasks; did you mean 'validation'?"),
        ("rates=[]", "rates: expected different numbers, got []"),
        ("seeds=[1, 1]", "seeds: expected a number or a list of different numbers, got [1, 1]"),
        ("problems.train=5000", "problems: 5024 problems are wanted, and there are 4095 sums of 2 digits"),
        ("problems.reasoning_gym={dataset: chain_sum}", "problems: give exactly one of addition and reasoning_gym"),
    ],
)
def test_mistakes_are_told_in_one_line_with_their_place(change, said):
    with pytest.raises(ConfigError) as raised:
        changed(change)
    assert said in str(raised.value)


def test_a_study_is_called_as_its_file(tmp_path):
    (tmp_path / "sums.yaml").write_text(json.dumps(STUDY))
    assert study.load(tmp_path / "sums.yaml").name == "sums"


def test_length_may_differ_where_it_is_what_is_compared():
    assert changed("arms.wmss={joint: {steps: 12}}", "equal=nothing").arms["wmss"].joint.steps == 12


def test_a_recipe_of_a_file_gives_its_place_and_controls_up(tmp_path):
    recipe = {**STUDY["recipe"], "work_dir": "elsewhere", "seed": 7, "controls": {"one": {"resample": False}}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    found = changed(f"recipe={tmp_path}/recipe.yaml")
    assert found.base == changed().base


# -- problems ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(1, 4))
def test_additions_are_right_and_in_one_split_alone(seed, digits):
    wanted = problems.ProblemsConfig.model_validate(
        {"addition": {"digits": digits}, "train": 20, "validation": 10, "test": 20}
    )
    made = problems.make(wanted, seed)
    assert made == problems.make(wanted, seed) and [len(rows) for rows in made.values()] == [20, 10, 20]
    seen = []
    for row in (row for rows in made.values() for row in rows):
        a, b = row["question"].removesuffix("=").split("+")
        assert int(a) + int(b) == int(row["answer"]) and len(a) == len(b) == digits
        seen.append(frozenset((a, b)))
    assert len(set(seen)) == 50


class _Rows:
    """What reasoning-gym returns, as far as it is looked at: every question comes twice, or there is but one."""

    def __init__(self, size, distinct=True):
        self.rows = [{"question": f"{i // 2 if distinct else 0}?", "answer": i // 2} for i in range(size)]

    def __iter__(self):
        return iter(self.rows)


def test_problems_of_reasoning_gym_are_asked_once_each(monkeypatch):
    asked = []

    def create_dataset(name, seed, size, **settings):
        if name == "nonsense":
            raise ValueError("no such data set")
        asked.append((name, seed, settings))
        return _Rows(size, distinct=name != "one")

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset))
    wanted = lambda name: problems.ProblemsConfig.model_validate(
        {"reasoning_gym": {"dataset": name, "settings": {"level": 2}}, "train": 5, "validation": 2, "test": 3}
    )
    made = problems.make(wanted("chain_sum"), 7)
    assert asked == [("chain_sum", 7, {"level": 2})]
    assert [row["question"] for rows in made.values() for row in rows] == [f"{i}?" for i in range(10)]
    assert made["train"][3] == {"question": "3?", "answer": "3"}
    with pytest.raises(ValueError, match="1 of 10 different questions in 40; ask for fewer"):
        problems.make(wanted("one"), 0)
    with pytest.raises(ValueError, match=r"problems\.reasoning_gym: nonsense: no such data set"):
        problems.make(wanted("nonsense"), 0)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'wmss-jax\[demo\]'"):
        problems.make(wanted("chain_sum"), 0)


def test_seeds_have_other_problems_and_what_is_there_is_left_alone(tmp_path):
    found = dataclasses.replace(changed(), config=changed(f"work_dir={tmp_path}").config)
    for seed in (0, 1, 0):
        found.prepare_data(seed)
    digests = [found.data_digest(seed) for seed in (0, 1)]
    assert digests[0] != digests[1]
    file = tmp_path / "data/seed-0/test.jsonl"
    file.write_text(file.read_text().replace("=", "= "))
    found.prepare_data(0)
    assert found.data_digest(0) != digests[0]


# -- who does what ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.randoms(use_true_random=False), st.booleans())
def test_every_run_is_given_out_once_and_none_before_its_start(seeds, arms, count, rng, one_fails):
    runs = [Run(s, *arm) for s in range(seeds) for arm in [(None, None)] + [(f"a{i}", 0.1) for i in range(arms)]]
    queue, at, busy, started, done = workers._Queue(runs), [None] * count, {}, set(), []
    while queue.left or busy:
        for worker in range(count):
            if worker not in busy and (run := queue.next(at[worker])) is not None:
                assert run.arm is None or run.seed in started
                busy[worker], at[worker] = run, run.seed
        assert busy, "nothing under way and yet something left"
        run = busy.pop(rng.choice(sorted(busy)))
        failed = one_fails and run == Run(0)
        if run.arm is None and not failed:
            started.add(run.seed)
        queue.ended(run, failed)
        done.append(run)
    assert sorted(done, key=str) == sorted((r for r in runs if not one_fails or r.seed or not r.arm), key=str)


def test_a_process_stays_with_its_seed():
    runs = [Run(s, *arm) for s in (0, 1, 2) for arm in [(None, None), ("a", 0.1), ("b", 0.1)]]
    queue, given_out, seed = workers._Queue(runs), [], None
    while (run := queue.next(seed)) is not None:
        given_out.append(run)
        seed = run.seed
        queue.ended(run, failed=False)
    assert given_out == runs


# -- from rows to the table -------------------------------------------------------------------------------------------


def rows_of(figures, split="test"):
    """Rows of {(arm, rate): accuracies by seed}."""
    return [
        Row(arm, seed, rate, 6, split, "accuracy", value, "c", f"d{seed}", "v")
        for (arm, rate), values in figures.items()
        for seed, value in enumerate(values)
        if value is not None
    ]


CONFIG = changed("seeds=3", "arms.late={joint: {resample: false}}").config
FIGURES = {
    "validation": {
        ("sft", 1e-3): [0.5, 0.4, 0.6], ("sft", 3e-3): [0.6, 0.2, 0.5],  # the lower one is better on average
        ("wmss", 1e-3): [0.5, 0.4, 0.6], ("wmss", 3e-3): [0.5, 0.4, 0.6],  # equal: the lower
        ("wmss_uniform", 1e-3): [0.1, 0.1, 0.1], ("wmss_uniform", 3e-3): [0.9, 0.9, None],  # one diverged
        ("late", 1e-3): [None, 0.3, 0.3], ("late", 3e-3): [0.3, None, 0.3],
    },
    "test": {
        ("sft", 1e-3): [0.5, 0.3, 0.6], ("sft", 3e-3): [0.9, 0.9, 0.9],  # tempting
        ("wmss", 1e-3): [0.6, 0.5, 0.65], ("wmss", 3e-3): [0.1, 0.1, 0.1],
        ("wmss_uniform", 1e-3): [0.2, 0.1, 0.3], ("wmss_uniform", 3e-3): [1.0, 1.0, None],
        ("late", 1e-3): [None, 0.3, 0.3], ("late", 3e-3): [0.3, None, 0.3],
        ("M1", None): [0.4, 0.3, 0.5],
    },
    "train": {("M1", None): [1.0, 0.99, 0.98]},
}  # fmt: skip
ROWS = [row for split, figures in FIGURES.items() for row in rows_of(figures, split)]


def test_the_rate_is_chosen_on_the_validation_split_where_all_seeds_ended():
    assert table.best_rates(ROWS, CONFIG) == {"sft": 1e-3, "wmss": 1e-3, "wmss_uniform": 1e-3, "late": None}


def test_arms_are_compared_in_pairs_with_the_reference_and_corrected_together():
    found = {line.arm: line for line in table.compare(ROWS, CONFIG, "test")}
    wmss, uniform = (
        intervals.paired(FIGURES["test"][arm, 1e-3], FIGURES["test"]["sft", 1e-3]) for arm in ("wmss", "wmss_uniform")
    )
    assert found["wmss"].versus == wmss and found["wmss_uniform"].versus == uniform
    assert found["sft"].versus is None and found["M1"].versus is None and found["late"].accuracy is None
    assert [found["wmss"].p_holm, found["wmss_uniform"].p_holm] == intervals.holm([wmss.p, uniform.p])
    assert found["M1"].accuracy == intervals.mean([0.4, 0.3, 0.5])


def test_contrasts_are_paired_and_corrected_among_themselves():
    config = CONFIG.model_copy(update={"contrasts": (("wmss", "wmss_uniform"), ("late", "sft"), ("sft", "wmss"))})
    found = table.contrasts(ROWS, config, "test")
    expected = [
        intervals.paired(FIGURES["test"][a, 1e-3], FIGURES["test"][b, 1e-3])
        for a, b in (("wmss", "wmss_uniform"), ("sft", "wmss"))  # late has no rate at which all seeds ended
    ]
    assert [contrast.difference for contrast in found] == expected
    assert [contrast.p_holm for contrast in found] == intervals.holm([d.p for d in expected])
    assert str(found[0]) in table.text(ROWS, config, ["test"])
    assert str(found[0]).startswith("wmss - wmss_uniform: +38.3 points [") and str(found[0]).endswith("seeds up: above")
    assert str(found[1]).endswith("no difference can be told")


def test_the_table_says_figures_and_doubts():
    said = table.text(ROWS, CONFIG, ["test"])
    assert "| wmss | 0.001 | 6 | 58.3 ± 19.0 | +11.7 |" in said
    assert "| late | none ended |" in said and "same number of optimizer steps" in said
    assert "Holm corrects for 3 comparisons" in said and "chosen by its mean accuracy on validation" in said
    doubts = table.warnings(ROWS, CONFIG, ["test"])
    assert any("late: there is no rate at which all seeds ended" in said for said in doubts)
    assert any("wmss: its best rate, 0.001, is the lowest that was tried" in said for said in doubts)
    assert not any("saturated" in said for said in doubts)


@pytest.mark.parametrize(
    "split, values, said", [("train", [0.9, 0.9, 1.0], "has not saturated"), ("test", [0.97, 0.96, 0.96], "above 95%")]
)
def test_a_set_up_that_shows_nothing_is_told(split, values, said):
    others = [row for row in ROWS if (row.arm, row.split) != ("M1", split)]
    assert any(
        said in line for line in table.warnings(others + rows_of({("M1", None): values}, split), CONFIG, ["test"])
    )


def test_rows_come_back_from_parquet_sorted_and_another_file_is_refused(tmp_path):
    results.write(tmp_path / "r.parquet", reversed(ROWS), {"study": CONFIG.model_dump(mode="json")})
    rows, meta = results.read(tmp_path / "r.parquet")
    assert set(rows) == set(ROWS) and rows == sorted(rows, key=lambda r: (r.arm, r.seed, r.rate or 0, r.split))
    assert study.StudyConfig.model_validate_json(json.dumps(meta["study"])) == CONFIG
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(tmp_path / "r.parquet").drop_columns("arm"), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no results of `wmss lab`"):
        results.read(tmp_path / "other.parquet")
    with pytest.raises(FileNotFoundError, match="run the study first"):
        results.read(tmp_path / "none.parquet")


# -- runs in this process ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A bench on a tiny study in its own directory, and what a start and three runs on it compiled."""
    root = tmp_path_factory.mktemp("bench")
    (root / "config.json").write_text(json.dumps(recipes.CONFIG))
    with pytest.MonkeyPatch.context() as patch, recipes.one_device(), recipes.compiled_once(tmp_path_factory):
        patch.chdir(root)
        found = changed("train=train", "arms.late={joint: {resample: false}, curriculum: {alpha: 1}}")
        for seed in (0, 1):
            found.prepare_data(seed)
        yield bench.Bench(found, say=lambda line: None), found


class _Compiled:
    """Counts programs that are compiled or fetched from the disk: everything that is not in memory already."""

    def __init__(self):
        self.names = []
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(event)

    def during(self, do):
        before = len(self.names)
        result = do()
        return result, len(self.names) - before


def test_the_second_arm_compiles_nothing_nor_does_another_rate_or_seed(work):
    lab, _ = work
    count = _Compiled()
    lab.start(0), lab.start(1)
    first, compiled = count.during(lambda: lab.arm(0, "wmss", 1e-3))
    assert compiled > 0
    for arguments in [(0, "wmss_uniform", 1e-3), (0, "wmss", 3e-3), (1, "wmss", 3e-3), (0, "late", 1e-3)]:
        measured, compiled = count.during(lambda arguments=arguments: lab.arm(*arguments))
        assert compiled == 0, arguments
        assert measured.figures["training"]["loss"] != first.figures["training"]["loss"], "and yet it is another run"
    again, _ = count.during(lambda: lab.arm(0, "wmss", 1e-3))
    assert {k: v for k, v in again.figures.items() if k != "run"} == {
        k: v for k, v in first.figures.items() if k != "run"
    }


def test_an_arm_ends_where_the_recipe_s_joint_stage_does(work):
    """Against the loop on disk: the same parameters at the same rate, up to how the rate is multiplied."""
    lab, found = work
    recipe = found.of_seed(found.base, 0).model_copy(update={"work_dir": "recipe"})
    ends = pipeline.run(recipe, until="joint", say=lambda line: None)["models"]["joint"]
    job, _ = lab._job(lab._seed(0), "wmss")
    params, _ = lab._trainer.run(job, recipe.optimizer.peak_lr)
    _, theirs = roles.load(Path(ends), "strong")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), params["strong"], theirs)


def test_the_entropies_that_count_are_those_of_the_arm_s_own_weak_agent(work):
    """M1 itself as a weak agent from elsewhere: no entropy has moved."""
    lab, found = work
    of = lab._seed(0)
    joint = found.base.joint.model_copy(update={"weak": WeakConfig(path=str(of.strong.directory))})
    arms = {**found.arms, "of_m1": found.base.model_copy(update={"joint": joint})}
    other = bench.Bench(dataclasses.replace(found, arms=arms), say=lambda line: None)
    _, share = other._job(other._seed(0), "of_m1")
    unmoved, n = dict.fromkeys(("weak", "strong"), of.scores["strong"]), len(of.run.dataset)
    _, expected = selection.probabilities(found.base.curriculum, unmoved, n, seed=0)
    assert share == pytest.approx(expected["effective_share"], rel=1e-6)
    assert share != pytest.approx(lab._job(of, "wmss")[1], rel=1e-3), "nor would M0 have given the same"


def test_equal_flops_give_the_dearer_arm_fewer_steps(work):
    lab, found = work
    equal = dataclasses.replace(found, config=found.config.model_copy(update={"equal": "flops"}))
    measured = bench.Bench(equal, say=lambda line: None).arm(0, "wmss", 1e-3)
    sft = lab.arm(0, "sft", 1e-3)
    assert sft.steps == 6 and measured.steps < 6
    # Within half a step of the reference's FLOPs; rows are not equally full.
    assert abs(measured.figures["training"]["model_tflops"] / sft.figures["training"]["model_tflops"] - 1) < 0.2


def test_divergence_is_an_error_that_names_the_step_and_the_rate(work):
    lab, _ = work
    with pytest.raises(ArithmeticError, match=r"step \d of 6 is not finite at peak_lr 1e\+30"):
        lab.arm(0, "wmss", 1e30)


# -- whole studies ----------------------------------------------------------------------------------------------------


def figures_of(root):
    rows, _ = results.read(root / "lab/study.parquet")
    return [row for row in rows if row.split != "run"]


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_table_and_a_failing_arm_takes_nothing_down(
    tmp_path, tmp_path_factory
):
    env = recipes.environment(recipes.shared(tmp_path_factory))
    wanted = json.loads(json.dumps(STUDY))
    wanted["rates"] = [1e-3]
    wanted["arms"]["collapses"] = {"curriculum": {"min_effective_share": 1.0}}
    roots = [tmp_path / name for name in ("undisturbed", "killed")]
    for root in roots:
        root.mkdir()
        (root / "config.json").write_text(json.dumps(recipes.CONFIG))
        (root / "study.yaml").write_text(json.dumps(wanted))
    undisturbed = recipes.wmss("lab", "study.yaml", "--workers", "1", root=roots[0], env=env)
    assert undisturbed.returncode == 1, undisturbed.stderr
    assert undisturbed.stdout.count("failed: seed") == 2 and "effective sample size" in undisturbed.stdout
    command = [sys.executable, "-m", "wmss_jax", "lab", "study.yaml", "--workers", "2"]
    lab = subprocess.Popen(command, cwd=roots[1], env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(list(roots[1].glob("lab/results/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{lab.pid}/task/{lab.pid}/children")
    left = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    lab.send_signal(signal.SIGKILL)
    lab.wait()
    before = {file: file.stat().st_mtime_ns for file in roots[1].glob("lab/results/*.json")}
    assert 3 <= len(before) < 8
    while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in left), "its processes end with it"
    again = recipes.wmss("lab", "study.yaml", "--workers", "2", root=roots[1], env=env)
    assert again.returncode == 1, again.stderr
    assert all(file.stat().st_mtime_ns == at for file, at in before.items()), "what was done is not done again"
    assert figures_of(roots[1]) == figures_of(roots[0])
    assert (roots[1] / "lab/study.md").read_text() == (roots[0] / "lab/study.md").read_text()
    assert "| collapses | none ended |" in (roots[1] / "lab/study.md").read_text()
    assert len(list((roots[1] / "lab/failures").iterdir())) == 2


# -- the evidence -----------------------------------------------------------------------------------------------------


def test_the_page_holds_every_study_s_table_and_what_was_found_first(tmp_path):
    config = CONFIG.model_copy(update={"contrasts": (("wmss", "wmss_uniform"),)})
    meta = {"study": config.model_dump(mode="json"), "tests": ["test"], "made": "2026-01-02"}
    results.write(tmp_path / "given/sums.parquet", ROWS, meta)
    evidence.write([tmp_path / "given/sums.parquet"], tmp_path / "rows", tmp_path / "PAGE.md")
    page = (tmp_path / "PAGE.md").read_text()
    assert table.text(ROWS, config, ["test"]) in page and f"finished 2026-01-02 (v); {len(ROWS)} rows" in page
    assert page.index("sums, test: wmss - wmss_uniform: +38.3 points") < page.index("## sums")
    assert (tmp_path / "rows/sums.parquet").read_bytes() == (tmp_path / "given/sums.parquet").read_bytes()


def test_the_headline_counts_what_the_correction_leaves():
    contrast = lambda mean, p: table.Contrast("wmss", "sft", intervals.Difference(8, mean, 0.0, 0.0, p, 4), p)
    said = evidence.headline([("a, test", contrast(0.02, 0.06)), ("b, test", contrast(-0.03, 0.01))])
    assert said.startswith("**`wmss` is above what it is compared with in 0 of 2 comparisons.** It is below in 1: ")
    assert said.endswith(": sft (b, test): -3.0 points.")
    assert "in 1 of 1 comparisons: sft (a, test): +2.0 points.**" in evidence.headline(
        [("a, test", contrast(0.02, 0.01))]
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, None),
        ({"value": 0.56}, None),
        ({"value": 0.9}, "sft, seed 0, validation: accuracy 0.900, committed 0.500"),
        ({"data_digest": "x"}, "other data or another recipe"),
        ({"config_digest": "x"}, "other data or another recipe"),
        ({"rate": 0.5}, "no committed row at rate 0.5"),
    ],
)
def test_repeated_rows_are_held_against_the_committed_ones(change, said):
    row = next(row for row in ROWS if (row.arm, row.seed, row.split) == ("sft", 0, "validation"))
    found = evidence.differences(ROWS, [dataclasses.replace(row, **change)])
    assert found == [] if said is None else said in found[0]
    assert evidence.differences(ROWS, []) == ["nothing was repeated"]


def test_missing_evidence_is_told_and_no_success(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "ROWS", tmp_path / "docs/evidence")
    assert evidence.main(["check"]) == 1
    assert "docs/evidence/arithmetic.parquet is missing" in capsys.readouterr().err


# -- configs/lab ------------------------------------------------------------------------------------------------------

STUDIES = sorted((Path(__file__).parent.parent / "configs/lab").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_loads_and_opens_with_what_to_expect(path, monkeypatch):
    monkeypatch.chdir(path.parent.parent.parent)
    found = study.load(path)
    run._check_objectives(found)
    assert Path(found.base.model.config).exists() and found.tests
    opening = list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    for word in ("command:", "hardware:", "time:", "result:"):
        (line,) = [line for line in opening if line.startswith(f"# {word}")]
        assert len(line.removeprefix(f"# {word}").strip()) > 5
    assert any(f"configs/lab/{path.name}" in line for line in opening if line.startswith("# command:"))


def test_the_studies_that_share_a_directory_share_their_base(monkeypatch):
    monkeypatch.chdir(STUDIES[0].parent.parent.parent)
    by_directory = {}
    for found in map(study.load, STUDIES):
        base = found.base.model_copy(update={"controls": {}})  # which are nothing but steps to keep
        by_directory.setdefault(found.config.work_dir, []).append((base, found.config.problems))
    assert any(len(bases) > 1 for bases in by_directory.values())
    assert all(base == bases[0] for bases in by_directory.values() for base in bases)


def test_an_sft_step_as_weak_agent_is_kept_by_the_sft():
    arm = "arms.early={joint: {weak: {source: {name: sft_step, step: 3}}}}"
    (kept,) = changed(arm).base.controls.values()
    assert kept.weak.source.step == 3 and changed().base.controls == {}
