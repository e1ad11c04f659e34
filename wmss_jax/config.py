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
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from wmss_jax import storage, yamlfile
from wmss_jax.sources import Section, Source, SourceConfig, Sources, Text
from wmss_jax.weak_config import CHECKPOINTS, WeakConfig
from wmss_jax.yamlfile import ConfigError

Dtype = Literal["float32", "bfloat16"]
LossOn = Literal["completion", "all"]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # per step; 1 would never let anything new in

# The stages, models and directories of a run, which no control may be named after.
RESERVED = ("pretrain", "sft", "score", "curriculum", "joint", "export", "eval")
RESERVED += ("init", "stages", "assets", "cache", "scores", "weak_cache", "M0", "M1")


# -- data -------------------------------------------------------------------------------------------------------------


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


# -- models and optimization ------------------------------------------------------------------------------------------


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
    """Tokens whose logits exist at once on a device; null: as many as 256 MiB of logits hold, on a CPU
    64."""
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


# -- stages -----------------------------------------------------------------------------------------------------------


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
    """Returns 16 hex digits that two configs share exactly if all their values are equal."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
