"""Which examples the joint stage sees: scores of the weak and the strong agent, and the curriculum made of them."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from wmss_jax import curriculum, scoring
from wmss_jax.runs import Run
from wmss_jax.stages import ModelRef


def scores(run: Run, ref: ModelRef) -> scoring.Scores:
    """Return the scores of all examples under a model; made once per model."""
    recipe, digest = run.recipe, ref.digest
    path = run.work / "scores" / f"{digest}.parquet"

    def work() -> dict[str, Any]:
        scoring.write(path, score(run, ref), run.dataset, digest, recipe.score.shifted)
        return {"scores": path.relative_to(run.work).as_posix(), "model": str(ref.directory)}

    inputs = {"model": digest, "data": run.dataset.fingerprint, "shifted": recipe.score.shifted}
    return scoring.read(run.work / run.stage(f"score-{digest}", inputs, work)["scores"], run.dataset)


def score(run: Run, ref: ModelRef) -> scoring.Scores:
    model, params = ref.load(run.mesh)
    recipe, d = run.recipe, run.recipe.dataset
    rows = recipe.score.batch_size or d.batch_size // recipe.train.micro_batches
    return scoring.score(
        model, params, run.dataset, seq_len=d.seq_len, batch_size=rows, shifted=recipe.score.shifted,
        mesh=run.mesh, chunk_tokens=recipe.train.head_chunk_tokens,
    )  # fmt: skip


def curriculum_of(run: Run, number: int, weak: ModelRef, strong: ModelRef) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the sampling probabilities of a round, and their report; stop where they would leave a handful."""
    c = run.recipe.curriculum
    found = {"weak": scores(run, weak), "strong": scores(run, strong)}
    parts = curriculum.terms(
        found["weak"].entropy, found["strong"].entropy, c.alpha, c.beta, c.gamma, c.variant, c.normalize_terms,
        c.uniform_share,
    )  # fmt: skip
    probs = np.sum(list(parts.values()), axis=0)
    share = curriculum.effective_share(probs)
    report = {
        "effective_share": share,
        "effective_examples": share * len(probs),
        "term_shares": curriculum.term_shares(parts),
        **{f"entropy_{role}": _quantiles(s.entropy) for role, s in found.items()},
        "entropy_fell_on": float(np.mean(found["strong"].entropy < found["weak"].entropy)),
    }
    path = run.work / "curriculum" / f"round-{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if share < c.min_effective_share:
        path = path.with_name(f"round-{number}-collapsed.json")  # another name: nothing of a finished run is touched
        path.write_text(json.dumps(report, indent=2) + "\n")
        raise ValueError(
            f"the curriculum collapses: its effective sample size is {share * len(probs):.0f} of {len(probs)} examples "
            f"({share:.1%}, curriculum.min_effective_share is {c.min_effective_share:.1%}). Entropy fell on "
            f"{report['entropy_fell_on']:.1%} of the examples only, so the weight on its fall goes to a few: a weak "
            f"agent that is confidently wrong does this. Mix with uniform draws (curriculum.uniform_share=0.5), lower "
            f"curriculum.beta, or lower curriculum.min_effective_share to go on as it is. Report: {path}"
        )

    def work() -> dict[str, Any]:
        np.save(path.with_suffix(".npy"), probs)
        path.write_text(json.dumps(report, indent=2) + "\n")
        return report

    inputs = {
        **c.model_dump(exclude={"dedup", "multiplier", "min_effective_share"}),
        **{role: f"{zlib.crc32(s.entropy.tobytes()):08x}" for role, s in found.items()},
    }
    report = run.stage(f"curriculum-{number}", inputs, work)
    run.say(f"curriculum: effective sample size {share:.1%}, shares {_percent(report['term_shares'])}")
    # From the file, because another machine may round the sums above otherwise, and go on with this one's work.
    return np.load(path.with_suffix(".npy")), report


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{q:.0%}": float(np.quantile(values, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
