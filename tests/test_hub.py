"""Data sets of a hub, by the code that loads them: columns, splits, configurations, revisions, and no hub at all."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("datasets")

READ = """
import json, sys
from wmss_jax import examples
from wmss_jax.evals import questions
from wmss_jax.sources import SourceConfig

def said(read):
    try:
        return read()
    except (FileNotFoundError, ValueError) as error:
        return f"{type(error).__name__}: {error}"

for kind, given in json.load(sys.stdin):
    if kind == "task":
        read = lambda: [(q.prompt, q.gold, q.location) for q in questions.read(questions.task_named(given))]
    elif kind == "digest":
        read = lambda: examples.digest(SourceConfig(**given), ".")
    else:
        read = lambda: [(e.prompt, e.completion, e.location) for e in examples.read(SourceConfig(**given), ".")]
    print(json.dumps(said(read)), flush=True)
"""


def ask(root: Path, endpoint: str | None, *wanted):
    """What another process reads, whose hub is there: `datasets` looks for its address once, when it is imported."""
    hub_of = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"} if endpoint else {"HF_HUB_OFFLINE": "1"}
    environment = os.environ | hub_of | {"HF_HOME": str(root / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ], input=json.dumps(wanted), env=environment, capture_output=True, text=True,
        cwd=root, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(*rows):
    pq.write_table(pa.Table.from_pylist(list(rows)), file := io.BytesIO())
    return file.getvalue()


def of_gsm8k(config, split, answer):
    return f"{config}/{split}-00000-of-00001.parquet", parquet({"question": f"{split}?", "answer": f"#### {answer}"})


GSM8K = dict(of_gsm8k(*which) for which in [("main", "train", 1), ("main", "test", 2), ("socratic", "test", 3)]) | {
    "README.md": b"""---
configs:
- config_name: main
  data_files: [{split: train, path: main/train-*}, {split: test, path: main/test-*}]
- config_name: socratic
  data_files: [{split: test, path: socratic/test-*}]
---
"""
}
OLD = {"train.jsonl": jsonl({"question": "1 + 1?", "answer": "2"})}
NEW = {"train.jsonl": jsonl({"question": "1 + 1?", "answer": "two"})}
REPOS = {
    "openai/gsm8k": [GSM8K],
    "HuggingFaceH4/MATH-500": [{"test.jsonl": jsonl({"problem": "1/2?", "answer": "\\frac12", "level": 1})}],
    "owner/sums": [OLD, NEW],
    "owner/lists": [{name: jsonl({"Q": name, "A": ["a", "b"]}) for name in ("train.jsonl", "test.jsonl")}],
    "owner/ragged": [{**OLD, "test.jsonl": jsonl({"Q": "?", "A": ["a", "b"]})}],
}


def test_columns_splits_configurations_and_revisions(tmp_path):
    old = {"path": "owner/sums", "revision": hub.commit(OLD)}
    with hub.serving(REPOS) as endpoint:
        gsm8k, math500, latest, pinned, filled, digest, of_old, none, no_split, no_revision, ragged = ask(
            tmp_path, endpoint,
            ["task", "gsm8k"], ["task", "math500"], ["examples", {"path": "owner/sums"}], ["examples", old],
            ["examples", {"path": "owner/lists", "split": "test", "prompt": "{Q}", "completion": "{A[1]}"}],
            ["digest", {"path": "owner/sums"}], ["digest", old],
            ["examples", {"path": "nobody/nothing"}], ["examples", {"path": "owner/sums", "split": "dev"}],
            ["examples", {"path": "owner/sums", "revision": "v9"}], ["examples", {"path": "owner/ragged"}],
        )  # fmt: skip
    ((prompt, gold, location),) = gsm8k
    assert prompt.startswith("test?\nSolve") and (gold, location) == ("#### 2", "openai/gsm8k[test]:row 1")
    ((prompt, gold, _),) = math500
    assert prompt.startswith("1/2?\n") and gold == "\\frac12"
    assert latest == [["1 + 1?", "two", "owner/sums[train]:row 1"]] and pinned[0][1] == "2"
    assert filled == [["test.jsonl", "b", "owner/lists[test]:row 1"]]
    assert digest != of_old and "Error" not in digest + of_old
    for error, said in ((none, "nobody/nothing"), (no_split, "dev"), (no_revision, "v9"), (ragged, "owner/ragged")):
        assert error.startswith("FileNotFoundError: ") and said in error and "\n" not in error, error


def test_without_a_hub_there_is_what_was_read_before_and_one_line_for_the_rest(tmp_path):
    with hub.serving(REPOS) as endpoint:
        before = ask(tmp_path, endpoint, ["examples", {"path": "owner/sums"}])
    again, other = ask(tmp_path, None, ["examples", {"path": "owner/sums"}], ["task", "math500"])
    assert [again] == before
    assert other.startswith("FileNotFoundError: HuggingFaceH4/MATH-500: no such file, and not to be had from the hub: ")
    assert "\n" not in other and len(other) < 450
