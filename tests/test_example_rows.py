"""Rows of files, and the examples made of them. Run: pytest tests/test_example_rows.py"""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from wmss_jax import examples
from wmss_jax.examples import Example


def source(path, **given):
    return SimpleNamespace(path=path, **given)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def read(root, path, **given):
    return list(examples.read(source(path, **given), root))


def test_texts_are_taken_out_of_every_column(tmp_path):
    name = write(tmp_path / "a.jsonl", {"question": "<q>1</q>?", "answer": ["<q>", 2, {"<q>": "x<q>y</q>"}]})
    given = source(name, prompt="{question}", completion="{answer[2]}", remove=("<q>", "</q>"))
    (row,) = examples.rows(given, tmp_path)
    assert row.columns == {"question": "1?", "answer": ["", 2, {"<q>": "xy"}]}
    (bare,) = examples.rows(source(name), tmp_path)
    assert bare.columns["question"] == "<q>1</q>?"


USER, ASSISTANT = {"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"question": "1?", "answer": "2"}, {"prompt": "1?", "completion": "2"}),
        ({"question": "1?", "answer": 2}, {"prompt": "1?", "completion": "2"}),
        ({"prompt": " 1? ", "completion": " 2\n", "text": "x"}, {"prompt": " 1? ", "completion": " 2\n"}),
        ({"text": "all", "id": 3}, {"text": "all"}),
        ({"messages": [USER, ASSISTANT], "prompt": "x"}, {"messages": (USER, ASSISTANT)}),
        ({"messages": [USER, ASSISTANT | {"tool_calls": None}]}, {"messages": (USER, ASSISTANT)}),
        (
            {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
            {"messages": (USER, ASSISTANT, USER, ASSISTANT), "trained_from": 3},
        ),
    ],
)
def test_kinds_are_told_by_the_columns(tmp_path, columns, expected):
    path = write(tmp_path / "rows.jsonl", columns)
    assert read(tmp_path, path) == [Example(1, f"{tmp_path}/rows.jsonl:1", **expected)]


def test_templates(tmp_path):
    row = {
        "Body": "I had 2.",
        "Question": "And 3?",
        "lEquations": ["2+3", "x"],
        "n": {"v": 1.5},
        "chat": [USER, ASSISTANT],
    }
    path = write(tmp_path / "rows.jsonl", row)
    (example,) = read(tmp_path, path, prompt="{Body} {Question}", completion="{lEquations[0]} = {n[v]:.2f} {{}}")
    assert (example.prompt, example.completion) == ("I had 2. And 3?", "2+3 = 1.50 {}")
    assert read(tmp_path, path, text="{Body}!")[0].text == "I had 2.!"
    assert read(tmp_path, path, messages="chat")[0].messages == (USER, ASSISTANT)


def test_a_tool_call_needs_no_content(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"name": "add"}]}
    path = write(tmp_path / "rows.jsonl", {"messages": [USER, call]})
    assert read(tmp_path, path)[0].messages[1] == call | {"content": ""}


def test_all_files_give_the_same_rows(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"é{i}"} for i in range(3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))  # as some editors save it
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "e.parquet")
    for path, location in (
        ("a.jsonl", "a.jsonl:2"), ("b.jsonl.gz", "b.jsonl.gz:2"), ("c.json", "c.json:row 2"),
        ("d.json.gz", "d.json.gz:row 2"), ("e.parquet", "e.parquet:row 2"),
    ):  # fmt: skip
        read_rows = list(examples.rows(source(path), tmp_path))
        assert [dict(row.columns) for row in read_rows] == rows
        assert read_rows[1].location == f"{tmp_path}/{location}"
        assert len(read(tmp_path, path, limit=2)) == 2


def test_blank_lines_count_but_are_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text('\n{"text": "a"}\n  \n{"text": "b"}')
    assert [example.number for example in read(tmp_path, "rows.jsonl")] == [2, 4]


def test_parquet_chats(tmp_path):
    """Columns that only some messages have come back as nulls."""
    datasets = pytest.importorskip("datasets")
    chats = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT | {"reasoning_content": "hm"}]}]
    datasets.Dataset.from_list(chats).to_parquet(tmp_path / "chats.parquet")
    first, second = read(tmp_path, "chats.parquet")
    assert first.messages == (USER, ASSISTANT) and second.messages[1]["reasoning_content"] == "hm"


def test_hub_ids_go_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [e.location for e in read(tmp_path, "owner/set-1.5")] == [f"owner/set-1.5[train]:row {n}" for n in (1, 2)]
    read(tmp_path, "owner/set", split="test")
    assert asked == [("owner/set-1.5", "train"), ("owner/set", "test")]
    one = examples.digest(source("owner/set"), tmp_path)
    assert one == examples.digest(source("owner/set"), tmp_path)

    def unknown(name, split):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' doesn't\nexist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(FileNotFoundError, match=r"^owner/set: no such file, .* hub: Dataset 'owner/set' doesn't exist"):
        read(tmp_path, "owner/set")


def test_problems_have_the_prompts_of_training(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "1?", "answer": 2, "n": ["3"]})
    training = read(tmp_path, path)[0]
    assert list(examples.problems(source(path), tmp_path)) == [(training.prompt, "2", training.location)]
    templates = {"prompt": "Q: {question}", "answer": "{n[0]}"}
    assert next(examples.problems(source(path, **templates), tmp_path))[:2] == ("Q: 1?", "3")
    with pytest.raises(ValueError, match=r"rows.jsonl: problems need the templates prompt and answer, or neither"):
        next(examples.problems(source(path, prompt="{question}"), tmp_path))


# -- mistakes: one line, with the place and the fix -------------------------------------------------------------------


def error_of(root, path, kind=ValueError, **given):
    with pytest.raises(kind) as error:
        read(root, path, **given)
    message = str(error.value)
    assert "\n" not in message
    return message.replace(f"{root}/", "")


GOOD = '{"question": "1?", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "1?", "answer": }\n', "not valid JSON: Expecting value at column 30"),
        ('{"question": "1?"', "not valid JSON: Expecting ',' delimiter at column 18"),
        ('["1?", "2"]\n', 'expected an object with columns, got ["1?", "2"]'),
        (b'{"question": "\xe9"}\n', "not UTF-8 (byte 0xe9); convert the file"),
        ('{"question": "1?", "answer": " \\n"}\n', "answer is empty; fill it in, or remove the row"),
        ('{"question": "1?", "answer": null}\n', "answer must be text, got null"),
        ('{"question": ["1?"], "answer": "2"}\n', 'question must be text, got ["1?"]'),
        ('{"prompt": "1?", "completion": ""}\n', "completion is empty; fill it in, or remove the row"),
        ('{"text": ""}\n', "text is empty; fill it in, or remove the row"),
        (
            '{"question": "1?", "anwser": "2"}\n',
            "no messages, prompt and completion, question and answer, or text among the columns question, anwser; say "
            "in the source what to make of them, as in prompt: '{column}'",
        ),
        ('{"messages": "hi"}\n', 'expected a list of messages, got "hi"'),
        ('{"messages": []}\n', "expected a list of messages, got an empty list"),
        ('{"messages": ["hi"]}\n', 'message 1: expected an object with role and content, got "hi"'),
        (
            '{"messages": [{"role": "user", "content": "1?"}, {"role": "asistant", "content": "2"}]}\n',
            "message 2 has the unknown role 'asistant'; did you mean 'assistant'?",
        ),
        (
            '{"messages": [{"role": "gpt", "content": "2"}]}\n',
            "message 1 has the unknown role 'gpt'; known: system, user, assistant, tool",
        ),
        ('{"messages": [{"role": "user", "content": ["1?"]}]}\n', 'message 1: content must be text, got ["1?"]'),
        (
            '{"messages": [{"role": "user", "content": "1?"}]}\n',
            "no message of the assistant, so there is nothing to train on",
        ),
        (
            '{"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": ""}]}\n',
            "the answer in message 2 is empty; fill it in, or remove the row",
        ),
        ('{"messages": [{"role": "assistant"}]}\n', "message 1: content must be text, got null"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    line = line.encode() if isinstance(line, str) else line
    (tmp_path / "rows.jsonl").write_bytes(GOOD.encode() + b"\n" + line)
    said = error_of(tmp_path, "rows.jsonl")
    place, _, rest = said.partition(": ")
    assert (place, rest) == ("rows.jsonl:3", message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"prompt": "{Quesion}", "completion": "{A}"},
            "no column 'Quesion' (columns: Question, A, eqs, nothing; did you mean 'Question'?)",
        ),
        ({"text": "{zzz}"}, "no column 'zzz' (columns: Question, A, eqs, nothing)"),
        ({"messages": "chat"}, "no column 'chat' (columns: Question, A, eqs, nothing)"),
        ({"text": "{eqs[0]}"}, "{eqs[0]} does not exist: eqs is an empty list"),
        ({"text": "{eqs[x]}"}, "{eqs[x]} does not exist: eqs is an empty list"),
        ({"text": "{nothing}"}, "{nothing} is null; fill it in, or remove the row"),
        ({"text": "{Question:.2f}"}, "template '{Question:.2f}' does not fit this row: Unknown format code 'f' for "
                                     "object of type 'str'"),
        ({"prompt": "{Question}", "completion": "{A}"}, "completion is empty; fill it in, or remove the row"),
        ({"prompt": "{Question}"}, "the source has a prompt but no completion, so nothing can be trained"),
    ],
)  # fmt: skip
def test_bad_templates(tmp_path, given, message):
    path = write(tmp_path / "rows.jsonl", {"Question": "1?", "A": " ", "eqs": [], "nothing": None})
    assert error_of(tmp_path, path, **given) == f"rows.jsonl:1: {message}"


def test_bad_files(tmp_path):
    (tmp_path / "list.json").write_text('{"a": 1}')
    (tmp_path / "cut.json").write_text('[\n{"text": "a"},\n{"text"}]')
    (tmp_path / "item.json").write_text('[{"text": "a"}, 3]')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"nope")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 1000)[:-20])
    (tmp_path / "bad.parquet").write_bytes(b"nope")
    (tmp_path / "fine.jsonl").write_text(GOOD)
    empty = "the data set is empty; give it at least one row"
    assert error_of(tmp_path, "list.json") == (
        'list.json: expected a list of objects, got {"a": 1}; one object a line is .jsonl'
    )
    assert error_of(tmp_path, "cut.json") == "cut.json:3: not valid JSON: Expecting ':' delimiter at column 8"
    assert error_of(tmp_path, "item.json") == "item.json:row 2: expected an object with columns, got 3"
    assert error_of(tmp_path, "empty.jsonl") == f"empty.jsonl: {empty}"
    assert error_of(tmp_path, "empty.json") == f"empty.json: {empty}"
    assert error_of(tmp_path, "rows.csv") == (
        "rows.csv: unknown kind of file; known: .jsonl, .jsonl.gz, .json, .json.gz, .parquet"
    )
    for path in ("bad.jsonl.gz", "cut.jsonl.gz"):
        assert error_of(tmp_path, path).startswith(f"{path}: damaged gzip file: ")
    assert error_of(tmp_path, "fine.jsonl", split="test").startswith("fine.jsonl: split 'test' is given, but only hub")
    for path in ("owner/none.jsonl", "none", "../none/there", "a/b/c"):
        said = error_of(tmp_path, path, FileNotFoundError)
        assert said == f"{path}: no such file, and not a hub id (owner/name)"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_bad_parquet(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "bad.parquet").write_bytes(b"nope")
    assert error_of(tmp_path, "bad.parquet").startswith("bad.parquet: not a readable Parquet file: ")


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.parquet").write_bytes(b"x")
    for path in ("rows.parquet", "owner/set"):
        assert error_of(tmp_path, path) == (
            'Parquet files and hub data sets need an extra: pip install "wmss-jax[data]"'
        )
