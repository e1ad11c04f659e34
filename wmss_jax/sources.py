"""Where examples come from: the parts of a recipe that name files or data sets, and make text of their rows."""

import re
import string
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PositiveInt

Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """What every section of a recipe is: frozen, strict, without unknown keys."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # `seed: true` and `seed: "42"` are mistakes; 1 is accepted for 1.0
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


_COLUMN = re.compile(r"(?!\d+(?:\[|$))[^.\[\]]+(?:\[[^\[\]]+\])*")


def _template(text: str) -> str:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise ValueError(f"{text!r} is no template: {error}; a brace of the text is written twice") from error
    wrong = [field for field in fields if not _COLUMN.fullmatch(field)]
    if wrong:
        raise ValueError(f"{{{wrong[0]}}} is no column: write {{column}}, {{column[0]}} or {{column[key]}}")
    if not fields:
        raise ValueError(f"{text!r} is the same for every row; a column's value is written {{column}}")
    return text


def _listed(given: Any) -> Any:
    """What stands alone as a tuple of one, and a list as a tuple."""
    if isinstance(given, list):
        return tuple(given)
    return (given,) if isinstance(given, str | Mapping | SourceConfig) else given


Template = Annotated[str, AfterValidator(_template)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_listed, json_schema_input_type=Text | list[Text])]


class SourceConfig(Section):
    """Rows of a file or a hub data set, and how text is made of them; a plain string is its path.

    Without `messages`, `text` and `prompt` the rows' own columns decide: messages, prompt and completion, question and
    answer, or text. Templates are Python's format strings over columns: "{Body} {Question}", "{lEquations[0]}".
    """

    path: Text
    """JSONL file, JSON file with one list (both also .gz), Parquet file, or hub id owner/name. A relative path starts
    at `data`."""
    split: Text | None = None
    """Split of a hub data set; null: train."""
    revision: Text | None = None
    """Commit, tag or branch of a hub data set; null: its main branch, as it is when it is first read."""
    subset: Text | None = None
    """Configuration of a hub data set that has several."""
    messages: Text | None = None
    """Column with a list of {role, content}."""
    text: Template | None = None
    """Text without a prompt; all of it is trained."""
    prompt: Template | None = None
    """What the model is given."""
    completion: Template | None = None
    """What it is to answer."""
    answer: Template | None = None
    """What a grader compares the answer with; training does not look at it."""
    remove: Texts = ()
    """Texts that are taken out of every column wherever they stand, such as [<think>, </think>]; what lies between them
    stays. v2 does this for Gemma (E.4)."""
    limit: PositiveInt | None = None
    """Rows from the start that are used; null: all."""

    @pydantic.model_validator(mode="after")
    def _one_meaning(self) -> "SourceConfig":
        given = [name for name in ("messages", "text", "prompt", "completion") if getattr(self, name) is not None]
        if len(given) > 1 and given != ["prompt", "completion"]:
            raise ValueError(f"{' and '.join(given)} are given; keep messages, or text, or prompt and completion")
        if given == ["completion"]:
            raise ValueError("completion is given without prompt")
        if given == ["prompt"] and self.answer is None:
            raise ValueError("prompt is given without completion (to train on) or answer (to grade with)")
        return self


def _from_path(source: Any) -> Any:
    return {"path": source} if isinstance(source, str) else source


def _trainable(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    for index, source in enumerate(sources):
        if source.prompt is not None and source.completion is None:
            raise ValueError(f"source {index} has a prompt without completion, so it has nothing to take a loss on")
    return sources


Source = Annotated[SourceConfig, BeforeValidator(_from_path, json_schema_input_type=SourceConfig | Text)]
Sources = Annotated[
    tuple[Source, ...],
    BeforeValidator(_listed, json_schema_input_type=Source | list[Source]),
    AfterValidator(_trainable),
]
