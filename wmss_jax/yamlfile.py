"""YAML files of settings: text and overrides -> nested data; pydantic's complaints about it -> one line each.

    data, origins = read("recipe.yaml", ["optimizer.peak_lr=2e-5"])

Nothing here knows what the settings mean: the models are elsewhere, this is how people write them and are answered.
"""

import copy
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml


class ConfigError(ValueError):
    """Settings that cannot be used; the message has one line per problem."""


# -- from text to nested data -----------------------------------------------------------------------------------------


def read(
    source: str | PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the mapping after the overrides, and {dotted path: who wrote what is there}, for `complaint`.

    Args:
      source: a YAML file, or a mapping as it is.
      overrides: `key.path=value` each, the value in YAML; the last one wins, `key=` sets null.

    Raises:
      ConfigError: a file that cannot be read or is no mapping; overrides that cannot be applied, one a line.
    """
    given = isinstance(source, Mapping)
    data = copy.deepcopy(dict(source)) if given else _read(source)
    origins = {"": "the defaults" if given else str(source)}
    mistakes = []
    for text in overrides:
        try:
            origins[_override(data, text)] = f"override {text!r}"
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return data, origins


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-5 is a number, a date is text, a key given twice is an error."""

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [row for row in rows if row[0] != "tag:yaml.org,2002:timestamp"]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    # Checked where nodes are composed: their construction unfolds the merge key << into duplicates.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in lines:
                problem = f"duplicate key {key.value!r}, first on line {lines[key.tag, key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+|\.\d[\d_]*(?:[eE][-+]?\d+)?)$", re.A),
    list("-+.0123456789"),
)


def _parse(text: str | bytes, where: str) -> Any:
    try:
        data = yaml.load(text, _Loader)
        return json.loads(json.dumps(data))  # aliases become copies, so overrides change one place
    except yaml.MarkedYAMLError as error:
        mark, said = error.problem_mark, filter(None, [error.problem, error.context])
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{at}: {', '.join(said)}") from error
    # Bytes that are no text, a number such as 0x_, an explicit tag, an alias inside its anchor.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


def _read(path: str | PathLike[str]) -> dict[str, Any]:
    try:
        data = _parse(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at the top level, got {show(data)}")
    return data


def _override(data: dict[str, Any], text: str) -> str:
    """Writes the override into data; returns the path of the outermost entry that is new."""
    path, equals, value = text.partition("=")
    parts = path.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {text!r}: expected key.path=value")
    node, new = data, path
    for depth, key in enumerate(parts[:-1], 1):
        here = ".".join(parts[:depth])
        if node.get(key) is None:  # absent, or a section with nothing under it
            node[key] = {}
            new = min(new, here, key=len)
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(f"override {text!r}: {here} is {show(node)}, not a mapping")
    node[parts[-1]] = _parse(value, f"override {text!r}")
    return new


# -- from pydantic's errors to lines ----------------------------------------------------------------------------------

_EXPECTED = {
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
}
_SIGNS = {
    "greater_than": ">",
    "greater_than_equal": ">=",
    "less_than": "<",
    "less_than_equal": "<=",
}


def complaint(error: pydantic.ValidationError, hint: Any, origins: Mapping[str, str]) -> str:
    """Returns one line per problem: who wrote the value, its path, what is wrong; `origins` are those of `read`."""
    lines = []
    for where, message in problems(error, hint):
        around = [path for path in origins if f"{where}.".startswith(f"{path}.") or not path]
        inside = [path for path in origins if path.startswith(f"{where}.")]
        source = " and ".join(origins[path] for path in [max(around, key=len), *inside])
        lines.append(": ".join(filter(None, [source, where, message])))
    return "\n".join(lines)


def problems(error: pydantic.ValidationError, hint: Any) -> list[tuple[str, str]]:
    """Returns the path and the message of each problem; the members of a union speak with one voice.

    Args:
      hint: the type that was validated against, which tells keys from the names of union members.
    """
    said: dict[str, list[str]] = {}
    for entry in error.errors(include_url=False):
        path, valid = _locate(hint, entry["loc"])
        message = _message(entry, valid)
        if not path and (named := re.fullmatch(r"([a-z_.]+): (.+)", message)):
            path, message = named.groups()  # a rule between sections says itself which key it is about
        said.setdefault(path, []).append(message)
    found = []
    for path, messages in said.items():
        # A mapping was meant for the member that takes one; what that one says is enough.
        useful = [message for message in messages if not message.endswith(", got a mapping")]
        if not useful and not any(other.startswith(f"{path}.") for other in said):
            useful = messages
        *others, last = dict.fromkeys(useful) or [""]
        firsts = [message.rpartition(", got ")[0] for message in others]
        text = " or ".join([*firsts, last.removeprefix("expected ") if firsts else last])
        found += [(path, text)] if text else []
    return found


def keys(hint: Any) -> dict[str, Any]:
    """Returns what a pydantic model or a dataclass takes, with the type hints; nothing for other types."""
    if isinstance(hint, type) and issubclass(hint, pydantic.BaseModel):
        return {name: field.annotation for name, field in hint.model_fields.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return {field.name: hints[field.name] for field in dataclasses.fields(hint) if field.init}
    return {}


def unknown(what: str, key: Any, valid: Iterable[str]) -> str:
    """Returns "unknown <what>" with the nearest of the valid keys, or all of them if none is near."""
    near = difflib.get_close_matches(str(key), valid := list(valid), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(valid)}"
    return f"unknown {what}; {hint}"


def show(value: Any) -> str:
    """Returns the value as it would be in the file, on one line."""
    if isinstance(value, Mapping | list | tuple):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _locate(hint: Any, loc: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """The dotted path without the names of union members, and the keys valid at its last part."""
    path, valid = [], {}
    for part in loc:
        if part == "[key]":  # the part before is a key that itself is wrong
            break
        members = _members(hint)
        if len(members) > 1:  # then `part` is a member, not a key
            hint = next((member for member in members if getattr(member, "__name__", "") == part), None)
            continue
        path.append(str(part))
        inner = typing.get_args(members[0])
        if isinstance(part, int):
            hint = next(iter(inner), None)
        elif typing.get_origin(members[0]) is dict:
            hint = inner[1]
        else:
            valid = keys(members[0])
            hint = valid.get(part)
    return ".".join(path), list(valid)


def _members(hint: Any) -> list[Any]:
    """The types that a hint stands for, without aliases, annotations and None."""
    hint = getattr(hint, "__value__", hint)  # `type Schedule = Linear | Cosine`
    if typing.get_origin(hint) is Annotated:
        return _members(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [one for arg in typing.get_args(hint) if arg is not types.NoneType for one in _members(arg)]
    return [hint]


def _message(entry: Any, valid: list[str]) -> str:
    kind, got, context = entry["type"], f", got {show(entry['input'])}", entry.get("ctx", {})
    if kind == "missing":
        return "required key is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown("key", entry["loc"][-1], valid)
    if kind == "value_error":
        return " ".join(str(context["error"]).split())
    if kind in _SIGNS:
        return f"must be {_SIGNS[kind]} {next(iter(context.values())):g}{got}"
    if kind in _EXPECTED or kind == "literal_error":
        return f"expected {_EXPECTED.get(kind) or context['expected']}{got}"
    return entry["msg"][:1].lower() + entry["msg"][1:] + got
