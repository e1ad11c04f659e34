"""The shipped model: the strong role alone, as a Hugging Face directory."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from wmss_jax import checkpoint, hf, objectives, peft, stages
from wmss_jax.runs import Run
from wmss_jax.stages import ModelRef


def check(calibrate: str, objective: objectives.Objective) -> None:
    """Raise ValueError if a model trained on `objective` cannot be calibrated; asked before it is trained."""
    lam = getattr(objective, "lam", None)
    last = lam.stop if isinstance(lam, objectives.Linear) else lam
    if calibrate == "lambda" and not last:
        raise ValueError(
            f"export.calibrate: lambda needs a joint.objective with lam > 0, unlike {objective}; set it to none"
        )


def export(run: Run, ref: ModelRef, objective: objectives.Objective) -> str:
    """Write the shipped model as a Hugging Face directory, or its adapter as PEFT's, and return where it lies."""
    calibrate, out = run.recipe.export.calibrate, run.work / "export"
    check(calibrate, objective)
    lam = getattr(objective, "lam", None)

    def write_adapter() -> dict[str, Any]:
        stages.clear_partial(out)
        if not out.exists():
            model, adapter = ref.load_stored(run.mesh)
            peft.save(model, adapter, out, base=str(run.recipe.model.path), tokenizer_from=ref.assets)
        return {"export": str(out)}

    def write_model() -> dict[str, Any]:
        stages.clear_partial(out)
        model, params = ref.load(run.mesh)
        if lam is not None and calibrate == "lambda":
            last = jnp.int32(checkpoint.read_meta(ref.directory)["step"])
            params = scale_logits(params, float(objectives.at(lam, last)))
        if not out.exists():
            hf.save(model, params, out, tokenizer_from=ref.assets)
        return {"export": str(out)}

    inputs = {"model": ref.digest, "calibrate": calibrate, "lam": repr(lam)}
    if run.recipe.export.format == "adapter":
        return run.stage("export", {**inputs, "format": "adapter"}, write_adapter, out)["export"]
    return run.stage("export", inputs, write_model, out)["export"]


def scale_logits(params: PyTree[Array], factor: float) -> PyTree[Array]:
    """Return parameters whose logits are `factor` times those of `params`: the factor goes into the final norm.

    A branch trained under λ-mixed logits is over-confident by 1/λ by itself; λ makes sampling at temperature 1 fit
    again, and greedy decoding stays the same. The final norm, because it is linear in its scale and is there in tied
    and untied models alike.
    """
    scale_D = params["final_norm"]["scale"]
    return {**params, "final_norm": {"scale": (scale_D * factor).astype(scale_D.dtype)}}
