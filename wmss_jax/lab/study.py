"""A study: one base recipe, arms that depart from it in the joint stage, learning rates, and seeds in common.

    study = load("configs/lab/arithmetic.yaml", ["seeds=2"])

All arms of a seed start from the same M1 and see the same data; what an arm may change comes after that.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from wmss_jax import config, examples, stage_config, yamlfile
from wmss_jax.config import ConfigError, RunConfig
from wmss_jax.lab.problems import ProblemsConfig
from wmss_jax.sources import Section, Text

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
RESERVED = ("M0", "M1")
_THE_STUDY_S = ("work_dir", "seed", "controls")  # of a recipe's keys
VERSIONS = ("wmss-jax", "jax", "jaxlib", "flax", "optax", "numpy")


class ArmConfig(Section):
    """Where an arm departs from the base recipe; everything before the joint stage is in common.

    Mappings are merged into the recipe's, except that one with a `name` replaces what was there: an objective's
    hyper-parameters are its own.
    """

    joint: dict[str, Any] = {}  # noqa: RUF012  (pydantic copies it)
    """Changes of the recipe's `joint`: objective, weak agent, resampling, steps, ..."""
    curriculum: dict[str, Any] = {}  # noqa: RUF012
    """Changes of the recipe's `curriculum`."""
    optimizer: dict[str, Any] = {}  # noqa: RUF012
    """Changes of the recipe's `optimizer`, for the joint stage alone; not `peak_lr`, which `rates` are for."""
    train: dict[str, Any] = {}  # noqa: RUF012
    """Changes of the recipe's `train`, for the joint stage alone."""
    rates: tuple[PositiveFloat, ...] | None = None
    """Peak learning rates instead of the study's."""


class StudyConfig(Section):
    """Which arms are compared, on which seeds, at which learning rates."""

    work_dir: Text
    """Directory of everything that the study writes; the same command goes on with what it finds there."""
    recipe: Text | dict[str, Any]
    """The base recipe: a file, or its sections here. Its work_dir, seed and controls are the study's to set."""
    problems: ProblemsConfig | None = None
    """Data made anew for every seed, where the recipe's `data` then is; null: all seeds share the recipe's."""
    seeds: PositiveInt | tuple[NonNegativeInt, ...] = 8
    """How many, from 0, or a list."""
    rates: tuple[PositiveFloat, ...]
    """Peak learning rates that every arm's joint stage is tried at."""
    reference: Name = "sft"
    """The arm that the others are compared with."""
    contrasts: tuple[tuple[Name, Name], ...] = ()
    """Further pairs of arms whose difference is of interest: [[wmss, constant], ...] is wmss minus constant."""
    equal: Literal["steps", "flops", "nothing"] = "steps"
    """What the arms have in common: optimizer steps; the model FLOPs of the reference arm's steps, by other numbers of
    steps; or nothing, where the length itself is compared."""
    validation: Name = "validation"
    """The task of the recipe on which each arm's rate is chosen; all others but `train` are for measuring only."""
    train: Name = "train"
    """The task with training problems, which tells whether the set-up saturates."""
    arms: dict[Name, ArmConfig]
    """The arms by name; an empty mapping is the base recipe's own joint stage."""

    @pydantic.model_validator(mode="after")
    def _sensible(self) -> "StudyConfig":
        if taken := [name for name in self.arms if name in RESERVED]:
            raise ValueError(f"arms: {taken[0]} is the name of a starting point; choose another")
        if self.reference not in self.arms:
            raise ValueError(f"reference: {yamlfile.unknown(f'arm {self.reference!r}', self.reference, self.arms)}")
        for name in (name for pair in self.contrasts for name in pair):
            if name not in self.arms:
                raise ValueError(f"contrasts: {yamlfile.unknown(f'arm {name!r}', name, self.arms)}")
        seeds = self.seed_list
        if len(set(seeds)) < len(seeds) or not seeds:
            raise ValueError(f"seeds: expected a number or a list of different numbers, got {list(seeds)}")
        for where, rates in {"rates": self.rates, **{f"arms.{n}.rates": a.rates for n, a in self.arms.items()}}.items():
            if rates is not None and (not rates or len(set(rates)) < len(rates)):
                raise ValueError(f"{where}: expected different numbers, got {list(rates)}")
        return self

    @property
    def seed_list(self) -> tuple[int, ...]:
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


@dataclasses.dataclass(frozen=True)
class Study:
    """A study with the recipe of every arm, checked.

    Attributes:
        name: of its file; what it finds is called so. Studies of one base may share a work_dir, and then what they have
            in common: M0, M1, and runs of the same arm at the same rate.
        base: the recipe that makes M0 and M1, its work_dir and seed still to be set (`of_seed`).
        arms: {name: the recipe whose joint stage is the arm}.
    """

    name: str
    config: StudyConfig
    base: RunConfig
    arms: Mapping[str, RunConfig]

    def rates(self, arm: str) -> tuple[float, ...]:
        return self.config.arms[arm].rates or self.config.rates

    def of_seed(self, recipe: RunConfig, seed: int) -> RunConfig:
        """Return the recipe in the seed's own directory, on the seed's own data."""
        work = Path(self.config.work_dir)
        data = recipe.data if self.config.problems is None else str(work / "data" / f"seed-{seed}")
        return recipe.model_copy(update={"work_dir": str(work / f"seed-{seed}"), "seed": seed, "data": data})

    @property
    def tests(self) -> tuple[str, ...]:
        """The tasks that nothing is chosen on."""
        kept = (self.config.validation, self.config.train)
        return tuple(task for task in self.base.eval.tasks if task not in kept)

    def prepare_data(self, seed: int) -> None:
        """Make the seed's problems, if the study makes them."""
        if self.config.problems is not None:
            from wmss_jax.lab import problems

            problems.write(self.config.problems, seed, Path(self.config.work_dir) / "data" / f"seed-{seed}")

    def data_digest(self, seed: int) -> str:
        """Return 16 hex digits of every file that a seed is trained or measured on."""
        recipe, crc = self.of_seed(self.base, seed), hashlib.sha256()
        pretrain = recipe.pretrain.train if recipe.pretrain else ()
        tasks = [task.source for task in recipe.eval.tasks.values()]
        for source in (*recipe.dataset.train, *pretrain, *recipe.eval.data, *tasks):
            crc.update(str(examples.digest(source, recipe.data)).encode())
        return crc.hexdigest()[:16]

    def architecture_digest(self) -> str | None:
        """Return the same of the model's config.json; None of a model that a path or hub id names."""
        if self.base.model.config is None:
            return None
        file = Path(self.base.model.config)
        file = file / "config.json" if file.is_dir() else file
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS}


def digest(values: Any) -> str:
    """Return 16 hex digits of JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


# -- from a file to the study -----------------------------------------------------------------------------------------


def load(source: str | PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> Study:
    """Return a study with all its arms' recipes.

    Args:
        overrides: `key.path=value` each, as of a recipe; the base recipe's keys begin with `recipe.`, where that is
            in the file.

    Raises:
        ConfigError: everything that is wrong, one line per problem.
    """
    found = config.load(source, overrides, StudyConfig)
    where, title = ("the study", "study") if isinstance(source, Mapping) else (str(source), Path(source).stem)
    data = found.recipe if isinstance(found.recipe, dict) else yamlfile.read(found.recipe)[0]
    if isinstance(found.recipe, dict) and (taken := [key for key in _THE_STUDY_S if key in data]):
        raise ConfigError(f"{where}: recipe.{taken[0]}: is the study's to set; leave it out")
    data = {key: value for key, value in data.items() if key not in _THE_STUDY_S} | {"work_dir": found.work_dir}
    base = _recipe(data, f"{where}: recipe")
    data = base.model_dump(mode="json")  # with its defaults, which an arm may change a part of
    arms, mistakes = {}, []
    for name, arm in found.arms.items():
        try:
            arms[name] = _arm(data, arm, f"{where}: arms.{name}")
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    study = Study(title, found, _keeping_steps(base, arms), arms)
    _check(study, where)
    return study


def _keeping_steps(base: RunConfig, arms: Mapping[str, RunConfig]) -> RunConfig:
    """Return the base with controls for the arms whose weak agent is a step of the SFT, which then keeps that step."""
    joints = [arm.joint for arm in arms.values() if arm.joint.weak.source.step is not None]
    kept = {
        f"sft_step_{joint.weak.source.step}": stage_config.ControlConfig(objective=joint.objective, weak=joint.weak)
        for joint in joints
    }
    return base.model_copy(update={"controls": kept})


def _recipe(data: Mapping[str, Any], where: str) -> RunConfig:
    try:
        return RunConfig.model_validate_json(json.dumps(data))
    except pydantic.ValidationError as error:
        raise ConfigError(yamlfile.complaint(error, RunConfig, {"": where})) from error


def _arm(data: Mapping[str, Any], arm: ArmConfig, where: str) -> RunConfig:
    if "peak_lr" in arm.optimizer or "peak_lr" in arm.joint.get("optimizer", {}):
        raise ConfigError(f"{where}.optimizer.peak_lr: give rates: [...] instead")
    changes = {name: getattr(arm, name) for name in ("joint", "curriculum", "optimizer", "train")}
    recipe = _recipe(merged(data, {name: change for name, change in changes.items() if change}), where)
    if recipe.joint.optimizer is not None and arm.optimizer:
        raise ConfigError(f"{where}.optimizer: joint.optimizer replaces it as a whole; change that one")
    if recipe.joint.curriculum is not None and arm.curriculum:
        raise ConfigError(f"{where}.curriculum: joint.curriculum replaces it as a whole; change that one")
    return recipe


def merged(base: Any, change: Any) -> Any:
    """Return `base` with a change written into it; mappings are merged, one with a `name` replaces.

    >>> merged({"o": {"name": "mix", "lam": 0.5}, "n": {"a": 1}}, {"o": {"name": "sft"}, "n": {"b": 2}})
    {'o': {'name': 'sft'}, 'n': {'a': 1, 'b': 2}}
    """
    if not isinstance(base, Mapping) or not isinstance(change, Mapping) or "name" in change:
        return change
    return {**base, **{key: merged(base.get(key), value) for key, value in change.items()}}


def _check(study: Study, where: str) -> None:
    """Raise ConfigError where the recipes do not make a fair comparison, or one that the lab can carry out."""
    c, base = study.config, study.base
    mistakes = []
    for key, task in {"validation": c.validation, "train": c.train}.items():
        if task not in base.eval.tasks:
            mistakes.append(f"{key}: {yamlfile.unknown(f'task {task!r} of recipe.eval.tasks', task, base.eval.tasks)}")
    if not mistakes and not study.tests:
        mistakes.append("recipe.eval.tasks: nothing to measure on besides the validation and training problems")
    for name, wrong in {
        "rounds": base.rounds > 1,
        "lora": base.lora is not None,
        "eval.keep_best": base.eval.keep_best,
        "train.profile": base.train.profile is not None,
    }.items():
        if wrong:
            mistakes.append(f"recipe.{name}: a lab compares whole models after one round, each at its last step")
    if base.train.checkpoint_bucket is not None:
        mistakes.append("recipe.train.checkpoint_bucket: the runs of all seeds would write over each other there")
    for name, recipe in study.arms.items():
        if recipe.joint.steps is None:
            mistakes.append(f"arms.{name}.joint.steps: give it, or recipe.joint.steps: seeds must not differ in length")
        elif c.equal != "nothing" and recipe.joint.steps != study.arms[c.reference].joint.steps:
            mistakes.append(
                f"arms.{name}.joint.steps: {recipe.joint.steps}, and the reference takes "
                f"{study.arms[c.reference].joint.steps}; arms of other lengths need equal: nothing"
            )
        if recipe.joint.weak.placement == "cached":
            mistakes.append(f"arms.{name}.joint.weak.placement: a lab keeps the weak agent resident; leave it out")
    if mistakes:
        raise ConfigError("\n".join(f"{where}: {said}" for said in mistakes))
