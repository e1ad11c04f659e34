"""wmss_jax: weak-driven learning for language models, in JAX. `import wmss_jax as wmss`.

    model, params = wmss.load("path/or/hub-id")                       # Hugging Face directory -> pure model, params
    objective = wmss.objectives.LogitMix(lam=0.5)
    state = wmss.init_state({"strong": params}, tx)
    step = wmss.make_train_step(model, objective, tx)                 # (state, frozen, batch) -> (state, metrics)
    state, metrics = step(state, {"weak": weak_params}, batch)
    wmss.save(model, state.params["strong"], "out", tokenizer_from="path/or/hub-id")

Names load what they need when first used: importing the package imports neither jax nor anything heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmss_jax import curriculum, objectives, packing
    from wmss_jax.hf import load, load_branches, save
    from wmss_jax.sharding import make_mesh
    from wmss_jax.step import loss, make_eval_step, make_train_step, score
    from wmss_jax.train_state import TrainState, init_state

__version__ = "0.1.0"

_MODULES = ("curriculum", "objectives", "packing")
_HOME = {
    "load": "hf",
    "load_branches": "hf",
    "save": "hf",
    "make_mesh": "sharding",
    "TrainState": "train_state",
    "init_state": "train_state",
    "loss": "step",
    "make_eval_step": "step",
    "make_train_step": "step",
    "score": "step",
}

__all__ = [
    "TrainState",
    "curriculum",
    "init_state",
    "load",
    "load_branches",
    "loss",
    "make_eval_step",
    "make_mesh",
    "make_train_step",
    "objectives",
    "packing",
    "save",
    "score",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
