"""yamlfile.py: YAML and overrides as people write them, and mistakes answered in one line each."""

import json
from typing import Annotated, Literal

import annotated_types
import pydantic
import pytest
from pydantic import AfterValidator

from wmss_jax.yamlfile import ConfigError, complaint, read


class Strict(pydantic.BaseModel, strict=True, extra="forbid"):
    pass


def known(name: str) -> str:
    if not name.islower():
        raise ValueError("not a name")
    return name


class Task(Strict):
    size: int
    limit: Annotated[float, annotated_types.Ge(0)] | Literal["none"] = "none"
    parent: "str | Task | None" = None


class Loop(Strict):
    epochs: Annotated[int, annotated_types.Gt(0)] = 1
    rate: float = 0.5


class Suite(Strict):
    tasks: tuple[Annotated[Task, "some annotation"], ...] = ()
    named: dict[Annotated[str, AfterValidator(known)], Task] = {}
    loop: Loop = Loop()
    optimizer: Loop = Loop()
    name: str = "x"

    @pydantic.model_validator(mode="after")
    def _agree(self):
        if self.loop.epochs > self.optimizer.epochs:
            raise ValueError("loop.epochs: more than optimizer.epochs")
        return self


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path."""

    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return path

    return write


def said(path, overrides=()):
    """What `read`, or else the model, has to say about a file."""
    try:
        data, origins = read(path, overrides)
        Suite.model_validate_json(json.dumps(data))
    except ConfigError as error:
        return str(error).replace(str(path), "FILE")
    except pydantic.ValidationError as error:
        return complaint(error, Suite, origins).replace(str(path), "FILE")
    return ""


# -- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        *[(text, float(text)) for text in ("1e-5", "1E3", "2e+3", "-2.5e-1", "1.5e3", "+1e5")],
        *[(text, float(text)) for text in (".5", "-.5", ".5e1", "1.e3", "1.5", "1_0e2")],
        ("12", 12),
        ("0x1e5", 0x1E5),
        *[(text, text) for text in ("1e", "e5", "1e5a", "v1", "1.2.3", "2026-01-31")],
        ("'1e5'", "1e5"),
    ],
)
def test_numbers(write, text, value):
    for data in (read(write(f"a: {{x: {text}}}"))[0], read(write("{}"), [f"a.x={text}"])[0]):
        assert data == {"a": {"x": value}} and type(data["a"]["x"]) is type(value)


@pytest.mark.parametrize(
    "text, line",
    [
        ("work_dir: [1, 2", "FILE:1:16: expected ',' or ']', but got '<stream end>', "),
        ("a: 1\nb: c: d\n", "FILE:2:5: mapping values are not allowed here"),
        ("a: 1\nb: 2\na: 3\n", "FILE:3:1: duplicate key 'a', first on line 1"),
        ("t: {x: 1,\n    x: 1}\n", "FILE:2:5: duplicate key 'x', first on line 1"),
        ("a: 1\n---\na: 2\n", "FILE:2:1: but found another document, "),
        ("a: !!python/name:os.system\n", "FILE:1:4: could not determine a constructor"),
        ("a: 0x_\n", "FILE: invalid literal for int() with base 16: ''"),
        ("a: &a [*a]\n", "FILE: Circular reference detected"),
        ("a: !!binary aGk=\n", "FILE: Object of type bytes is not JSON serializable"),
        ("a: \x00\n", "FILE: unacceptable character #x0000: special characters are not allowed"),
        ("- a\n", "FILE: expected a mapping at the top level, got a list"),
        ("", "FILE: expected a mapping at the top level, got null"),
    ],
)
def test_text_that_is_no_mapping(write, text, line):
    message = said(write(text))
    assert message.startswith(line) and "\n" not in message


def test_merge_keys_are_no_duplicates_and_aliases_are_copies(write):
    path = write("a: &x {k: 1, l: 2}\nb: *x\nc: {<<: *x, k: 3}\n")
    data, origins = read(path, ["a.k=4"])
    assert data == {"a": {"k": 4, "l": 2}, "b": {"k": 1, "l": 2}, "c": {"k": 3, "l": 2}}
    assert origins == {"": str(path), "a.k": "override 'a.k=4'"}


def test_files_that_cannot_be_read(tmp_path):
    assert said(tmp_path / "none.yaml") == "FILE: No such file or directory"
    assert said(tmp_path) == "FILE: Is a directory"


# -- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_the_last_wins(write):
    path = write({"loop": {"rate": 0.1, "clip": 1.0}, "mesh": None, "objective": {"name": "a", "lam": 1}})
    overrides = ["loop.rate=2e-5", "loop.rate=3e-5", "loop.clip=", "mesh.tensor=4", "new.a.b=true"]
    data, _ = read(path, [*overrides, "objective={name: other, schedule: [1, a=b]}"])
    assert data == {
        "loop": {"rate": 3e-5, "clip": None},
        "mesh": {"tensor": 4},
        "new": {"a": {"b": True}},
        "objective": {"name": "other", "schedule": [1, "a=b"]},
    }


@pytest.mark.parametrize(
    "overrides, lines",
    [
        (["rounds"], ["override 'rounds': expected key.path=value"]),
        (["a..b=1"], ["override 'a..b=1': expected key.path=value"]),
        (["a", "=2"], [f"override '{bad}': expected key.path=value" for bad in ("a", "=2")]),
        (["rounds={"], ["override 'rounds={':1:2: "]),
        (["name.x=1"], ["override 'name.x=1': name is 'x', not a mapping"]),
        (["tasks.0=1"], ["override 'tasks.0=1': tasks is a list, not a mapping"]),
        (["loop.epochs=x"], ["override 'loop.epochs=x': loop.epochs: expected a whole number, got 'x'"]),
        (["loop.epochs=x", "loop.epochs=-1"], ["override 'loop.epochs=-1': loop.epochs: must be > 0, got -1"]),
        (
            ["optimzer.epochs=1"],
            ["override 'optimzer.epochs=1': optimzer: unknown key; did you mean 'optimizer'?"],
        ),
        (
            ["optimizer={rate: a}", "loop.rate=b", "optimizer.epochs=0"],
            [
                "FILE: tasks.0.size: expected a whole number, got 'x'",
                "override 'loop.rate=b': loop.rate: expected a number, got 'b'",
                "override 'optimizer.epochs=0': optimizer.epochs: must be > 0, got 0",
                "override 'optimizer={rate: a}': optimizer.rate: expected a number, got 'a'",
            ],
        ),
    ],
)
def test_a_mistake_in_an_override_names_the_override(write, overrides, lines):
    path = write({"name": "x", "tasks": [{"size": "x"}] if len(overrides) > 2 else []})
    found = said(path, overrides).splitlines()
    assert len(found) == len(lines)
    assert all(map(str.startswith, found, lines))


def test_a_section_that_disagrees_with_itself_names_all_who_wrote_it(write):
    class Pair(Strict):
        a: int
        b: int

        @pydantic.model_validator(mode="after")
        def _equal(self):
            if self.a != self.b:
                raise ValueError("a and b\nmust be equal")
            return self

    schema = pydantic.create_model("Whole", pair=(Pair, ...))
    data, origins = read(write({"pair": {"a": 1, "b": 1}}), ["pair.b=2"])
    with pytest.raises(pydantic.ValidationError) as caught:
        schema.model_validate_json(json.dumps(data))
    message = complaint(caught.value, schema, origins)
    assert message.endswith("settings.yaml and override 'pair.b=2': pair: a and b must be equal")


# -- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"tasks": [{"size": 1}, {"size": "x"}]}, "tasks.1.size: expected a whole number, got 'x'"),
        ({"tasks": [{"size": 1}, {"size": 1, "sizes": 2}]}, "tasks.1.sizes: unknown key; did you mean 'size'?"),
        ({"tasks": [{}]}, "tasks.0.size: required key is missing"),
        ({"tasks": [3]}, "tasks.0: expected a mapping, got 3"),
        ({"tasks": {}}, "tasks: expected a list, got a mapping"),
        ({"tasks": [{"size": 1, "limit": "no"}]}, "tasks.0.limit: expected a number or 'none', got 'no'"),
        ({"tasks": [{"size": 1, "limit": {}}]}, "tasks.0.limit: expected a number or 'none', got a mapping"),
        ({"tasks": [{"size": 1, "limit": -1}]}, "tasks.0.limit: must be >= 0 or 'none', got -1"),
        ({"tasks": [{"size": 1, "parent": 3}]}, "tasks.0.parent: expected a string or a mapping, got 3"),
        ({"tasks": [{"size": 1, "parent": {"size": ""}}]}, "tasks.0.parent.size: expected a whole number, got ''"),
        ({"named": []}, "named: expected a mapping, got a list"),
        ({"named": {"a": {"size": 1, "sizes": 1}}}, "named.a.sizes: unknown key; did you mean 'size'?"),
        ({"named": {"a": {"size": 1, "zz": 1}}}, "named.a.zz: unknown key; valid: size, limit, parent"),
        ({"named": {"A": {"size": 1}}}, "named.A: not a name"),
        ({"loop": {"rate": True}}, "loop.rate: expected a number, got true"),
        ({"loop": {"rate": None}}, "loop.rate: expected a number, got null"),
        ({"loop": {"rate": [1.0]}}, "loop.rate: expected a number, got a list"),
        ({"loop": {"epochs": 1.0}}, "loop.epochs: expected a whole number, got 1.0"),
        ({"loop": {"epochs": 2}}, "loop.epochs: more than optimizer.epochs"),
    ],
)
def test_a_mistake_is_one_line_with_its_path(write, settings, line):
    assert said(write(settings)) == f"FILE: {line}"


def test_a_rule_between_sections_is_charged_to_the_override_of_the_key_it_names(write):
    line = "override 'loop.epochs=3': loop.epochs: more than optimizer.epochs"
    assert said(write({}), ["optimizer.epochs=2", "loop.epochs=3"]) == line


def test_a_long_value_or_one_with_line_breaks_stays_on_one_short_line(write):
    (line,) = said(write({"loop": {"epochs": "a\nb" * 100}})).splitlines()
    assert len(line) < 120
