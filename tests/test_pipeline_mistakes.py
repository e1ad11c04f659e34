"""The user's mistakes: exit 2, one line with the fix, nothing overwritten. Run: pytest tests/test_pipeline_m*"""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import recipes

from wmss_jax import cli, pipeline, runs, scoring, sharding

MAKE_MESH = sharding.make_mesh


@pytest.fixture(scope="module", autouse=True)
def _alone():
    with recipes.one_device():
        yield


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A recipe that was never carried out, in the current directory."""
    monkeypatch.chdir(recipes.write(tmp_path))
    return tmp_path


@pytest.fixture
def finished(tmp_path, tmp_path_factory, monkeypatch):
    """A copy of the finished run, in the current directory."""
    root = recipes.copy(recipes.finished(tmp_path_factory), tmp_path / "copy")
    monkeypatch.chdir(root)
    return root


def in_this_process(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["wmss", *arguments])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer replaces it
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, capsys.readouterr().err

    return call


def as_a_process(factory):
    def call(*arguments):
        done = recipes.wmss(*arguments, root=Path(), env=recipes.environment(recipes.shared(factory)))
        return done.returncode, done.stderr

    return call


@pytest.fixture
def refused(request, monkeypatch, capsys, tmp_path_factory):
    """Runs `wmss`, which must refuse: gives what its one line says, once no file was changed or removed."""
    real = getattr(request, "param", None) == "a process"
    call = as_a_process(tmp_path_factory) if real else in_this_process(monkeypatch, capsys)

    def refusal(*arguments):
        before = recipes.files(Path())
        code, err = call(*arguments)
        assert code == 2, err
        (line,) = err.splitlines()
        assert line.startswith("wmss: error: ")
        after = recipes.files(Path())
        assert {name: after.get(name) for name in before} == before
        return line.removeprefix("wmss: error: ")

    return refusal


def assert_says(line, expected):
    assert re.fullmatch(expected, line), line


# -- rows -------------------------------------------------------------------------------------------------------------

ROW = {"question": "1+1=", "answer": "2"}
ROWS = {
    "malformed": ('{"question": "1+1=" "answer": "2"}', r"train\.jsonl:3: not valid JSON: .* at column \d+"),
    "no object": ("[1, 2]", r"train\.jsonl:3: expected an object with columns, got \[1, 2\]"),
    "a missing column": (
        {"question": "1+1=", "anwser": "2"},
        r"train\.jsonl:3: no messages, .* among the columns question, anwser; say in the source what to make of them.*",
    ),
    "an empty answer": (
        {"question": "1+1=", "answer": " "}, r"train\.jsonl:3: answer is empty; fill it in, or remove the row",
    ),
    "too long": (
        {"question": "1+1=" * 20, "answer": "2"},
        r"1 of 5 examples are longer than seq_len = 32 tokens \(train\.jsonl:3 has \d+\): raise seq_len, or set .*",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_a_bad_row(root, refused, kind):
    row, expected = ROWS[kind]
    recipes.rows(root / "train.jsonl", [ROW, ROW, row, ROW, ROW])
    assert_says(refused("run", "recipe.yaml"), expected)
    assert not Path("run/init").exists() and not list(Path("run").glob("cache/*"))


@pytest.mark.parametrize("refused", ["a process"], indirect=True)
def test_a_bad_row_in_a_real_process(root, refused):
    row, expected = ROWS["malformed"]
    recipes.rows(root / "train.jsonl", [ROW, row])
    assert re.fullmatch(expected.replace(":3", ":2"), refused("run", "recipe.yaml"))


@pytest.mark.parametrize("kind", ROWS)
def test_a_bad_row_is_mended_in_place(root, monkeypatch, kind):
    recipes.rows(root / "train.jsonl", [ROW, ROW, ROWS[kind][0]])
    with pytest.raises(ValueError, match=r"train\.jsonl:3"):
        runs.prepare(recipes.load(), say=lambda _: None)
    recipes.rows(root / "train.jsonl", [ROW] * 3)
    assert len(runs.prepare(recipes.load(), say=lambda _: None).dataset) == 3


@pytest.mark.parametrize("file", ["train", "held_out", "test"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_data_set(root, refused, file, content):
    (root / f"{file}.jsonl").write_text(content)
    assert_says(refused("run", "recipe.yaml"), rf"{file}\.jsonl: the data set is empty; give it at least one row")
    assert not Path("run/init").exists()


def test_a_torn_row_is_found_in_its_own_line(root, refused):
    recipes.rows(root / "train.jsonl", [ROW, '{"question": "1+1=", "answer": ', ROW])
    assert_says(refused("run", "recipe.yaml"), r"train\.jsonl:2: not valid JSON: .*")


def test_a_column_that_a_template_names(root, refused):
    source = "dataset.train={path: train.jsonl, prompt: '{questoin}', completion: '{answer}'}"
    line = refused("run", "recipe.yaml", source)
    assert_says(line, r"train\.jsonl:1: no column 'questoin' \(columns: question, answer; did you mean 'question'\?\)")


# -- the recipe -------------------------------------------------------------------------------------------------------

BAD = {
    "dataset.train=nowhere.jsonl": r"nowhere\.jsonl: no such file, and not a hub id \(owner/name\)",
    "eval.data=nowhere.jsonl": r"nowhere\.jsonl: no such file, and not a hub id \(owner/name\)",
    "eval.tasks.sums.source=nowhere.jsonl": r"nowhere\.jsonl: no such file, and not a hub id \(owner/name\)",
    "model.config=nowhere": r"nowhere/config\.json: no such file",
    "model.tokenizer=./nowhere": r"\./nowhere: no such directory, and not a hub id \(owner/name\)",
    "model.tokenizer=.": r"\.: holds no tokenizer \(tokenizer\.json\); say in model\.tokenizer which to use",
    "model.tokenizer=null": r"\.: holds no tokenizer \(tokenizer\.json\); say in model\.tokenizer which to use",
    "train.micro_batches=3": r".*train\.micro_batches: 3 does not divide dataset\.batch_size 4",
    "sft.stepz=3": r".*sft\.stepz: unknown key; did you mean 'steps'\?",
    "joint.objective={name: logit_mixx}": r"joint\.objective\.name: unknown name .*; did you mean 'logit_mix'\?",
    "joint.objective={name: logit_mix, lamb: 1}": r"joint\.objective\.lamb: unknown key; did you mean 'lam'\?",
    "joint.objective={name: logit_mix, lam: 2}": r"joint\.objective.*: lam must be in \[0, 1\], got 2\.0",
    "controls.cold={objective: {name: temprature}}": r"controls\.cold\.objective\.name: .* mean 'temperature'\?",
    "export.calibrate=lambda joint.objective={name: sft}": r"export\.calibrate: .*; set it to none",
}


@pytest.mark.parametrize("override, expected", BAD.items())
def test_a_bad_recipe(root, refused, override, expected):
    overrides = override.split(" ", 1) if override.startswith("export") else [override]
    assert_says(refused("run", "recipe.yaml", *overrides), expected)
    assert not Path("run/init").exists()


def test_an_unknown_stage(root, refused):
    line = refused("train", "recipe.yaml", "--stage", "jointt")
    assert_says(line, "no stage 'jointt' to stop after; there are pretrain, sft, joint, sft_continued")
    assert not Path("run").exists()


def test_a_tokenizer_beyond_the_models_vocabulary_is_mended_in_place(root, refused):
    Path("config.json").write_text(json.dumps({**recipes.CONFIG, "vocab_size": 260}))
    expected = "the tokenizer has 261 tokens, the model's vocabulary 260: raise vocab_size in config.json or lower .*"
    assert_says(refused("run", "recipe.yaml"), expected)
    assert not Path("run/assets").exists()
    Path("config.json").write_text(json.dumps(recipes.CONFIG))
    assert len(runs.prepare(recipes.load(), say=lambda _: None).tokenizer) == 261
    assert json.loads(Path("run/assets/config.json").read_text())["vocab_size"] == 300


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["mesh.data=2"], r"dataset\.batch_size: 4 rows do not split over 8 = train\.micro_batches × mesh\.data × .*"),
        (["mesh.fsdp=2", "mesh.tensor=4", "train.micro_batches=4"], r"dataset\.batch_size: 4 rows .* over 8 = .*"),
        (["mesh.fsdp=2", "mesh.tensor=4", "score.batch_size=3"], r"score\.batch_size: 3 rows do not split over 2 = .*"),
        (["mesh.fsdp=3"], r"mesh data=1 × fsdp=3 × tensor=1 does not cover 8 devices; the axes must multiply to 8"),
    ],
)
def test_a_batch_or_a_mesh_that_does_not_divide(root, refused, monkeypatch, overrides, expected):
    monkeypatch.setattr(runs.sharding, "make_mesh", MAKE_MESH)  # all eight devices
    assert_says(refused("run", "recipe.yaml", *overrides), expected)
    assert not Path("run").exists()


# -- the work directory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", ["this process", "a process"], indirect=True)
def test_the_work_directory_of_another_recipe(finished, refused):
    expected = (
        r"run/stages/sft\.json: this work_dir holds the stage of another recipe or other data: "
        r"stage\.steps was 6, is 7; choose another work_dir"
    )
    assert_says(refused("run", "recipe.yaml", "sft.steps=7"), expected)


def test_a_bit_flipped_in_the_checkpoint_of_a_finished_stage(finished, refused):
    recipes.flip_a_bit(Path("run/pretrain/checkpoints/4"))
    task = "eval.tasks.more={source: test.jsonl, grader: exact, max_new_tokens: 4}"  # which asks M0
    expected = r"run/pretrain/checkpoints/4: state/\S+: crc32c \w+ instead of \w+; put back a copy of it, or start .*"
    assert_says(refused("run", "recipe.yaml", task), expected)


def test_a_bit_flipped_in_the_checkpoint_of_an_unfinished_stage(finished, refused):
    record = json.loads(Path("run/stages/joint.json").read_text())
    Path("run/stages/joint.json").write_text(json.dumps({**record, "output": None}))
    recipes.flip_a_bit(Path("run/joint/checkpoints/6"))
    expected = r"\S*run/joint/checkpoints/6: state/\S+: crc32c .*/4 is intact; train.resume_from=newest_intact .*"
    assert_says(refused("run", "recipe.yaml"), expected)


@pytest.mark.parametrize("what, field", [("data set", "fingerprint"), ("tokenizer", "tokenizer_fingerprint")])
def test_scores_of_something_else(finished, refused, what, field):
    dataset = runs.prepare(recipes.load(), say=lambda _: None).dataset
    path = next(Path("run/scores").iterdir())
    other = dataclasses.replace(dataset, **{field: "0123456789abcdef"})
    scoring.write(path, scoring.read(path, dataset), other, path.stem, True)
    expected = rf"{path}: scores of another {what} \(0123456789abcdef, here \w+\); score again"
    assert_says(refused("run", "recipe.yaml"), expected)


def test_scoring_a_model_that_does_not_know_the_tokens(finished, refused):
    other = Path(shutil.copytree("run/export", "other"))
    known = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**known, "vocab_size": 96}))
    expected = r"other: knows 96 tokens, the recipe's tokenizer has 261; give another"
    assert_says(refused("score", "other", "recipe.yaml", "scores.parquet"), expected)
    assert_says(refused("score", "./nowhere", "recipe.yaml", "scores.parquet"), r"\./nowhere: no such directory.*")
    Path("taken.parquet").touch()
    expected = r"taken\.parquet: exists already; choose another file or remove it"
    assert_says(refused("score", "run/export", "recipe.yaml", "taken.parquet"), expected)


def test_data_may_change_after_a_look(root, monkeypatch, capsys):
    call = in_this_process(monkeypatch, capsys)
    assert call("inspect", "recipe.yaml")[0] in (0, None)
    recipes.rows(root / "train.jsonl", [ROW] * 3)
    assert call("inspect", "recipe.yaml", "model.tokenizer.vocab_size=279")[0] in (0, None)
    assert len(pipeline.prepare(recipes.load("model.tokenizer.vocab_size=279")).dataset) == 3
