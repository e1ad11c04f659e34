"""One training stage, from its first or its last checkpoint to its last step: the loop, read top to bottom."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from wmss_jax import checkpoint, data, epochs, flops, hardware, optim, preemption, roles, sharding, step, train_state
from wmss_jax.models import CausalLM
from wmss_jax.neftune import Neftune
from wmss_jax.objectives import Objective, Sft
from wmss_jax.storage import Directory, GcsPath
from wmss_jax.tracking import Tracker, profiled
from wmss_jax.watchdog import Watchdog, watching
from wmss_jax.weak_cache import WeakCache
from wmss_jax.weak_source import Ema, Source

if TYPE_CHECKING:
    from wmss_jax.training_config import OptimizerConfig, TrainConfig


class NonFiniteLoss(ArithmeticError):
    """The loss of a step is NaN or infinite; the message names the step and its examples."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Examples whose loss is measured while training, every so many steps; never trained on."""

    dataset: data.Dataset
    plan: epochs.Plan
    every_steps: int
    keep_best: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """What one stage trains, on what, and how.

    Attributes:
        directory: metrics.jsonl comes to lie here, checkpoints/ unless the loop names a bucket, and profile/ where it
            asks for it.
        models: {role: model} of all roles of the objective.
        trained, frozen: give {role: parameters} when called; `trained` is not called where a checkpoint goes on.
            With adapters, "base" is among the frozen ones.
        weak_hidden: opens the weak role's cached hidden states, which are then read beside the tokens.
        param_dtype: of the trained parameters.
        plan: the whole run's rows; its step number is the data position.
        meta: JSON kept in every checkpoint: config and lineage.
        assets: directory of tokenizer and config files, carried along in every checkpoint.
        weak_source: makes the weak role's parameters in every step.
        neftune: noise on the embeddings of what is trained.
        keep_steps: steps whose checkpoints are saved and kept, whatever the loop says.
    """

    directory: Path
    models: Mapping[str, CausalLM]
    trained: Callable[[], Mapping[str, PyTree[Array]]]
    frozen: Callable[[], Mapping[str, PyTree[Array]]]
    trained_roles: tuple[str, ...]
    param_dtype: str
    objective: Objective
    optimizer: "OptimizerConfig"
    dataset: data.Dataset
    plan: epochs.Plan
    loss_on: str
    loop: "TrainConfig"
    seed: int
    mesh: Mesh | None
    meta: Mapping[str, Any]
    assets: Path
    held_out: HeldOut | None = None
    weak_hidden: Callable[[], WeakCache] | None = None
    weak_source: Source | None = None
    neftune: Neftune | None = None
    keep_steps: frozenset[int] = frozenset()


def train(job: Job) -> Directory:
    """Return the checkpoint directory of the trained roles: the last step's, or the best one's with `keep_best`.

    Goes on from the newest checkpoint in `job.directory`, if there is one; the result is bitwise the same as without
    the interruption (on the same mesh and versions). With `ema_decay` the result, and what held-out loss is measured
    on, are the averaged parameters.

    Raises:
        preemption.Preempted: SIGTERM came; the state was saved.
        NonFiniteLoss: a step's loss or gradient is NaN or infinite; checkpoints before it remain.
    """
    with watching(job.loop.stall_report_s, "loading the parameters") as watchdog:
        return _train(job, watchdog)


def _train(job: Job, watchdog: Watchdog) -> Directory:
    total = job.plan.total_steps
    tx, schedule = optim.make(job.optimizer, total)
    tx = with_averages(job, tx)
    state = _first_state(job, tx)
    start = int(state.step)
    if start == total:
        return _result(job)
    frozen = job.frozen()
    train_step = step.make_train_step(**step_settings(job), tx=tx, seed=job.seed)
    held_out_loss = _held_out_loss(job, frozen)
    meta = {**job.meta, "roles": roles.describe({role: job.models[role] for role in job.trained_roles})}
    files = roles.asset_files(job.assets)
    keep_best = int(job.held_out is not None and job.held_out.keep_best)

    primary = jax.process_index() == 0
    with (
        checkpoint.Writer(
            checkpoints(job.directory, job.loop),
            job.loop.keep_last,
            job.loop.keep_every_steps,
            keep_best=keep_best,
            keep_steps=job.keep_steps,
        ) as writer,
        Tracker(job.directory, total, job.loop.tensorboard, start_step=start, primary=primary) as tracker,
        profiled(job.directory / "profile", job.loop.profile) as profile,
        preemption.deferred() as asked_to_stop,
    ):
        report = _Reporter(job, tracker, schedule, start)
        batches = data.batches(
            job.dataset, job.plan, start_step=start, loss_on=job.loss_on,
            weak_hidden=None if job.weak_hidden is None else job.weak_hidden().read,
            rows=sharding.local_rows(job.mesh, job.plan.batch_size),
        )  # fmt: skip
        watchdog.at(f"waiting for the batch of step {start + 1}")
        for number, batch in enumerate(report.waiting(batches), start + 1):
            watchdog.at(f"step {number}" + (" and compiling it" if number == start + 1 else ""))
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = train_step(state, frozen, sharding.place_rows(batch, job.mesh, job.plan.batch_size))
            profile(metrics)
            report(number, metrics, batch)
            writer.check()

            evaluate = job.held_out is not None and (number % job.held_out.every_steps == 0 or number == total)
            save = number % job.loop.checkpoint_every_steps == 0 or number == total or (evaluate and keep_best)
            save = save or number in job.keep_steps
            stop = asked_to_stop()
            if not (evaluate or save or stop):
                watchdog.at(f"waiting for the batch of step {number + 1}")
                continue
            watchdog.at(f"evaluating or saving after step {number}")
            with report.paused():  # which logs the step first: a state that is not finite must not be saved
                metric = held_out_loss(shipped(state, job)) if evaluate else None
                if metric is not None:
                    tracker.log(number, {"held_out_loss": metric})
                    if not math.isfinite(metric):
                        raise NonFiniteLoss(f"the held-out loss after step {number} is {metric}; lower peak_lr")
                if save or stop:
                    saved = state._replace(params=shipped(state, job)) if number == total else state
                    writer.save(number, saved, meta, metric, files)
            if stop:
                break
    if asked_to_stop():  # while the last step was being saved, too
        raise preemption.Preempted(
            f"saved step {number} of {total} in {job.directory}; the same command goes on from there"
        )
    return _result(job)


def step_settings(job: Job) -> dict[str, Any]:
    """Return what a job says of its step, as `step.train_step` takes it: all but the optimizer and the seed."""
    return {
        "models": dict(job.models), "objective": job.objective, "mesh": job.mesh,
        "micro_batches": job.loop.micro_batches, "chunk_tokens": job.loop.head_chunk_tokens,
        "z_loss": job.loop.z_loss, "diagnose_every": job.loop.diagnose_every_steps,
        "weak_source": job.weak_source, "neftune": job.neftune,
    }  # fmt: skip


def with_averages(job: Job, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return the optimizer with what the weak agent has in its state: if it is one, an average of the strong."""
    source = job.weak_source
    return optim.with_weak_average(tx, source.decay) if isinstance(source, Ema) else tx


def _first_state(job: Job, tx: optax.GradientTransformation) -> train_state.TrainState:
    """Return the newest checkpoint's state, or else the one before the first step."""
    params = {role: job.models[role].abstract(job.param_dtype, job.mesh) for role in job.trained_roles}
    try:
        resumed = checkpoint.resume(
            checkpoints(job.directory, job.loop), train_state.abstract_state(params, tx), job.loop.verify,
            use_previous=job.loop.resume_from == "newest_intact",
        )  # fmt: skip
    except checkpoint.CheckpointDamaged as error:
        said = str(error).replace("use_previous=True", "train.resume_from=newest_intact")  # as a recipe has it
        raise checkpoint.CheckpointDamaged(said) from error
    return train_state.init_state(job.trained(), tx) if resumed is None else resumed[1]


def _result(job: Job) -> Directory:
    """Return the checkpoint that the stage ends with."""
    root = checkpoints(job.directory, job.loop)
    if job.held_out is None or not job.held_out.keep_best:
        return root / str(job.plan.total_steps)
    metrics = {number: checkpoint.read_meta(root / str(number))["metric"] for number in checkpoint.steps(root)}
    measured = {number: metric for number, metric in metrics.items() if metric is not None}
    return root / str(min(measured, key=lambda number: (measured[number], -number)))


def checkpoints(directory: Path, loop: "TrainConfig") -> Directory:
    """Return where the checkpoints of the stage lie whose directory is `directory`."""
    bucket = loop.checkpoint_bucket
    return (directory if bucket is None else GcsPath.parse(bucket) / directory.name) / "checkpoints"


def shipped(state: train_state.TrainState, job: Job) -> PyTree[Array]:
    """Return the parameters that a stage hands on: with an average, the average."""
    if job.optimizer.ema_decay is None:
        return state.params
    average = optax.tree.get(state.opt_state, "average")
    return jax.tree.map(lambda mean, p: mean.astype(p.dtype), average, state.params)


def _held_out_loss(job: Job, frozen: Mapping[str, PyTree[Array]]) -> Callable[[PyTree[Array]], float]:
    """Return the function parameters -> token-mean cross-entropy of the strong role on the held-out examples."""
    model = job.models["strong"]
    base = {role: params for role, params in frozen.items() if role == "base"}
    eval_step = step.make_eval_step(model, Sft(), mesh=job.mesh, chunk_tokens=job.loop.head_chunk_tokens)

    def measure(params: PyTree[Array]) -> float:
        assert job.held_out is not None
        total = tokens = 0.0
        held_out, size = job.held_out, job.held_out.plan.batch_size
        rows = sharding.local_rows(job.mesh, size)
        for batch in data.batches(held_out.dataset, held_out.plan, loss_on=job.loss_on, rows=rows):
            placed = sharding.place_rows(batch, job.mesh, size)
            metrics = jax.device_get(eval_step({**base, "strong": params["strong"]}, placed))
            total += float(metrics["loss"]) * float(metrics["loss_tokens"])
            tokens += float(metrics["loss_tokens"])
        return total / max(tokens, 1.0)

    return measure


class _Reporter:
    """Logs a step's metrics once the next step is under way, so that reading them never makes the device wait.

    Besides those that the step returns, and `lr`, a line has what the steps since the last one took; in a process's
    first line, compiling included.

        tokens_per_s        tokens other than padding, over all devices
        step_time_s         seconds a step, without those of evaluations and checkpoints
        loader_wait_s       those of them that the loop waited for its batch
        model_tflops_per_s  10¹² model FLOPs a second and device: `flops.step` of the tokens above, so that neither
                            padding nor what is computed twice counts as work done
        mfu                 the same as a share of the device's bfloat16 peak, where `hardware` knows that
    """

    def __init__(self, job: Job, tracker: Tracker, schedule: optax.Schedule, start: int):
        self._job, self._tracker, self._schedule = job, tracker, schedule
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._done: float | None = None  # when that step was over, if it was before it is logged
        devices = jax.devices()[:1] if job.mesh is None else list(job.mesh.devices.flat)
        self._flops, self._peak = flops_per_token(job) / len(devices), hardware.peak_flops(devices[0])
        self._logged, self._since = start, time.monotonic()
        self._tokens, self._waited, self._wait = 0, 0.0, 0.0

    def waiting(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Mapping[str, np.ndarray]]:
        """Give the batches; the time that each lets wait for itself is the loader's."""
        asked = time.monotonic()
        for batch in batches:
            self._wait = time.monotonic() - asked
            if self._pending is not None and self._pending[1]["loss"].is_ready():
                self._done = asked  # the device waited for this batch, too: not in the last step's time
            yield batch
            asked = time.monotonic()

    def __call__(self, number: int, metrics: Mapping[str, Array], batch: Mapping[str, np.ndarray]) -> None:
        self.flush()
        self._pending, self._done = (number, metrics), None
        given = (batch["segments"] > 0).sum() / len(batch["segments"])  # of this process's rows, as of any
        self._tokens += int(given * self._job.plan.batch_size)
        self._waited += self._wait

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Log the step that waits; the time spent inside is no step's."""
        self.flush()
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def flush(self) -> None:
        """Log the step that waits, if it is its turn; raise if its loss is not finite."""
        if self._pending is None:
            return
        (number, pending), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(pending).items()}
        # A gradient that is not finite spoils the parameters, which the next step's loss would show after a save.
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            rows = self._job.plan.rows_of(number - 1)
            examples = sorted({int(index) for row in rows for index in row})
            raise NonFiniteLoss(
                f"the loss of step {number} is {metrics['loss']} (gradient norm {metrics['grad_norm']}); "
                f"its examples: {', '.join(self._job.dataset.location(index) for index in examples)}"
            )
        every = self._job.loop.diagnose_every_steps
        measured = every is not None and number % every == 0
        if not measured:
            metrics = {name: value for name, value in metrics.items() if not name.startswith("diagnostics/")}
        if number % self._job.loop.log_every_steps == 0 or number in (1, self._job.plan.total_steps) or measured:
            lr: Any = self._schedule(number - 1)
            self._tracker.log(number, metrics | {"lr": float(lr)} | self._speed(number))

    def _speed(self, number: int) -> dict[str, float]:
        """Return what the steps since the last line took, up to this one; begin anew after it."""
        now, steps = self._done or time.monotonic(), number - self._logged
        took = max(now - self._since, 1e-9)
        pace = self._tokens / took
        speed = {
            "tokens_per_s": pace,
            "step_time_s": took / steps,
            "loader_wait_s": self._waited / steps,
            "model_tflops_per_s": pace * self._flops / 1e12,
        }
        if self._peak is not None:
            speed["mfu"] = pace * self._flops / self._peak
        self._logged, self._since, self._tokens, self._waited = number, now, 0, 0.0
        return speed


def flops_per_token(job: Job) -> float:
    """Return the model FLOPs per token of a step of the stage."""

    def use(role: str) -> flops.Use:
        if role in job.trained_roles:
            return "trained" if job.models[role].lora is None else "adapted"
        return "cached" if role == "weak" and job.weak_hidden is not None else "resident"

    return flops.step((flops.forward(job.models[role], job.plan.seq_len), use(role)) for role in job.objective.roles)
