"""Weak agents that are made of other parameters: pure functions (state, frozen) -> parameters of the role "weak".

A source is a frozen dataclass, static under jit. One that is `moving` is called in every step, with the state before
it; the others once, when the parameters are loaded. A checkpoint needs none: its parameters are loaded as they are.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from wmss_jax.models import CausalLM


@runtime_checkable
class Source(Protocol):
    """Makes the weak role's parameters.

    Attributes:
        moving: whether they depend on the state, and so change in every step.
        of_base: whether they depend on the base, which is then the frozen role "weak".
    """

    moving: ClassVar[bool]
    of_base: ClassVar[bool]

    def __call__(self, state: Any, frozen: Mapping[str, PyTree[Array]]) -> PyTree[Array]: ...

    def model(self, strong: CausalLM) -> CausalLM:
        """Return the weak role's model."""
        ...


@dataclasses.dataclass(frozen=True)
class Ema:
    """The average of the strong role over the steps so far, Σ (1-d)·d^(n-i)·strong_i, beginning with the first.

    `optim.make` keeps it in the optimizer's state, so it is saved and sharded like that; no base is loaded.

    Attributes:
        decay: d in [0, 1), per step.
    """

    decay: float
    moving: ClassVar[bool] = True
    of_base: ClassVar[bool] = False

    def __call__(self, state: Any, frozen: Mapping[str, PyTree[Array]]) -> PyTree[Array]:
        del frozen
        average = optax.tree.get(state.opt_state, "weak_average")["strong"]
        return jax.tree.map(lambda mean, p: mean.astype(p.dtype), average, state.params["strong"])

    def model(self, strong: CausalLM) -> CausalLM:
        return strong


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """(1 - t)·base + t·strong, parameter by parameter, in the dtype of the strong role.

    Attributes:
        t: in [0, 1].
    """

    t: float
    moving: ClassVar[bool] = True
    of_base: ClassVar[bool] = True

    def __call__(self, state: Any, frozen: Mapping[str, PyTree[Array]]) -> PyTree[Array]:
        blend = lambda base, p: ((1 - self.t) * base.astype(jnp.float32) + self.t * p).astype(p.dtype)
        return jax.tree.map(blend, frozen["weak"], state.params["strong"])

    def model(self, strong: CausalLM) -> CausalLM:
        return strong


@dataclasses.dataclass(frozen=True)
class EarlyExit:
    """The strong role's own first layers, final norm and head (the logit lens' reading: no head is trained for it).

    Attributes:
        layer: layers before the exit, from 1 to one less than there are.
    """

    layer: int
    moving: ClassVar[bool] = True
    of_base: ClassVar[bool] = False

    def __call__(self, state: Any, frozen: Mapping[str, PyTree[Array]]) -> PyTree[Array]:
        del frozen
        strong = state.params["strong"]
        return {**strong, "layers": jax.tree.map(lambda x: x[: self.layer], strong["layers"])}

    def model(self, strong: CausalLM) -> CausalLM:
        """Return the model of the first layers.

        Raises:
            ValueError: the model has no more layers than that, or they are no plain stack.
        """
        layers = strong.sizes["L"]
        if not self.layer < layers:
            raise ValueError(f"weak.source: early_exit after layer {self.layer} of {layers}: choose 1 to {layers - 1}")
        config = strong.config
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        of_layers = {name: x[: self.layer] for name, x in fields.items() if type(x) is tuple and len(x) == layers}
        short = dataclasses.replace(strong, config=dataclasses.replace(config, **of_layers, num_layers=self.layer))
        cut = jax.tree.map(lambda x: (self.layer, *x.shape[1:]), strong.abstract()["layers"])
        same_shapes = cut == jax.tree.map(lambda x: x.shape, short.abstract()["layers"])
        if not same_shapes or short.config.kinds != config.kinds[: self.layer]:
            raise ValueError(f"weak.source: early_exit: the layers of {strong.arch} are no plain stack to leave early")
        return short


@dataclasses.dataclass(frozen=True)
class Noise:
    """The base with Gaussian noise on every matrix, norms and biases as they are.

    Attributes:
        std: its standard deviation, in root mean squares of the matrix (of all layers together).
        seed: with the parameter's path, what the noise is a function of.
    """

    std: float
    seed: int = 0
    moving: ClassVar[bool] = False
    of_base: ClassVar[bool] = True

    def __call__(self, state: Any, frozen: Mapping[str, PyTree[Array]]) -> PyTree[Array]:
        del state

        def noisy(path: tuple, base: Array) -> Array:
            name = jax.tree_util.keystr(path)
            if "norm" in name or "bias" in name:
                return base
            key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(name.encode()) & 0x7FFFFFFF)
            wide = base.astype(jnp.float32)
            rms = jnp.sqrt(jnp.mean(jnp.square(wide)))
            return (wide + self.std * rms * jax.random.normal(key, base.shape)).astype(base.dtype)

        return jax.tree_util.tree_map_with_path(noisy, frozen["weak"])

    def model(self, strong: CausalLM) -> CausalLM:
        return strong
