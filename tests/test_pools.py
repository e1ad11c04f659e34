"""wmss data prepare: what each filter keeps, and why it drops the rest."""

import json

import pytest

from wmss_jax import pools
from wmss_jax.sources import SourceConfig


def am(response, **info):
    question = {"role": "user", "content": "2 + 3?", "info": info}
    return {"messages": [question, {"role": "assistant", "content": response, "info": None}]}


def prepared(tmp_path, pool, rows, held_out=(), **settings):
    sources = []
    for name, content in (("rows", rows), ("held", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        sources.append([SourceConfig(path=f"{name}.jsonl")] if content else [])
    out = tmp_path / "pool.jsonl"
    counts = pools.prepare(pool, sources[0], out, held_out=sources[1], root=tmp_path, **settings)
    return dict(counts), [json.loads(line) for line in out.read_text().splitlines()]


BOXED = "<think>two and three</think> <answer>It is \\boxed{5}.</answer>"


def test_am_math(tmp_path):
    rows = [
        am(BOXED, reference_answer="5"),
        am(BOXED, reference_answer="\\frac{10}{2}"),
        am(BOXED, reference_answer="6"),
        am(BOXED),
        am(BOXED, reference_answer=""),
        am("<think>x</think> <answer>It is 5.</answer>", reference_answer="5"),
        am("It is \\boxed{5}.", reference_answer="5"),
        am("<think>x</think> <answer>\\boxed{99999999!}</answer>", reference_answer="5"),
    ]
    counts, kept = prepared(tmp_path, "am-math", rows, deadline_s=1)
    assert counts == {
        "kept": 2, "another answer": 1, "no reference answer": 2, "the comparison hung": 1,
        "no <think>...</think> <answer>...\\boxed{}...</answer>": 2,
    }  # fmt: skip
    assert [row["idx"] for row in kept] == [0, 1]
    assert kept[0]["messages"] == [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": BOXED}]
    assert pools.table(counts).splitlines()[0] == "2 kept"


def test_am_code(tmp_path):
    answer = lambda program: f"<think>so</think>\n<answer>```python\n{program}\n```</answer>"
    double = answer("print(2 * int(input()))")
    stdin = {"inputs": ["1\n", "4\n"], "outputs": ["2\n", "8"]}
    rows = [
        am(double, test_case=json.dumps(stdin)),
        am(double, test_case=stdin | {"outputs": ["2", "9"]}),
        am(answer("def f(x): return [x]"), test_case={"fn_name": "f", "inputs": [[1]], "outputs": [[1]]}),
        am(answer("def f(x): return x"), test_case="assert f(1) == 1"),
        am(answer("def f(x): return x"), test_case=["assert f(1) == 1", "assert f(2) == 3"]),
        am(answer("import os; os._exit(0)"), test_case="assert f(1) == 1"),
        am(double),
        am(double, test_case={"files": 3}),
        am("print(2)", test_case=stdin),
    ]
    counts, kept = prepared(tmp_path, "am-code", rows, unsafe_no_sandbox=True)
    assert counts == {
        "kept": 3, "the program fails its tests": 3, "no tests": 1, "tests of an unknown form": 1,
        "no <think>...</think> <answer>...</answer>": 1,
    }  # fmt: skip
    assert kept[0]["messages"][1]["content"] == double


def test_logic(tmp_path):
    logiqa = {"text": "T", "question": "Which?", "options": ["a", "b", "c", "d"], "answer": 1}
    reclor = {"context": "C", "question": "Which?", "answers": ["a", "b", "c", "d"], "label": 2}
    rows = [
        logiqa | {"generation": "<think>A?</think> The answer is (B)."},
        reclor | {"generation": "The answer is (C)."},
        logiqa | {"text": "other", "generation": "The answer is (D)."},
        logiqa | {"text": "third"},
        logiqa | {"text": "Held  OUT", "generation": "The answer is (B)."},
    ]
    counts, kept = prepared(tmp_path, "logic", rows, [logiqa | {"text": "held out"}])
    assert counts == {"kept": 2, "another answer": 1, "no generation": 1, "held out": 1}
    assert kept[1]["messages"][0]["content"].startswith("C\nWhich?\nA. a\n")


def test_mistakes(tmp_path):
    (tmp_path / "pool.jsonl").write_text("")
    with pytest.raises(FileExistsError, match="exists already"):
        pools.prepare("am-math", [SourceConfig(path="rows.jsonl")], tmp_path / "pool.jsonl")
    (tmp_path / "pool.jsonl").unlink()
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: messages"):
        prepared(tmp_path, "am-math", [{"text": "x"}])
    assert not (tmp_path / "pool.jsonl").exists()
