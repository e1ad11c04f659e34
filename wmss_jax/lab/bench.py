"""The runs of a study in one process: programs are compiled once per shape, and a seed's data, scores and models kept.

A seed's M0 and M1 are stages on disk like any recipe's (`pipeline`). Its arms are trained in memory from there, without
checkpoints: they are short, and what is left of one is its figures.
"""

import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from wmss_jax import arms, data, jobs, optim, pipeline, scoring, selection, sharding, step, train, train_state
from wmss_jax.evals.tasks import Tasks, answers, read_tasks
from wmss_jax.lab.results import Figures, Measured
from wmss_jax.lab.study import Study
from wmss_jax.models import CausalLM
from wmss_jax.runs import Run, prepare
from wmss_jax.stages import ModelRef

KEPT_BATCHES_BYTES = 2**28


class _Clock:
    """Measures a run on the wall and on the processor, which tells more where a machine is shared."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.monotonic() - self._wall, "cpu_seconds": time.process_time() - self._cpu}


class _Seed(NamedTuple):
    """All that the arms of a seed have in common."""

    run: Run
    weak: ModelRef
    strong: ModelRef
    scores: Mapping[str, scoring.Scores]
    tasks: Tasks


class Bench:
    """Carries runs out, one after the other; keeps what the next one may need."""

    def __init__(self, study: Study, say: Callable[[str], None]):
        self._study, self._say = study, say
        self._trainer = Trainer()
        self._seed = functools.lru_cache(maxsize=2)(self._made_ready)  # the one at hand, and one to help with

    def start(self, seed: int) -> dict[str, Measured]:
        """Return the figures of M0 and M1, made here or found on disk."""
        found, clock = {}, _Clock()
        for name, ref in zip(("M0", "M1"), (self._seed(seed).weak, self._seed(seed).strong), strict=True):
            figures = self._figures(self._seed(seed), *ref.load(self._seed(seed).run.mesh))
            found[name] = Measured({**figures, "run": clock.read()}, 0)
        return found

    def arm(self, seed: int, name: str, rate: float) -> Measured:
        """Return the figures of one arm at one learning rate.

        Raises:
            ValueError: the arm cannot be carried out.
            train.NonFiniteLoss: it diverged.
        """
        clock, of = _Clock(), self._seed(seed)
        job, share = self._job(of, name)
        if self._study.config.equal == "flops":
            reference, _ = self._job(of, self._study.config.reference)
            ratio = train.flops_per_token(reference) / train.flops_per_token(job)
            job, share = self._job(of, name, steps=max(1, round(ratio * job.plan.total_steps)))
        params, metrics = self._trainer.run(job, rate)
        figures = self._figures(of, job.models["strong"], params["strong"])
        tokens = int(of.run.dataset.lengths[job.plan.items].sum())
        metrics |= {"model_tflops": train.flops_per_token(job) * tokens / 1e12}
        if share is not None:
            metrics["effective_share"] = share
        return Measured({**figures, "training": metrics, "run": clock.read()}, job.plan.total_steps)

    def _made_ready(self, seed: int) -> _Seed:
        recipe = self._study.of_seed(self._study.base, seed)
        models = pipeline.run(recipe, until="sft", say=self._say)["models"]
        run = prepare(recipe, self._say)
        weak, strong = (dataclasses.replace(run.ref(models[name]), kept={}) for name in ("M0", "M1"))
        scores = {"weak": selection.scores(run, weak), "strong": selection.scores(run, strong)}
        return _Seed(run, weak, strong, scores, read_tasks(run))

    def _job(self, of: _Seed, name: str, steps: int | None = None) -> tuple[train.Job, float | None]:
        """Return an arm's joint stage, and the effective sample size of its draws as a share of the examples."""
        recipe = self._study.of_seed(self._study.arms[name], of.run.recipe.seed)
        if steps is not None:
            recipe = recipe.model_copy(update={"joint": recipe.joint.model_copy(update={"steps": steps})})
        run = dataclasses.replace(of.run, recipe=recipe)
        probs, share = self._draws(run, of.scores)
        drawn = {} if probs is None else {"joint": probs}
        return jobs.arm(run, 1, "joint", arms.objective(recipe, "joint"), of.weak, of.strong, drawn).job, share

    def _draws(self, run: Run, scores: Mapping[str, scoring.Scores]) -> tuple[np.ndarray | None, float | None]:
        recipe = run.recipe
        if not recipe.joint.resample:
            return None, None
        if (elsewhere := recipe.joint.weak.path) is not None:
            scores = {**scores, "weak": selection.scores(run, run.ref(elsewhere))}
        c = recipe.joint.curriculum or recipe.curriculum
        n = len(scores["strong"].entropy)
        probs, report = selection.probabilities(c, {} if c.control == "uniform" else scores, n, recipe.seed)
        if report["effective_share"] < c.min_effective_share:
            raise ValueError(selection.collapse(c, report, n))
        return probs, report["effective_share"]

    def _figures(self, of: _Seed, model: CausalLM, params: PyTree[Array]) -> Figures:
        """Return accuracy on every task, and entropy, nll and margin of the held-out examples, where there are any."""
        figures: Figures = {}
        for name, asked in of.tasks.items():
            figures[name] = {"accuracy": answers(of.run, model, params, asked)["accuracy"]}
        if of.run.held_out is not None:
            recipe = of.run.recipe
            found = scoring.score(
                model, params, of.run.held_out, seq_len=recipe.dataset.seq_len, batch_size=recipe.dataset.batch_size,
                shifted=recipe.score.shifted, mesh=of.run.mesh, chunk_tokens=recipe.train.head_chunk_tokens,
            )  # fmt: skip
            figures["held_out"] = {key: float(np.mean(getattr(found, key))) for key in ("nll", "entropy", "margin")}
        return figures


class _Program(NamedTuple):
    tx: optax.GradientTransformation
    step: Callable[..., tuple[train_state.TrainState, dict[str, Array]]]


class Trainer:
    """Runs training stages in memory. Stages that differ in seed, learning rate or data only are one program."""

    def __init__(self) -> None:
        self._programs: dict[Any, _Program] = {}
        self._batches: dict[Any, list[dict[str, Any]]] = {}

    def run(self, job: train.Job, rate: float) -> tuple[PyTree[Array], dict[str, float]]:
        """Return the parameters that a job ends with, and its last metrics.

        Args:
            rate: peak learning rate; the one in `job.optimizer` is not looked at.

        Raises:
            train.NonFiniteLoss: a loss is NaN or infinite.
        """
        program, frozen = self._program(job), job.frozen()
        state = train_state.init_state(job.trained(), program.tx)
        state = state._replace(opt_state=optax.tree.set(state.opt_state, peak_lr=jnp.float32(rate)))
        seed = jnp.uint32(job.seed)
        history = []
        for batch in self._laid_out(job):
            state, metrics = program.step(state, frozen, batch, seed)
            history.append(metrics)
        found = jax.device_get(history)
        bad = [number for number, m in enumerate(found, 1) if not math.isfinite(float(m["loss"] + m["grad_norm"]))]
        if bad:
            raise train.NonFiniteLoss(f"the loss of step {bad[0]} of {len(found)} is not finite at peak_lr {rate:g}")
        # Of the diagnostics, which are NaN in the steps that take none, the last that were taken.
        last = {name: [float(m[name]) for m in found if math.isfinite(float(m[name]))] for name in found[-1]}
        return train.shipped(state, job), {name: values[-1] for name, values in last.items() if values}

    def _program(self, job: train.Job) -> _Program:
        settings = train.step_settings(job)
        # All that the program depends on besides its arguments. The rate is one of those.
        shape = job.plan.total_steps, job.plan.seq_len, job.plan.batch_size, job.trained_roles, job.param_dtype
        optimizer = job.optimizer.model_copy(update={"peak_lr": 1.0})
        key = shape, optimizer, tuple((name, _hashable(value)) for name, value in settings.items())
        if key not in self._programs:
            tx = train.with_averages(job, optim.make_for_any_rate(optimizer, job.plan.total_steps))

            def one_step(state: Any, frozen: Any, batch: Any, seed: Array) -> tuple:
                return step.train_step(state, frozen, batch, tx=tx, seed=seed, **settings)

            self._programs[key] = _Program(tx, jax.jit(one_step, donate_argnums=0))
        return self._programs[key]

    def _laid_out(self, job: train.Job) -> list[dict[str, Any]]:
        """Return a job's batches, laid out once for all jobs that have the same ones."""
        plan = job.plan
        drawn = zlib.crc32(plan.offsets.tobytes(), zlib.crc32(plan.items.tobytes()))
        key = job.dataset.fingerprint, job.loss_on, plan.seq_len, plan.batch_size, drawn
        if key not in self._batches:
            rows = sharding.local_rows(job.mesh, plan.batch_size)
            made = [
                sharding.place_rows(
                    data.batch(job.dataset, plan, number, loss_on=job.loss_on, rows=rows), job.mesh, plan.batch_size
                )
                for number in range(plan.total_steps)
            ]
            if _bytes([*self._batches.values(), made]) > KEPT_BATCHES_BYTES:
                self._batches.clear()
            self._batches[key] = made
        return self._batches[key]


def _bytes(plans: Sequence[Sequence[Mapping[str, Any]]]) -> int:
    return sum(array.nbytes for batches in plans for batch in batches for array in batch.values())


def _hashable(value: Any) -> Any:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value
