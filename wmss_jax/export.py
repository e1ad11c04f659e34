"""The shipped model: the strong role alone, as a Hugging Face directory."""

import contextlib
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from wmss_jax import card, checkpoint, config, encoding, hf, objectives, peft, stages
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
            base = str(run.recipe.model.path)
            peft.save(model, adapter, out, base=base, tokenizer_from=ref.assets, files=_files(run, ref))
        return {"export": str(out)}

    def write_model() -> dict[str, Any]:
        stages.clear_partial(out)
        model, params = ref.load(run.mesh)
        if lam is not None and calibrate == "lambda":
            last = jnp.int32(checkpoint.read_meta(ref.directory)["step"])
            params = scale_logits(params, float(objectives.at(lam, last)))
        if not out.exists():
            hf.save(model, params, out, tokenizer_from=ref.assets, files=_files(run, ref))
        return {"export": str(out)}

    inputs = {"model": ref.digest, "calibrate": calibrate, "lam": repr(lam)}
    if run.recipe.export.format == "adapter":
        return run.stage("export", {**inputs, "format": "adapter"}, write_adapter, out)["export"]
    return run.stage("export", inputs, write_model, out)["export"]


def _files(run: Run, ref: ModelRef) -> dict[str, str]:
    """Return the model card, the recipe, and generation settings that stop where answers were trained to end."""
    facts = {
        "recipe": f"digest {config.digest(run.recipe)}",
        "calibration": "λ folded into the final norm" if run.recipe.export.calibrate == "lambda" else None,
    }
    files = card.files(run.work.absolute().name, checkpoint.read_meta(ref.directory), facts)
    stop_id = run.tokenizer.eos_token_id
    if run.recipe.dataset.chat_template and run.tokenizer.chat_template is not None:
        with contextlib.suppress(ValueError):  # texts may be trained on with a template that is none for answers
            stop_id = encoding.stop_token(run.tokenizer)
    return files if stop_id is None else {**files, "generation_config.json": hf.generation_config(ref.assets, stop_id)}


def scale_logits(params: PyTree[Array], factor: float) -> PyTree[Array]:
    """Return parameters whose logits are `factor` times those of `params`: the factor goes into the final norm.

    A branch trained under λ-mixed logits is over-confident by 1/λ by itself; λ makes sampling at temperature 1 fit
    again, and greedy decoding stays the same. The final norm, because it is linear in its scale and is there in tied
    and untied models alike.
    """
    scale_D = params["final_norm"]["scale"]
    return {**params, "final_norm": {"scale": (scale_D * factor).astype(scale_D.dtype)}}
