"""What all training stages of a recipe have in common: data, model, devices, optimizer and loop."""

from typing import Annotated, Literal

import pydantic
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from wmss_jax import storage
from wmss_jax.sources import Section, SourceConfig, Sources, Text

Dtype = Literal["float32", "bfloat16"]
LossOn = Literal["completion", "all"]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # per step; 1 would never let anything new in


def _some(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    if not sources:
        raise ValueError("the list is empty; give at least one source")
    return sources


class DatasetConfig(Section):
    """The training examples and how they become batches."""

    train: Annotated[Sources, AfterValidator(_some)]
    """Sources of the examples, one example a row: a path, a source, or a list of these, one after the other."""
    system_prompt: Text | None = None
    """First message of every chat that brings none itself."""
    chat_template: bool = True
    """Make a chat of prompt and completion with the tokenizer's template, as of messages. False: the two texts one
    after the other, then EOS. Code is in between: SFT and evaluation have the prompt in the template and the bare
    completion with EOS, the joint stage has all in the template, without a system prompt. v1 and v2 do not say."""
    loss_on: LossOn = "completion"
    """Tokens with a loss. v2: completion; code: all in the joint stage, completion in the SFT stage; v1 does not say.
    Entropies are over completions either way."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to an example of more than `seq_len` tokens. Code: truncate."""
    seq_len: Annotated[int, Field(ge=2)] = 4096
    """Tokens a packed row. v1: 8192; v2 and code: 4096 (code's entropy pass: 8192)."""
    batch_size: PositiveInt = 256
    """Packed rows an optimizer step, over all devices and hosts. v2: 512 and code: 256 examples, not packed; v1 does
    not say."""

    @pydantic.model_validator(mode="after")
    def _somewhere_for_the_system_prompt(self) -> "DatasetConfig":
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError(
                "system_prompt needs chat_template; without it, write that text into the prompt's template"
            )
        return self


class TokenizerConfig(Section):
    """A byte-pair tokenizer that is trained on the training texts."""

    vocab_size: PositiveInt
    """Most tokens it may have, special ones included."""


class ModelConfig(Section):
    """The model that is trained: a checkpoint to start from, or a bare architecture."""

    path: Text | None = None
    """Hugging Face directory or hub id to start from. Give this or `config`."""
    config: Text | None = None
    """Hugging Face config.json, or a directory with one, whose model is initialised at random from the seed."""
    tokenizer: Text | TokenizerConfig | None = None
    """Directory or hub id of the tokenizer, or, with `config` only, {vocab_size: n} of one that is trained on the
    training texts; null: the model's own."""
    param_dtype: Dtype = "float32"
    """Type of the trained parameters and of the optimizer's moments. Code: bfloat16."""
    compute_dtype: Dtype = "bfloat16"
    """Type of activations and matrix products; softmax, norms and the loss are in float32."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass recomputes: nothing, all but matrix products, or whole layers."""
    attention: Literal["blockwise", "splash", "triton"] | None = None
    """How attention is computed; null: as the devices want it, splash on TPUs, triton on GPUs, blockwise elsewhere."""

    @pydantic.model_validator(mode="after")
    def _one_origin(self) -> "ModelConfig":
        if (self.path is None) == (self.config is None):
            given = "neither" if self.path is None else "both"
            raise ValueError(f"give exactly one of path and config, got {given}")
        if self.path is not None and isinstance(self.tokenizer, TokenizerConfig):
            raise ValueError("a new tokenizer is for a new model (config); the one at path knows another vocabulary")
        return self


def _axis(size: int) -> int:
    if size < 1 and size != -1:
        raise ValueError(f"must be >= 1, or -1 for all remaining devices, got {size}")
    return size


_Axis = Annotated[int, AfterValidator(_axis), Field(json_schema_extra={"anyOf": [{"minimum": 1}, {"const": -1}]})]


class MeshConfig(Section):
    """Devices along each mesh axis; -1, on one axis at most, takes all that remain."""

    data: _Axis = 1
    """Devices that hold a whole copy of the parameters each and split the batch."""
    fsdp: _Axis = -1
    """Devices that split the parameters, the optimizer state and the batch."""
    tensor: _Axis = 1
    """Devices that split every layer and the vocabulary; keep it inside the fast interconnect."""

    @pydantic.model_validator(mode="after")
    def _one_rest(self) -> "MeshConfig":
        rest = [name for name, size in self if size == -1]
        if len(rest) > 1:
            raise ValueError(f"only one axis can be -1 (all remaining devices), got {', '.join(rest)}")
        return self


class LoraConfig(Section):
    """Train low-rank adapters (arXiv 2106.09685) instead of all parameters, in every stage but `pretrain`.

    The base's weights are there once and serve both roles: the weak agent M0 is the base without adapter.
    """

    rank: PositiveInt = 16
    """Width of the adapters."""
    alpha: PositiveFloat = 32.0
    """An adapter's product is multiplied by alpha / rank."""
    targets: Literal["all"] | tuple[Text, ...] = "all"
    """Names of the matrices with adapters, as PEFT matches them: [q_proj, v_proj]; all: every matrix of the layers."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule, made anew for every training stage."""

    peak_lr: PositiveFloat = 1e-5
    """Highest learning rate, reached at the end of the warm-up. v1, v2 and code: 1e-5."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rate after the warm-up. Code: linear; v1 and v2 do not say."""
    warmup_steps: NonNegativeInt | None = None
    """Optimizer steps of linear warm-up; null leaves it to `warmup_fraction`."""
    warmup_fraction: Decay = 0.0
    """Warm-up as a share of the stage's optimizer steps. v2: 0.1; code: 0; v1 does not say."""
    min_lr_ratio: Share = 0.0
    """Learning rate at the last step as a share of `peak_lr`. Code: 0."""
    b1: Decay = 0.9
    """Decay per step of the gradient's mean. Code: 0.9."""
    b2: Decay = 0.999
    """Decay per step of the squared gradient's mean. Code: 0.999."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the squared gradient's mean. Code: 1e-8."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay of weight matrices, multiplied by the learning rate. Code: 0."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the gradient over all trainable roles together; null: off. v2, code: 1."""
    ema_decay: Decay | None = None
    """Decay per step of an average of the parameters; null (v1, v2, code): no average is kept."""

    @pydantic.model_validator(mode="after")
    def _one_warmup(self) -> "OptimizerConfig":
        if self.warmup_steps is not None and self.warmup_fraction > 0:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) and warmup_fraction ({self.warmup_fraction}) "
                "are both given; keep one (null and 0 are off)"
            )
        return self


def _bucket(text: str) -> str:
    return str(storage.GcsPath.parse(text))


class TrainConfig(Section):
    """The loop, alike in every training stage."""

    micro_batches: PositiveInt = 1
    """Parts in which a batch is computed, one after the other, to save memory; divides `dataset.batch_size`.
    Code: 32."""
    head_chunk_tokens: PositiveInt | None = None
    """Tokens whose logits exist at once on a device; null: as many as 256 MiB of logits hold, on a GPU 1 GiB, on a CPU
    64 MiB."""
    z_loss: NonNegativeFloat = 0.0
    """Factor on log²Σexp(z) of the trained roles' logits, added to the loss (arXiv 2204.02311). v1, v2 and code: 0."""
    diagnose_every_steps: PositiveInt | None = 100
    """Optimizer steps between two that measure the mechanism: entropies, margins, gradient on wrong tokens; null:
    none."""
    log_every_steps: PositiveInt = 10
    """Optimizer steps between two lines of metrics."""
    checkpoint_every_steps: PositiveInt = 100
    """Optimizer steps between two checkpoints; the last step is always saved."""
    checkpoint_bucket: Annotated[Text, AfterValidator(_bucket)] | None = None
    """gs://BUCKET/NAME: the checkpoints of all stages are kept in Google Cloud Storage, below this name; all else stays
    in `work_dir`. null: in `work_dir`, too."""
    keep_last: PositiveInt = 2
    """Newest checkpoints of a stage that are kept."""
    keep_every_steps: PositiveInt | None = None
    """Besides, checkpoints at multiples of so many steps are kept; null: no more than the newest."""
    resume_from: Literal["newest", "newest_intact"] = "newest"
    """The checkpoint that an interrupted stage goes on from; newest_intact: where the newest is damaged, an older
    one."""
    verify: Literal["full", "sizes"] = "full"
    """What is checked of a checkpoint before it is read: the checksum of every file, or its size only."""
    stall_report_s: PositiveFloat | None = 900.0
    """Seconds without a step after which a process says on stderr where it waits, with the stacks of its threads; null:
    never. Compiling, loading and evaluating count, too."""
    tensorboard: bool = False
    """Write TensorBoard event files besides metrics.jsonl."""
    profile: PositiveInt | None = None
    """Optimizer steps traced by JAX's profiler into <stage>/profile, from the third of a process on; null: none."""
