"""The stages of a recipe: training, the scores and the curriculum between them, and the arms of the joint stage."""

from typing import Literal

import pydantic
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from wmss_jax.sources import Section, Sources, Text
from wmss_jax.training_config import LossOn, OptimizerConfig, Share
from wmss_jax.weak_config import WeakConfig


class NeftuneConfig(Section):
    """NEFTune (arXiv 2310.05914): noise alpha / sqrt(L D) · U[-1, 1] on the embeddings of what is trained."""

    alpha: NonNegativeFloat = 5.0
    """Size of the noise; 0: none. Its authors: 5, 10 and 15; WMSS' baseline: 5."""
    length: Literal["example", "row"] = "example"
    """What L is. example: the example's own tokens, as in its authors' code; row: all of the row with its padding, as
    in Hugging Face's and in WMSS' first code. D is the model's width either way."""


class StageConfig(Section):
    """One training stage: its length, and where it departs from the recipe."""

    epochs: PositiveInt = 1
    """Passes over the stage's examples, one draw each. v1, v2 and code: 1 SFT and 1 joint."""
    steps: PositiveInt | None = None
    """Optimizer steps, with as many epochs as they take, whatever `epochs` says; null: the steps of `epochs`."""
    optimizer: OptimizerConfig | None = None
    """Replaces the recipe's `optimizer` as a whole: keys not given have their defaults; null: the recipe's."""
    loss_on: LossOn | None = None
    """Tokens with a loss; null: `dataset.loss_on`."""
    eval_every_steps: PositiveInt | None = None
    """Optimizer steps between two evaluations on `eval.data`; null: `eval.every_steps`."""
    neftune: NeftuneConfig | None = None
    """Noise on the embeddings, with any objective; null: none."""


class PretrainConfig(StageConfig):
    """Makes the base M0 out of random parameters."""

    train: Sources = ()
    """Examples of this stage alone; empty: those of `dataset`."""


class ScoreConfig(Section):
    """The entropies of the weak and the strong agent on every training example."""

    shifted: bool = True
    """Take the entropy at the position that predicts a token. False is code's off-by-one: that of the token itself."""
    batch_size: PositiveInt | None = None
    """Packed rows a forward pass, over all devices; null: those of a micro-batch of training."""


class CurriculumConfig(Section):
    """From the entropies of the weak and the strong agent to the examples of the joint stage."""

    control: Literal["none", "uniform", "strong_entropy", "entropy_change", "random"] = "none"
    """What the probabilities are replaced by, to find out what a gain is owed to. uniform: every example alike, which
    leaves drawing with replacement, and dedup. strong_entropy: in proportion to the strong agent's entropy alone.
    entropy_change: without the term of difficulty, drop and rise alone. random: the same probabilities, dealt to the
    examples at random, so that the effective sample size is the same. v1, v2 and code: none."""
    variant: Literal["v1", "v2"] = "v1"
    """Meaning of alpha and beta, see there. v1 and code: v1; v2: v2."""
    alpha: NonNegativeFloat = 0.1
    """Weight of the weak agent's entropy (variant v1) or of the entropy drop (variant v2). v1, v2 and code's script:
    0.1; code's command line defaults to 0.2."""
    beta: NonNegativeFloat = 0.8
    """Weight of the entropy drop (variant v1) or of the strong agent's entropy (variant v2). v1, v2 and code's script:
    0.8; code's command line defaults to 0.7."""
    gamma: NonNegativeFloat = 0.1
    """Weight of the entropy rise from the weak to the strong agent. v1, v2 and code: 0.1."""
    normalize_terms: bool = True
    """Divide each term by its sum over the data set, which makes alpha, beta and gamma shares of the draws. Code: true;
    the formulas printed in v1 and v2: false."""
    dedup: bool = False
    """Keep one of the examples drawn more than once. v2: true (123 instead of 218 steps); code: false; v1 does not
    say."""
    multiplier: PositiveFloat = 1.0
    """Draws an epoch as a multiple of the number of examples. v1, v2 and code: 1."""
    uniform_share: Share = 0.0
    """Share of the probability that is spread evenly over all examples. v1, v2 and code: 0."""
    min_effective_share: Share = 0.05
    """Least effective sample size (1 / sum of p squared) that is accepted, as a share of the examples; below, a handful
    would be repeated all epoch long. v1, v2 and code: no limit (0)."""

    @pydantic.model_validator(mode="after")
    def _some_term(self) -> "CurriculumConfig":
        if self.alpha == self.beta == self.gamma == 0:
            raise ValueError("alpha, beta and gamma are all 0; at least one must be > 0")
        change = self.beta if self.variant == "v1" else self.alpha
        if self.control == "entropy_change" and change == self.gamma == 0:
            raise ValueError("control: entropy_change is left with the terms of drop and rise, whose weights are 0")
        return self


class ObjectiveConfig(Section):
    """An objective by name; the other keys are its hyper-parameters.

    They are free-form here and checked by `build` against the objective's own dataclass, because a new objective is one
    dataclass and one row of OBJECTIVES, never an edit of this file.
    """

    model_config = pydantic.ConfigDict(extra="allow")

    name: Text
    """Which row of OBJECTIVES."""


class JointConfig(StageConfig):
    """The joint stage: the strong agent goes on training together with the weak one."""

    objective: ObjectiveConfig = ObjectiveConfig.model_validate({"name": "logit_mix", "lam": 0.5})
    """Loss: {name: ..., its hyper-parameters}. v1, v2 and code: logit_mix with lam 0.5; code mixes in bfloat16."""
    weak: WeakConfig = WeakConfig()
    """The agent whose logits are mixed into the strong one's."""
    teacher: Text | None = None
    """Model that `distill` learns from: a Hugging Face directory, hub id or checkpoint, with the same vocabulary."""
    reference: Literal["start", "base"] = "start"
    """Model that undial, gift and asft hold on to: start, M1 (in round t M_t), where this stage starts; base: M0 (in
    round t M_{t-1})."""
    resample: bool = True
    """Draw the examples by the curriculum; false: each once an epoch, shuffled."""
    curriculum: CurriculumConfig | None = None
    """Replaces the recipe's `curriculum` as a whole: keys not given have their defaults; null: the recipe's."""


class ControlConfig(Section):
    """A further arm to compare with: the joint stage, from the same start and as long, but for what is given here."""

    objective: ObjectiveConfig | None = None
    """Loss instead of the joint stage's."""
    weak: WeakConfig | None = None
    """Weak agent instead of the joint stage's."""
    teacher: Text | None = None
    """Teacher instead of the joint stage's."""
    reference: Literal["start", "base"] | None = None
    """Reference instead of the joint stage's."""
    resample: bool | None = None
    """Choice of examples instead of the joint stage's."""
    curriculum: CurriculumConfig | None = None
    """Curriculum instead of the joint stage's."""
    neftune: NeftuneConfig | None = None
    """Noise on the embeddings instead of the joint stage's."""

    @pydantic.model_validator(mode="after")
    def _some_difference(self) -> "ControlConfig":
        if all(value is None for _, value in self):
            raise ValueError(f"is the joint stage over again; give one of {', '.join(type(self).model_fields)}")
        return self
