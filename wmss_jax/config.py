"""The recipe: frozen models of its sections, and the way from a YAML file to them.

    config = load("recipe.yaml", ["optimizer.peak_lr=2e-5"])
    objective = build(OBJECTIVES, config.joint.objective.model_dump(), "joint.objective")

All problems of a file are reported at once, one line each. The docstring under a field is its description in the JSON
schema. Where the versions of the paper contradict each other (PAPER.md §0.1) it says who uses which value: v1 and v2
of arXiv 2602.08222, and the released code (25ac32f).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Annotated, Any, Literal

import pydantic
from pydantic import (
    AfterValidator,
    BaseModel,
    NonNegativeInt,
    PositiveInt,
)

from wmss_jax import yamlfile
from wmss_jax.sources import Section, Source, Sources, Text
from wmss_jax.stage_config import ControlConfig, CurriculumConfig, JointConfig, PretrainConfig, ScoreConfig, StageConfig
from wmss_jax.training_config import (
    DatasetConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from wmss_jax.weak_config import CHECKPOINTS
from wmss_jax.yamlfile import ConfigError

# The stages, models and directories of a run, which no control may be named after.
RESERVED = ("pretrain", "sft", "score", "curriculum", "joint", "export", "eval")
RESERVED += ("init", "stages", "assets", "cache", "scores", "weak_cache", "M0", "M1")


# -- evaluation and the whole -----------------------------------------------------------------------------------------


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", text):
        raise ValueError("not a name: a letter, then letters, digits and _")
    return text


def _arm_name(text: str) -> str:
    if text in RESERVED:
        raise ValueError(f"the name is taken, as are {', '.join(name for name in RESERVED if name != text)}")
    return _name(text)


def _mounted(text: str) -> str:
    if "://" in text:
        raise ValueError(
            f"{text} is no directory: a bucket has to be mounted on every host (launch/README.md); give where it is. "
            f"Checkpoints, the large part, need no mount with train.checkpoint_bucket: gs://BUCKET/NAME"
        )
    return text


class TaskConfig(Section):
    """Problems that are answered and graded: a task of `wmss eval` by its name, or problems of one's own."""

    task: Text | None = None
    """Name of a task that `wmss eval` knows, such as gsm8k; the other fields then change it. null: a source."""
    source: Source | None = None
    """Problems: rows with question and answer, or any rows with templates `prompt` and `answer`."""
    grader: Literal["exact", "numeric", "equation", "letter", "math"] | None = None
    """When an answer counts: equal texts, equal numbers, an equation with the right value, the letter of an option, or
    equal as mathematics (extra `eval`)."""
    max_new_tokens: PositiveInt = 256
    """Tokens after which an unfinished answer is cut off."""
    limit: PositiveInt | None = None
    """Problems from the start that are asked; null: all of the source."""
    batch_size: PositiveInt = 64
    """Problems that are decoded side by side."""
    protocol: Literal["paper_v2", "paper_v1"] | None = None
    """How the paper's versions ask: v2 greedily, v1 three times at temperature 0.5 and top-p 0.95. null: greedily."""

    @pydantic.model_validator(mode="after")
    def _problems_with_answers(self) -> "TaskConfig":
        source = self.source
        if (self.task is None) == (source is None):
            raise ValueError("give a task by name, or a source with a grader")
        if source is None:
            return self
        if self.grader is None:
            raise ValueError("source needs a grader: when does an answer count?")
        if source.messages is not None or source.text is not None or (source.prompt is None) != (source.answer is None):
            raise ValueError("source needs prompt and answer, or neither and rows with question and answer")
        return self


class EvalConfig(Section):
    """Measurements on data that is not trained on."""

    data: Sources = ()
    """Held-out examples whose loss is measured, as in `dataset.train`."""
    every_steps: PositiveInt | None = None
    """Optimizer steps between two measurements of that loss; null: at the end of a stage only."""
    keep_best: bool = False
    """Go on from the checkpoint with the lowest held-out loss of a stage instead of its last."""
    tasks: dict[Annotated[str, AfterValidator(_name)], TaskConfig] = {}  # noqa: RUF012  (pydantic copies it)
    """Problem sets by name, answered by M0, M1 and what every arm ends with."""

    @pydantic.model_validator(mode="after")
    def _data_to_measure(self) -> "EvalConfig":
        if not self.data and (self.keep_best or self.every_steps):
            raise ValueError(f"{'keep_best' if self.keep_best else 'every_steps'} needs data with held-out examples")
        return self


class ExportConfig(Section):
    """The trained model as a Hugging Face directory."""

    calibrate: Literal["none", "lambda"] = "none"
    """lambda: fold the objective's lam into the final norm, because a branch trained under mixed logits is by itself
    overconfident by 1/lam: sampling becomes calibrated, greedy decoding stays as it is. v1, v2 and code: none."""
    format: Literal["model", "adapter"] = "model"
    """model: a whole model, adapters merged into it. adapter: with `lora`, the adapter alone, as PEFT loads it onto
    `model.path`."""


class RunConfig(Section):
    """A whole run: (pre-training,) SFT, scores, curriculum, joint training with the weak agent, export, evaluation."""

    work_dir: Annotated[Text, AfterValidator(_mounted)]
    """Directory of everything that the run writes; the same command continues a run found there."""
    data: Annotated[Text, AfterValidator(_mounted)] = "."
    """Directory that the relative paths of all sources start from."""
    seed: NonNegativeInt = 42
    """Seed of initialisation, draws, order and noise. Code: 42."""
    model: ModelConfig
    """The model that is trained and shipped (the strong agent)."""
    dataset: DatasetConfig
    """The training examples and their batches."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are arranged."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate."""
    lora: LoraConfig | None = None
    """Train adapters only; null (v1, v2, code): all parameters."""
    train: TrainConfig = TrainConfig()
    """Memory, rhythm and checkpoints of training."""
    pretrain: PretrainConfig | None = None
    """Makes the base M0 out of random parameters (`model.config`) first; null: the model is the base as it is."""
    sft: StageConfig = StageConfig()
    """Supervised fine-tuning of M0 to M1, on each example once an epoch."""
    score: ScoreConfig = ScoreConfig()
    """How the agents' entropies are measured."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Which examples the joint stage sees, and how often."""
    joint: JointConfig = JointConfig()
    """Training of M1 with the weak agent M0."""
    controls: dict[Annotated[str, AfterValidator(_arm_name)], ControlConfig] = {}  # noqa: RUF012
    """Further arms by name, each from the same M1 and as long as `joint`; see `arms`."""
    rounds: PositiveInt = 1
    """Rounds of scores, curriculum and joint training after the SFT; the weak agent of round t is the strong one of
    t-1. v2's headline runs and code: 1; v1 shows 3 to 4."""
    eval: EvalConfig = EvalConfig()
    """Held-out loss and graded answers."""
    export: ExportConfig = ExportConfig()
    """How the result is written."""

    def arms(self) -> dict[str, JointConfig]:
        """Returns the joint stage and its controls by name, each as a whole."""
        changes = {name: {k: v for k, v in control if v is not None} for name, control in self.controls.items()}
        return {"joint": self.joint} | {name: self.joint.model_copy(update=new) for name, new in changes.items()}

    @pydantic.model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        parts, rows = self.train.micro_batches, self.dataset.batch_size
        if rows % parts:
            raise ValueError(f"train.micro_batches: {parts} does not divide dataset.batch_size {rows}")
        if self.pretrain is not None and self.model.config is None:
            raise ValueError("pretrain: only a model of random parameters (model.config) is pre-trained")
        stages = [stage for stage in (self.pretrain, self.sft, self.joint) if stage is not None]
        if self.export.format == "adapter":
            if self.lora is None or self.model.path is None:
                raise ValueError("export.format: adapter needs lora, and model.path for others to load it onto")
            if self.export.calibrate != "none":
                raise ValueError("export.calibrate: lambda changes the final norm, which an adapter does not hold")
        for name, arm in self.arms().items():
            own = self.joint if name == "joint" else self.controls[name]
            self._check_arm("joint" if name == "joint" else f"controls.{name}", arm, own.curriculum is not None)
        for name in ("cache", "path"):
            if getattr(self.joint.weak, name) and self.rounds > 1:
                raise ValueError(f"joint.weak.{name}: is of one weak agent, and rounds > 1 have several; leave it out")
        optimizers = [self.optimizer, *(stage.optimizer for stage in stages if stage.optimizer)]
        if self.eval.keep_best and any(optimizer.ema_decay for optimizer in optimizers):
            raise ValueError(
                "eval.keep_best: not with optimizer.ema_decay, whose average is made at a stage's end only"
            )
        for name in ("pretrain", "sft", "joint"):
            stage: StageConfig | None = getattr(self, name)
            if stage is not None and stage.eval_every_steps and not self.eval.data:
                raise ValueError(f"{name}.eval_every_steps: needs eval.data with held-out examples")
        return self

    def _check_arm(self, where: str, arm: JointConfig, has_curriculum: bool) -> None:
        if has_curriculum and not arm.resample:
            raise ValueError(f"{where}.curriculum: nothing is drawn by it; set resample to true")
        if self.lora is not None and arm.weak.path is not None and arm.weak.trainable:
            raise ValueError(
                f"{where}.weak.trainable: adapters are of one base, so with lora a weak agent from elsewhere stays "
                "frozen"
            )
        if self.lora is not None and arm.weak.source.name not in CHECKPOINTS:
            raise ValueError(
                f"{where}.weak.source: {arm.weak.source.name} is made of whole models' parameters; with lora use base "
                "or sft_step"
            )
        if arm.weak.control == "shuffled_examples" and self.dataset.batch_size < 2:
            raise ValueError(f"{where}.weak.control: shuffled_examples needs dataset.batch_size >= 2, rows to trade")


# -- from a file to the recipe ----------------------------------------------------------------------------------------


def load[S: BaseModel](
    source: str | PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    schema: type[S] = RunConfig,  # pyright: ignore[reportArgumentType]  (PEP 696 needs 3.13)
) -> S:
    """Returns a YAML file, or a mapping, as a `schema`, after the overrides.

    Args:
      overrides: `key.path=value` each, the value in YAML; the last one wins, `key=` sets null.

    Raises:
      ConfigError: everything that is wrong, one line per problem, with the file or the override.
    """
    data, origins = yamlfile.read(source, overrides)
    try:
        return schema.model_validate_json(json.dumps(data))
    except pydantic.ValidationError as error:
        raise ConfigError(yamlfile.complaint(error, schema, origins)) from error


def build[T](table: Mapping[str, type[T]], spec: Mapping[str, Any], where: str) -> T:
    """Returns the frozen dataclass `table[spec["name"]]` made from the other keys of `spec`.

    Checked as strictly as a section, against the dataclass' type hints: numbers, strings, Literals, tuples, other
    frozen dataclasses (written as mappings), and unions of these.

    Args:
      where: the path of `spec`, which opens every line of an error.

    Raises:
      ConfigError: an unknown name or key, a bad value, or what `__post_init__` refuses.
    """
    if "name" not in spec:
        raise ConfigError(f"{where}.name: required key is missing; valid: {', '.join(table)}")
    name = spec["name"]
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"{where}.name: {yamlfile.unknown(f'name {yamlfile.show(name)}', name, table)}")
    arguments = {key: value for key, value in spec.items() if key != "name"}
    holder = _holder(table[name])
    try:
        return holder.model_validate_json(json.dumps({"spec": arguments})).spec
    except pydantic.ValidationError as error:
        problems = yamlfile.problems(error, holder)
        lines = [f"{where}{path.removeprefix('spec')}: {said}" for path, said in problems]
        raise ConfigError("\n".join(lines)) from error


def _holder(cls: type) -> Any:
    # A field of a section, because pydantic hands the section's strictness on to a dataclass.
    return pydantic.create_model("Holder", __base__=Section, spec=(cls, ...))


def json_schema(tables: Mapping[str, Mapping[str, type]] | None = None) -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of a recipe, for editors.

    Args:
      tables: {"objective": OBJECTIVES} turns every section of that kind into a `oneOf` over the table's rows.
    """
    schema = RunConfig.model_json_schema()
    for section, table in (tables or {}).items():
        rows = []
        for name, cls in table.items():
            definitions = _holder(cls).model_json_schema()["$defs"]
            row = definitions.pop(cls.__name__)
            properties = {key: row["properties"][key] for key in yamlfile.keys(cls)}
            row["properties"] = {"name": {"const": name, "description": f"The {section}."}} | properties
            row["required"] = ["name", *row.get("required", [])]
            rows.append(row)
            schema["$defs"] |= definitions
        free_form = f"{section.capitalize()}Config"
        schema["$defs"][free_form] = {"oneOf": rows, "description": schema["$defs"][free_form]["description"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def digest(config: BaseModel) -> str:
    """Return 16 hex digits that two configs share exactly if all their values are equal.

    Null is as good as not there: a new field that is off by default leaves the digests of older recipes as they were.
    """
    values = config.model_dump(mode="json", exclude_none=True)
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
