"""One arm of a recipe, the joint stage or a control: its objective, weak agent and noise, as the step takes them.

What makes no sense together is refused here, where the objectives are known, before anything is made.
"""

import dataclasses
from collections.abc import Mapping

from wmss_jax import config, stage_config, weak_config
from wmss_jax.config import ConfigError
from wmss_jax.models import CausalLM
from wmss_jax.neftune import Neftune
from wmss_jax.objectives import OBJECTIVES, ControlledMix, LogitMix, Objective, SelfDistill
from wmss_jax.weak_source import EarlyExit, Ema, Interpolation, Noise, Source


def objective(recipe: config.RunConfig, name: str) -> Objective:
    """Return the objective of an arm, with the control of its weak signal.

    Raises:
        ConfigError: it is none, or does not go together with the arm's other settings.
    """
    arm = recipe.arms()[name]
    own = recipe.joint if name == "joint" else recipe.controls[name]
    where = "joint" if name == "joint" else f"controls.{name}"
    found = config.build(OBJECTIVES, arm.objective.model_dump(), f"{where}.objective")
    said, roles = arm.objective.name, found.roles
    if "teacher" in roles and arm.teacher is None:
        raise ConfigError(f"{where}.teacher: {said} learns from a teacher; name its directory or hub id")
    if "teacher" not in roles and own.teacher is not None:
        raise ConfigError(f"{where}.teacher: {said} has none; leave it out, or use distill")
    if "reference" not in roles and own.reference == "base":
        raise ConfigError(f"{where}.reference: {said} holds on to none; leave it out")
    if "weak" not in roles:
        if own.weak not in (None, weak_config.WeakConfig()):
            raise ConfigError(f"{where}.weak: {said} has no weak agent; leave it out")
        return found
    if isinstance(found, SelfDistill) and arm.weak.trainable:
        raise ConfigError(f"{where}.weak.trainable: {said} learns from its weak agent, which has to stay as it is")
    if arm.weak.control == "none":
        return found
    if not isinstance(found, LogitMix):
        raise ConfigError(f"{where}.weak.control: {arm.weak.control} is a control of logit_mix, not of {said}")
    return ControlledMix(found, arm.weak.control)  # pyright: ignore[reportReturnType]  (its roles are of the object)


def source(arm: stage_config.JointConfig, found: Objective) -> Source | None:
    """Return what makes the weak agent's parameters; None where they are a checkpoint's, or there is none."""
    weak = arm.weak.source
    if "weak" not in found.roles:
        return None
    # That a source has its number, and no other, was checked when the recipe was read.
    if weak.decay is not None:
        return Ema(weak.decay)
    if weak.t is not None:
        return Interpolation(weak.t)
    if weak.layer is not None:
        return EarlyExit(weak.layer)
    return None if weak.std is None else Noise(weak.std, weak.seed)


def trained(arm: stage_config.JointConfig, found: Objective) -> tuple[str, ...]:
    """Return the roles that are trained."""
    return tuple(role for role in found.roles if role == "strong" or (role == "weak" and arm.weak.trainable))


def neftune(stage: stage_config.StageConfig) -> Neftune | None:
    """Return the noise on a stage's embeddings; None where there is none."""
    wanted = stage.neftune
    return None if wanted is None or wanted.alpha == 0 else Neftune(wanted.alpha, wanted.length)


def sharing_tokens(models: Mapping[str, CausalLM]) -> dict[str, CausalLM]:
    """Return the models as knowing those tokens alone that all have a row for, where their paddings differ."""
    if len({model.vocabulary for model in models.values()}) == 1:
        return dict(models)
    tokens = min(model.vocabulary[0] for model in models.values())
    return {role: dataclasses.replace(model, vocab_size=tokens) for role, model in models.items()}
