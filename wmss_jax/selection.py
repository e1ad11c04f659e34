"""Which examples the joint stage sees: scores of the weak and the strong agent, and the curriculum made of them."""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wmss_jax import curriculum, processes, scoring, stage_config, weak_cache, weak_config
from wmss_jax.runs import Run
from wmss_jax.stages import ModelRef
from wmss_jax.weak_cache import WeakCache


def scores(run: Run, ref: ModelRef, known: scoring.Scores | None = None) -> scoring.Scores:
    """Return the scores of all examples under a model; made once per model, unless they are `known`."""
    recipe, digest = run.recipe, ref.digest
    path = run.work / "scores" / f"{digest}.parquet"

    def work() -> dict[str, Any]:
        found = score(run, ref) if known is None else known
        scoring.write(path, found, run.dataset, digest, recipe.score.shifted)
        return {"scores": path.relative_to(run.work).as_posix(), "model": str(ref.directory)}

    inputs = {"model": digest, "data": run.dataset.fingerprint, "shifted": recipe.score.shifted}
    return scoring.read(run.work / run.stage(f"score-{digest}", inputs, work)["scores"], run.dataset)


def hidden_states(run: Run, ref: ModelRef, weak: weak_config.WeakConfig) -> Callable[[], WeakCache]:
    """Return what opens the cached hidden states of a model; they are made here, with its scores, unless given.

    Raises:
        ValueError: there is no room for them.
    """
    made_of = identity(run, ref)
    if weak.cache is not None:
        return lambda: WeakCache.open(Path(str(weak.cache)), run.dataset, made_of)
    directory = run.work / "weak_cache" / ref.digest

    def make() -> dict[str, Any]:
        if not directory.exists():
            scores(run, ref, cache_hidden(run, ref, directory, weak.cache_budget_gb))
        return {"cache": directory.relative_to(run.work).as_posix()}

    def opened() -> WeakCache:
        make()  # again, if it was removed to make room and a stage is not finished after all
        return WeakCache.open(directory, run.dataset, made_of)

    run.stage(f"hidden-{ref.digest}", made_of, make, directory)
    return opened


def cache_hidden(run: Run, ref: ModelRef, directory: Path, budget_gb: float | None) -> scoring.Scores:
    """Return the scores of all examples under a model, whose hidden states are written to `directory` by the way.

    What that takes of disk, and of reading in every step, is said first.
    """
    width, d = ref.model.config.sizes["D"], run.recipe.dataset
    budget_bytes = None if budget_gb is None else int(budget_gb * 1e9)
    run.say(weak_cache.cost(directory, run.dataset, width, d.batch_size * d.seq_len))
    if not processes.first():
        return score(run, ref, lambda *_: None)
    with weak_cache.Writer(directory, run.dataset, width, identity(run, ref), budget_bytes) as writer:
        return score(run, ref, writer.add)


def identity(run: Run, ref: ModelRef) -> dict[str, str]:
    """Return what hidden states depend on; a cache of others is refused."""
    report, d = run.dataset.report, run.recipe.dataset
    cut = f"{d.too_long} at {d.seq_len} tokens" if report.dropped or report.truncated else "none"
    return {
        "data set": run.dataset.fingerprint, "tokenizer": run.dataset.tokenizer_fingerprint, "truncation": cut,
        "model": ref.digest, "compute dtype": run.recipe.model.compute_dtype,
    }  # fmt: skip


def score(run: Run, ref: ModelRef, keep: Callable[[int, np.ndarray], None] | None = None) -> scoring.Scores:
    """Return the scores of all examples under a model; `keep` is given their hidden states (`scoring.score`)."""
    model, params = ref.load(run.mesh)
    recipe, d = run.recipe, run.recipe.dataset
    rows = recipe.score.batch_size or d.batch_size // recipe.train.micro_batches
    return scoring.score(
        model, params, run.dataset, seq_len=d.seq_len, batch_size=rows, shifted=recipe.score.shifted,
        mesh=run.mesh, chunk_tokens=recipe.train.head_chunk_tokens, keep=keep,
    )  # fmt: skip


def of_arms(
    run: Run, number: int, names: Sequence[str], weak: ModelRef, strong: ModelRef
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return ({arm: its sampling probabilities}, {round, and arm: report}) of the arms that draw by some.

    The scores are those of M_t and of M_{t-1}, `strong` and `weak`, or of the arm's weak agent from elsewhere.
    """
    found, controls = run.recipe.arms(), run.recipe.controls
    weak_of = lambda name: weak if found[name].weak.path is None else run.ref(str(found[name].weak.path))
    probs, reports = {}, {}
    # Those without a curriculum of their own draw by the joint stage's, whether that does or not.
    shared = [name for name in names if name == "joint" or controls[name].curriculum is None]
    if any(found[name].resample for name in shared):
        c = run.recipe.joint.curriculum or run.recipe.curriculum
        made, reports[f"round {number}"] = curriculum_of(run, number, weak_of("joint"), strong, c)
        probs = {name: made for name in shared if found[name].resample}
    for name in names:
        if name not in shared and (c := controls[name].curriculum) is not None:
            made, reports[f"round {number}, {name}"] = curriculum_of(run, number, weak_of(name), strong, c, name)
            probs[name] = made
    return probs, reports


def curriculum_of(
    run: Run, number: int, weak: ModelRef, strong: ModelRef, c: stage_config.CurriculumConfig, arm: str | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the sampling probabilities of a round, and their report; stop where they would leave a handful.

    Args:
        arm: whose own curriculum `c` is; None: it is the joint stage's, and of all that have none of their own.
    """
    # Uniform draws need no scores.
    found = {} if c.control == "uniform" else {"weak": scores(run, weak), "strong": scores(run, strong)}
    probs, report = probabilities(c, found, len(run.dataset), run.recipe.seed)
    name = f"round-{number}" if arm is None else f"round-{number}-{arm}"
    if (share := report["effective_share"]) < c.min_effective_share:
        path = run.work / "curriculum" / f"{name}-collapsed.json"  # nothing of a finished run is touched
        processes.by_first(lambda: _write(path, report))
        raise ValueError(f"{collapse(c, report, len(probs))}. Report: {path}")
    path = run.work / "curriculum" / f"{name}.json"

    def work() -> dict[str, Any]:
        processes.by_first(lambda: _write(path, report, probs))
        return report

    inputs = {
        **c.model_dump(exclude={"dedup", "multiplier", "min_effective_share", "control"}),
        **{role: f"{zlib.crc32(s.entropy.tobytes()):08x}" for role, s in found.items()},
    }
    if c.control != "none":
        inputs |= {"control": c.control, "seed": run.recipe.seed}
    report = run.stage(f"curriculum-{number}" if arm is None else f"curriculum-{number}-{arm}", inputs, work)
    run.say(f"curriculum: effective sample size {share:.1%}, shares {_percent(report['term_shares'])}")
    # From the file, because another machine may round the sums above otherwise, and go on with this one's work.
    return np.load(path.with_suffix(".npy")), report


def probabilities(
    c: stage_config.CurriculumConfig, found: Mapping[str, scoring.Scores], n: int, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the sampling probabilities of n examples, and a report.

    Args:
        found: scores of the "weak" and the "strong" agent; uniform draws need none.
        seed: of random weights.
    """
    entropies = {role: found[role].entropy if role in found else np.zeros(n) for role in ("weak", "strong")}
    parts = curriculum.controlled_terms(
        c.control, entropies["weak"], entropies["strong"], c.alpha, c.beta, c.gamma, c.variant, c.normalize_terms,
        c.uniform_share, seed,
    )  # fmt: skip
    probs = np.sum(list(parts.values()), axis=0)
    share = curriculum.effective_share(probs)
    report = {
        "effective_share": share,
        "effective_examples": share * len(probs),
        "term_shares": curriculum.term_shares(parts),
        **{f"entropy_{role}": _quantiles(s.entropy) for role, s in found.items()},
        "entropy_fell_on": float(np.mean(entropies["strong"] < entropies["weak"])),
    }
    return probs, report


def collapse(c: stage_config.CurriculumConfig, report: Mapping[str, Any], n: int) -> str:
    """Return why a curriculum over `n` examples is not accepted, and what to do."""
    share = report["effective_share"]
    return (
        f"the curriculum collapses: its effective sample size is {share * n:.0f} of {n} examples "
        f"({share:.1%}, curriculum.min_effective_share is {c.min_effective_share:.1%}). Entropy fell on "
        f"{report['entropy_fell_on']:.1%} of the examples only, so the weight on its fall goes to a few: a weak "
        f"agent that is confidently wrong does this. Mix with uniform draws (curriculum.uniform_share=0.5), lower "
        f"curriculum.beta, or lower curriculum.min_effective_share to go on as it is"
    )


def _write(path: Path, report: Mapping[str, Any], probs: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if probs is not None:
        np.save(path.with_suffix(".npy"), probs)
    path.write_text(json.dumps(report, indent=2) + "\n")


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{q:.0%}": float(np.quantile(values, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
