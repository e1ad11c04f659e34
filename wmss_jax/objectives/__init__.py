"""Per-token training objectives over the logits of one or more roles. Here N is tokens, V the vocabulary.

An objective is a frozen dataclass of hyper-parameters with the names of its `roles` and one method: logits per role
and targets in, one loss per token out. Chunking, masking, stopping gradients and dividing by the token count happen
once, in head.py and step.py. To add one: write the dataclass, add a row to OBJECTIVES.
"""

from wmss_jax.objectives.controls import CONTROLS, ControlledMix
from wmss_jax.objectives.distillation import Asft, Distill, Gift, SelfDistill, Undial
from wmss_jax.objectives.likelihood import AlphaLoss, Dft, Eaft, LabelSmoothing, LogitNoise, Sft
from wmss_jax.objectives.mixing import LogitMix, Temperature
from wmss_jax.objectives.tokens import (
    Context,
    Linear,
    Objective,
    PerToken,
    at,
    entropy,
    nll,
    target_logits,
)

OBJECTIVES: dict[str, type] = {
    "sft": Sft,
    "label_smoothing": LabelSmoothing,
    "logit_mix": LogitMix,
    "temperature": Temperature,
    "undial": Undial,
    "logit_noise": LogitNoise,
    "distill": Distill,
    "self_distill": SelfDistill,
    "dft": Dft,
    "alpha_loss": AlphaLoss,
    "asft": Asft,
    "eaft": Eaft,
    "gift": Gift,
}

__all__ = [
    "CONTROLS", "OBJECTIVES", "AlphaLoss", "Asft", "Context", "ControlledMix", "Dft", "Distill", "Eaft", "Gift",
    "LabelSmoothing", "Linear", "LogitMix", "LogitNoise", "Objective", "PerToken", "SelfDistill", "Sft", "Temperature",
    "Undial", "at", "entropy", "nll", "target_logits",
]  # fmt: skip
