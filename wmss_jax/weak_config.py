"""The weak agent in a recipe: which checkpoint it is, where it runs, and what a control replaces its signal by."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from wmss_jax.sources import Section, Text

SourceName = Literal["base", "sft_step", "ema", "interpolation", "noise", "early_exit"]
Control = Literal[
    "none", "constant", "temperature_matched", "shuffled_tokens", "shuffled_examples", "permuted_tail",
    "target_grad_matched",
]  # fmt: skip

# The one number that a source is told by, and those that are made anew in every step from what is being trained.
_NUMBER = {"sft_step": "step", "ema": "decay", "interpolation": "t", "noise": "std", "early_exit": "layer"}
MOVING = ("ema", "interpolation", "early_exit")
CHECKPOINTS = ("base", "sft_step")


class WeakSourceConfig(Section):
    """Which parameters the weak agent has: a checkpoint, or something made of one and of the agent in training."""

    name: SourceName = "base"
    """base: M0 (in round t M_{t-1}), as in v1, v2 and code. sft_step: the SFT run after `step` steps. ema: an average
    of the strong agent in training, which starts as M1. interpolation: (1 - t) base + t strong, in every step. noise:
    base plus noise. early_exit: the strong agent's own first `layer` layers and its head: no second model, and of the
    forward pass of one only that share."""
    step: PositiveInt | None = None
    """sft_step: optimizer steps of the SFT stage, which saves and keeps that checkpoint."""
    decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """ema: decay per optimizer step of the average."""
    t: Annotated[float, Field(ge=0, le=1)] | None = None
    """interpolation: share of the strong agent."""
    std: NonNegativeFloat | None = None
    """noise: standard deviation of what is added to every matrix, in root mean squares of that matrix."""
    layer: PositiveInt | None = None
    """early_exit: layers before the exit."""
    seed: NonNegativeInt = 0
    """noise: seed of what is added."""

    @pydantic.model_validator(mode="after")
    def _its_number_alone(self) -> "WeakSourceConfig":
        wanted = _NUMBER.get(self.name)
        given = [key for key in _NUMBER.values() if getattr(self, key) is not None]
        if given != ([] if wanted is None else [wanted]):
            what = f"needs {wanted} and no other number" if wanted else "takes no number"
            raise ValueError(f"{self.name} {what}, got {', '.join(given) or 'none'}")
        return self


class WeakConfig(Section):
    """The weak agent of the joint stage."""

    path: Text | None = None
    """Hugging Face directory, hub id or checkpoint of another weak agent than what the strong one was before, of any
    size or family with the same vocabulary. The curriculum's scores are then its own, too; null (v1, v2, code): M0."""
    trainable: bool = False
    """Train the weak branch too and drop it afterwards. v1: false; v2 and code: true, and v2's Table 3 has it ahead of
    the frozen one by 5.6 (MATH500) and 0.3 (GSM8K) points."""
    source: WeakSourceConfig = WeakSourceConfig()
    """Which parameters it has. v1, v2 and code: the base."""
    control: Control = "none"
    """What its logits are replaced by, to find out what a gain is owed to; `objectives/controls.py` defines each.
    constant: equal logits, so the loss is CE(lam z_strong). temperature_matched: the strong agent's own, at the weak
    one's entropy. shuffled_tokens, shuffled_examples: what it says of another token of the row, or of another row.
    permuted_tail: its own, all but the target's permuted. target_grad_matched: all equal but the target's, which has
    the mixture's gradient. v1, v2 and code: none."""
    placement: Literal["resident", "cached"] = "resident"
    """resident: the weak model runs in every step. cached: its final hidden states are written to disk once, 2 bytes
    times the model's width a token, by the pass that scores it, and read beside the tokens; its layers are never
    loaded."""
    cache: Text | None = None
    """Directory that `wmss score --cache-hidden` wrote; null: one in the work directory, made when it is needed."""
    cache_budget_gb: PositiveFloat | None = None
    """Most disk space, in 10⁹ bytes, that a cache may take; null: what is free."""

    @pydantic.model_validator(mode="after")
    def _what_goes_together(self) -> "WeakConfig":
        source = self.source.name
        if self.path is not None and source != "base":
            raise ValueError(f"path: names the weak agent, and source {source} would make it of another; give one")
        if self.placement == "cached" and self.trainable:
            raise ValueError("placement: cached needs a weak agent that stays as it is; set trainable to false")
        if self.placement == "cached" and source not in CHECKPOINTS:
            why = "changes in every step" if source in MOVING else "is no checkpoint, which hidden states are kept of"
            raise ValueError(f"placement: cached: source {source} {why}; use placement: resident")
        if self.placement == "resident" and (self.cache or self.cache_budget_gb):
            raise ValueError(f"{'cache' if self.cache else 'cache_budget_gb'} is for placement: cached")
        if self.trainable and source not in CHECKPOINTS:
            raise ValueError(f"trainable: a weak agent made by source {source} has no parameters of its own to train")
        if self.trainable and self.control != "none":
            raise ValueError(f"trainable: control {self.control} replaces what a trained weak agent would learn from")
        return self
