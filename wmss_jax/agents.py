"""The agents of a training stage: the model of every role, and the way to its parameters.

Parameters are whole; or, with LoRA, an adapter on a base that is loaded once and serves every role; or, where a frozen
agent's hidden states are cached, those of its head alone.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from wmss_jax.models import CausalLM
from wmss_jax.models.lora import Lora
from wmss_jax.stages import ModelRef

Load = Callable[[], Mapping[str, PyTree[Array]]]


@dataclasses.dataclass(frozen=True)
class Agents:
    """What a step is made of, by role; the parameters are read when `trained` and `frozen` are called.

    Attributes:
        base: what adapters are trained on; None where whole models are trained.
    """

    models: Mapping[str, CausalLM]
    trained: Load
    frozen: Load
    base: ModelRef | None = None


def whole(
    refs: Mapping[str, ModelRef], trained: tuple[str, ...], mesh: Mesh | None, param_dtype: str, cached: frozenset[str]
) -> Agents:
    """Return agents whose parameters are trained as they are.

    Args:
        refs: {role: where its parameters lie}.
        cached: frozen roles whose hidden states come with the batch.
    """
    frozen = [role for role in refs if role not in trained]
    load = lambda role: refs[role].load_head(mesh) if role in cached else refs[role].load(mesh)[1]
    return Agents(
        models={role: ref.model for role, ref in refs.items()},
        trained=lambda: {role: refs[role].load(mesh, param_dtype)[1] for role in trained},
        frozen=lambda: {role: load(role) for role in frozen},
    )


def adapted(
    refs: Mapping[str, ModelRef],
    trained: tuple[str, ...],
    mesh: Mesh | None,
    param_dtype: str,
    cached: frozenset[str],
    lora: Lora,
    seed: int,
) -> Agents:
    """Return agents that share the strong one's base; trained ones have adapters, fresh where they come without."""
    base = refs["strong"].base or refs["strong"]
    fresh = dataclasses.replace(base.model, lora=lora)
    with_adapter = {role for role, ref in refs.items() if ref.base is not None and role not in cached}
    models = {role: ref.model if role in with_adapter else base.model for role, ref in refs.items()}

    def adapter(role: str) -> PyTree[Array]:
        if role in with_adapter:
            return refs[role].load_stored(mesh, param_dtype)[1]
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(role.encode()))
        return fresh.init(key, param_dtype, mesh)

    return Agents(
        models={**models, **dict.fromkeys(trained, fresh)},
        trained=lambda: {role: adapter(role) for role in trained},
        frozen=lambda: {"base": base.load(mesh)[1]} | {r: adapter(r) for r in with_adapter if r not in trained},
        base=base,
    )
