"""The agents of a training stage: the model of every role, and the way to its parameters.

Parameters are whole; or, with LoRA, an adapter on a base that is loaded once and serves every role; or, where a frozen
agent's hidden states are cached, those of its head alone.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from wmss_jax import arms
from wmss_jax.models import CausalLM
from wmss_jax.models.lora import Lora
from wmss_jax.stages import ModelRef
from wmss_jax.weak_source import Source

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
    refs: Mapping[str, ModelRef],
    trained: tuple[str, ...],
    mesh: Mesh | None,
    param_dtype: str,
    cached: frozenset[str],
    source: Source | None = None,
) -> Agents:
    """Return agents whose parameters are trained as they are.

    Args:
        refs: {role: where its parameters lie}.
        cached: frozen roles whose hidden states come with the batch.
        source: makes the weak role's parameters, of the base under that name in `refs`, or without any there. Here if
            that is done once; if in every step, it is the step's to call.
    """
    frozen = [role for role in refs if role not in trained]
    models = {role: ref.model.base for role, ref in refs.items()}  # adapters come merged
    if source is not None:
        models["weak"] = source.model(models["strong"])

    def load_frozen() -> dict[str, PyTree[Array]]:
        loaded = {role: _load(refs[role], mesh, role in cached) for role in frozen}
        if source is None or source.moving:
            return loaded
        shardings = None if mesh is None else jax.tree.map(lambda x: x.sharding, loaded["weak"])
        make = jax.jit(functools.partial(source, None), out_shardings=shardings)
        return {**loaded, "weak": make(loaded)}

    return Agents(
        models=arms.sharing_tokens(models),
        trained=lambda: {role: refs[role].load(mesh, param_dtype)[1] for role in trained},
        frozen=load_frozen,
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
    """Return agents that share the strong one's base; trained ones have adapters, fresh where they come without.

    A frozen one that is neither that base nor an adapter on it, such as a teacher, has its own parameters beside it.
    """
    base = refs["strong"].base or refs["strong"]
    fresh = dataclasses.replace(base.model, lora=lora)
    apart = {role for role, ref in refs.items() if role not in trained and base not in (ref, ref.base)}
    with_adapter = {role for role, ref in refs.items() if ref.base is not None and role not in cached | apart}
    models = {role: ref.model if role in with_adapter else base.model for role, ref in refs.items()}
    models |= {role: refs[role].model.base for role in apart}  # an adapter from elsewhere comes merged

    def adapter(role: str) -> PyTree[Array]:
        if role in with_adapter:
            return refs[role].load_stored(mesh, param_dtype)[1]
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(role.encode()))
        return fresh.init(key, param_dtype, mesh)

    return Agents(
        models=arms.sharing_tokens({**models, **dict.fromkeys(trained, fresh)}),
        trained=lambda: {role: adapter(role) for role in trained},
        frozen=lambda: (
            {"base": base.load(mesh)[1]}
            | {role: adapter(role) for role in with_adapter if role not in trained}
            | {role: _load(refs[role], mesh, role in cached) for role in apart}
        ),
        base=base,
    )


def _load(ref: ModelRef, mesh: Mesh | None, head_only: bool) -> PyTree[Array]:
    return ref.load_head(mesh) if head_only else ref.load(mesh)[1]
