"""Rows of files and hub data sets, and the examples made of them.

    for example in examples.read(source, root="data"):
        example.prompt, example.completion, example.location      # "2 + 3?", "5", "data/train.jsonl:1"

A source is any object with `path` and, where needed, `split, messages, text, prompt, completion, answer, remove, limit`
(see `sources.SourceConfig`). Every error is one line that begins with the place: FILE:LINE of a JSONL file, else
FILE:row N, both counted from 1.
"""

import difflib
import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import string
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")
_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*", re.ASCII)


class Row(NamedTuple):
    """One row as it lies in the file: its columns, its number from 1 (JSONL: its line), and both as one location."""

    columns: Mapping[str, Any]
    number: int
    location: str


class Example(NamedTuple):
    """One example: a chat, or a prompt with its completion, or a bare text; what it is not is None.

    `messages` are dicts with `role` and `content`, and whatever else the chat template understands. Only assistant
    messages from index `trained_from` on are answers; the earlier ones belong to the prompt.
    """

    number: int
    location: str
    messages: tuple[dict[str, Any], ...] | None = None
    trained_from: int = 0
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


class Problem(NamedTuple):
    """A prompt to be answered, and what a grader compares the answer with."""

    prompt: str
    answer: str
    location: str


def read(source: Any, root: str | os.PathLike) -> Iterator[Example]:
    """Give the examples of a source, in order. Raises what `rows` and `example` raise."""
    return (example(row, source) for row in rows(source, root))


def problems(source: Any, root: str | os.PathLike) -> Iterator[Problem]:
    """Give prompt and reference answer of every row: by the templates `prompt` and `answer`, else question and answer.

    The prompt is the same text that `example` makes of such a row, so that training and evaluation cannot disagree.
    """
    if (_given(source, "prompt") is None) != (_given(source, "answer") is None):
        raise ValueError(f"{source.path}: problems need the templates prompt and answer, or neither")
    prompt = _given(source, "prompt") or "{question}"
    answer = _given(source, "answer") or "{answer}"
    for row in rows(source, root):
        yield Problem(fill(prompt, row), fill(answer, row), row.location)


def example(row: Row, source: Any) -> Example:
    """Return the example that a row is.

    The source's templates decide, or else the first of these that the row has: `messages`, `prompt` and `completion`
    (texts, or lists of messages), `question` and `answer`, `text`.

        source.prompt, completion    columns                                      prompt, completion
        -                            question "2 + 3?", answer "5"                "2 + 3?", "5"
        "{Body} {Q}", "{eqs[0]}"     Body "I had 2.", Q "And 3?", eqs ["2+3"]     "I had 2. And 3?", "2+3"

    Raises:
        ValueError: a column is missing, null or of the wrong type; an answer is empty; a message has no known role.
    """
    place = {"number": row.number, "location": row.location}
    if (column := _given(source, "messages")) is not None:
        return Example(**place, **_chat(_column(row, column), (), row))
    if (template := _given(source, "text")) is not None:
        return Example(**place, text=_filled_text(fill(template, row), "text", row))
    if (template := _given(source, "prompt")) is not None:
        if (completion := _given(source, "completion")) is None:
            raise ValueError(f"{row.location}: the source has a prompt but no completion, so nothing can be trained")
        prompt = fill(template, row)
        return Example(**place, prompt=prompt, completion=_filled_text(fill(completion, row), "completion", row))
    return Example(**place, **_detected(row))


def fill(template: str, row: Row) -> str:
    """Return a `str.format` template over the row's columns: "{Body} {Question}", "{lEquations[0]}", "{x:.2f}".

    Raises:
        ValueError: a column, or the element of it, is missing or null.
    """
    for _, field, _, _ in string.Formatter().parse(template):
        if field is None:
            continue
        column = re.split(r"[.\[]", field, maxsplit=1)[0]
        _column(row, column)
        try:
            value, _ = string.Formatter().get_field(field, (), row.columns)
        except (LookupError, AttributeError, TypeError) as error:
            said = _short(row.columns[column])
            raise ValueError(f"{row.location}: {{{field}}} does not exist: {column} is {said}") from error
        if value is None:
            raise ValueError(f"{row.location}: {{{field}}} is null; fill it in, or remove the row")
    try:
        return template.format_map(row.columns)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{row.location}: template {template!r} does not fit this row: {error}") from error


def rows(source: Any, root: str | os.PathLike) -> Iterator[Row]:
    """Give the rows of a source, in order, at most `source.limit` of them.

    Args:
        root: directory at which a relative path starts.

    Raises:
        FileNotFoundError: no such file, or the hub has no such data set.
        ValueError: a row that cannot be read, with its line; not a single row; the extra "data" is not installed.
    """
    place, prefix = _place(source, root), location_prefix(source, root)
    numbered = _hub_rows(place, source) if isinstance(place, str) else _file_rows(place)
    count, remove = 0, _given(source, "remove") or ()
    for number, columns in itertools.islice(numbered, _given(source, "limit")):
        if not isinstance(columns, Mapping):
            raise ValueError(f"{prefix}{number}: expected an object with columns, got {_short(columns)}")
        count += 1
        yield Row(_without(columns, remove), number, f"{prefix}{number}")
    if not count:
        raise ValueError(f"{place}: the data set is empty; give it at least one row")


def _without(value: Any, remove: Sequence[str]) -> Any:
    """Return what a column holds with those texts taken out of its strings."""
    if isinstance(value, str):
        return functools.reduce(lambda text, gone: text.replace(gone, ""), remove, value)
    if isinstance(value, Mapping):
        return {key: _without(inner, remove) for key, inner in value.items()} if remove else value
    return [_without(inner, remove) for inner in value] if remove and isinstance(value, list) else value


def location_prefix(source: Any, root: str | os.PathLike) -> str:
    """Return what stands before a row's number in its location: "train.jsonl:", "train.parquet:row "."""
    place = _place(source, root)
    if isinstance(place, str):
        return f"{place}[{_split(source)}]:row "
    return f"{place}:" if place.name.endswith((".jsonl", ".jsonl.gz")) else f"{place}:row "


def digest(source: Any, root: str | os.PathLike) -> str:
    """Return a digest of the source's bytes (of a hub data set: its name for this revision and split)."""
    place = _place(source, root)
    if isinstance(place, str):
        return _hub_dataset(place, source)._fingerprint
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- from files to rows -----------------------------------------------------------------------------------------------


def _given(source: Any, name: str) -> Any:
    return getattr(source, name, None)


def _split(source: Any) -> str:
    return _given(source, "split") or "train"


def _place(source: Any, root: str | os.PathLike) -> Path | str:
    """The file, or else the hub id."""
    file = Path(root) / source.path
    if file.is_file():
        if not file.name.endswith(_ENDINGS):
            raise ValueError(f"{file}: unknown kind of file; known: {', '.join(_ENDINGS)}")
        for name in ("split", "revision"):
            if (value := _given(source, name)) is not None:
                raise ValueError(f"{file}: {name} {value!r} is given, but only hub data sets have {name}s")
        return file
    if file.exists() or source.path.endswith(_ENDINGS) or not _HUB_ID.fullmatch(source.path):
        raise FileNotFoundError(f"{file}: no such file, and not a hub id (owner/name)")
    return source.path


def _file_rows(file: Path) -> Iterator[tuple[int, Any]]:
    if file.name.endswith(".parquet"):
        return _parquet_rows(file)
    return _jsonl_rows(file) if file.name.endswith((".jsonl", ".jsonl.gz")) else _json_rows(file)


def _open(file: Path) -> Any:
    return gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb")


def _jsonl_rows(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parsed(line.rstrip(b"\r\n"), file, number)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: damaged gzip file: {error}") from error


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with _open(file) as whole:
            data = _parsed(whole.read(), file, 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: damaged gzip file: {error}") from error
    if not isinstance(data, list):
        raise ValueError(f"{file}: expected a list of objects, got {_short(data)}; one object a line is .jsonl")
    yield from enumerate(data, 1)


def _parsed(data: bytes, file: Path, first_line: int) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise ValueError(f"{file}:{line}: not UTF-8 (byte {data[error.start]:#04x}); convert the file") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{file}:{line}: not valid JSON: {error.msg} at column {error.colno}") from error


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError('Parquet files and hub data sets need an extra: pip install "wmss-jax[data]"') from error
    return datasets


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    datasets = _datasets()
    try:  # streamed: straight from the file, without a copy of it in the hub's cache
        stream = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        yield from enumerate(stream, 1)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{file}: not a readable Parquet file: {' '.join(str(error).split())}") from error


def _hub_rows(name: str, source: Any) -> Iterator[tuple[int, Any]]:
    return enumerate(_hub_dataset(name, source), 1)


def _which(source: Any) -> dict[str, str]:
    """Return what of a hub data set is asked for besides its split, by the names that `datasets` has for it."""
    wanted = {"name": _given(source, "subset"), "revision": _given(source, "revision")}
    return {name: value for name, value in wanted.items() if value is not None}


def _hub_dataset(name: str, source: Any) -> Any:
    datasets = _datasets()
    try:
        return datasets.load_dataset(name, split=_split(source), **_which(source))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # Unknown, offline; of several configurations or without that split; with rows that do not fit together.
        reason = " ".join(str(error.__cause__ or error).split())
        raise FileNotFoundError(f"{name}: no such file, and not to be had from the hub: {reason[:300]}") from error


# -- from rows to examples --------------------------------------------------------------------------------------------


def _detected(row: Row) -> dict[str, Any]:
    columns = row.columns
    if "messages" in columns:
        return _chat(_column(row, "messages"), (), row)
    if "prompt" in columns and "completion" in columns:
        prompt, completion = _column(row, "prompt"), _column(row, "completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            return _chat(completion, prompt, row)
        return {"prompt": _text(row, "prompt"), "completion": _filled_text(_text(row, "completion"), "completion", row)}
    if "question" in columns and "answer" in columns:
        return {"prompt": _text(row, "question"), "completion": _filled_text(_text(row, "answer"), "answer", row)}
    if "text" in columns:
        return {"text": _filled_text(_text(row, "text"), "text", row)}
    raise ValueError(
        f"{row.location}: no messages, prompt and completion, question and answer, or text among the columns "
        f"{_listed(columns)}; say in the source what to make of them, as in prompt: '{{column}}'"
    )


def _chat(answers: Any, prompt: Sequence[Any], row: Row) -> dict[str, Any]:
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"{row.location}: expected a list of messages, got {_short(answers)}")
    messages = tuple(_message(message, number, row) for number, message in enumerate([*prompt, *answers], 1))
    trained = [(number, m) for number, m in enumerate(messages, 1) if number > len(prompt) and m["role"] == "assistant"]
    if not trained:
        raise ValueError(f"{row.location}: no message of the assistant, so there is nothing to train on")
    for number, message in trained:
        if not message.get("tool_calls"):
            _filled_text(message["content"], f"the answer in message {number}", row)
    return {"messages": messages, "trained_from": len(prompt)}


def _message(message: Any, number: int, row: Row) -> dict[str, Any]:
    where = f"{row.location}: message {number}"
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"{where}: expected an object with role and content, got {_short(message)}")
    kept = {key: value for key, value in message.items() if value is not None}  # Parquet fills columns up with nulls
    role, known = kept.get("role"), f"known: {_listed(ROLES)}"
    if role not in ROLES:
        raise ValueError(f"{where} has the unknown role {role!r}; {_nearest(str(role), ROLES) or known}")
    content = kept.setdefault("content", "" if kept.get("tool_calls") else None)
    if not isinstance(content, str):
        raise ValueError(f"{where}: content must be text, got {_short(content)}")
    return kept


def _column(row: Row, column: str) -> Any:
    if column not in row.columns:
        near = _nearest(column, row.columns)
        listed = f"columns: {_listed(row.columns)}" + (f"; {near}" if near else "")
        raise ValueError(f"{row.location}: no column {column!r} ({listed})")
    return row.columns[column]


def _text(row: Row, column: str) -> str:
    value = row.columns[column]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{row.location}: {column} must be text, got {_short(value)}")


def _filled_text(text: str, what: str, row: Row) -> str:
    if not text.strip():
        raise ValueError(f"{row.location}: {what} is empty; fill it in, or remove the row")
    return text


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "(none)"


def _short(value: Any) -> str:
    if isinstance(value, list | Mapping) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
