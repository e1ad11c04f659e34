"""Which mesh, remat policy and micro-batch are fastest on a topology, of those that fit."""

from collections.abc import Callable, Iterator, Sequence

import jax

from wmss_jax import config, plan, programs
from wmss_jax.models import decoder

MOST_TENSOR = 8  # beyond it a layer's products are too thin, and GPUs have no faster link than that many share
MOST_ROWS = 16  # a group of devices; more changes little but the memory
MOST_COPIES = 4  # whole copies of the parameters, where there is room for them


def search(
    recipe: config.RunConfig,
    name: programs.Step,
    topology: str,
    devices: Sequence[jax.Device],
    say: Callable[[str], None],
) -> list[plan.Plan]:
    """Return the plans that fit, fastest first.

    For every mesh the rows of a micro-batch are doubled as long as they fit, first with the policy that recomputes
    least; where it no longer does, with the next. The batch stays the recipe's where it can be split so, else it is
    the next larger one that can.

    Args:
        say: is told of every plan as it is made.

    Raises:
        ValueError: no mesh divides batch and model, or the recipe asks for what the devices cannot do.
    """
    found, refusals = [], []
    for mesh in _meshes(len(devices)):
        rows, policies = 1, list(decoder.REMAT_POLICIES) if name != "score" else ["full"]
        while policies and rows <= MOST_ROWS:
            tried = _varied(recipe, mesh, policies[0], rows)
            try:
                verdict, made = _verdict(tried, name, topology, devices)
            except ValueError as error:  # the mesh does not divide the model
                say(f"mesh {_shown(mesh)}: {error}")
                refusals.append(error)
                break
            say(f"mesh {_shown(mesh)}, remat {policies[0]}, {rows} rows: {verdict}")
            if made is None:
                policies.pop(0)
            else:
                found.append(made)
                rows *= 2
    if len(refusals) == len(list(_meshes(len(devices)))):
        raise refusals[0]
    return sorted(found, key=lambda each: -each.tokens_per_s)


def table(plans: Sequence[plan.Plan]) -> str:
    """Return the plans as a table, the fastest first."""
    if not plans:
        return "nothing fits: take more or larger devices, a shorter dataset.seq_len, or lora"
    lines = ["mesh.data  mesh.fsdp  mesh.tensor  model.remat  rows x parts  GB      tokens/s at most  by"]
    for each in plans:
        m, slowest = each.mesh, max(each.seconds, key=each.seconds.__getitem__)
        rows = each.rows // (m["data"] * m["fsdp"] * each.micro_batches)
        lines.append(
            f"{m['data']:>9}  {m['fsdp']:>9}  {m['tensor']:>11}  {each.remat:>11}  {rows:>4} x {each.micro_batches:<5}"
            f"  {each.total / 1e9:>6.1f}  {each.tokens_per_s:>16,.0f}  {slowest}"
        )
    return "\n".join(lines)


def _verdict(
    recipe: config.RunConfig, name: programs.Step, topology: str, devices: Sequence[jax.Device]
) -> tuple[str, plan.Plan | None]:
    try:
        made = plan.measure(recipe, name, topology, devices)
    except plan.OutOfMemory:
        return "does not fit", None
    if not made.fits:
        return f"does not fit ({made.total / 1e9:.1f} GB)", None
    return f"{made.total / 1e9:.1f} GB, {made.tokens_per_s:,.0f} tokens/s at most", made


def _meshes(devices: int) -> Iterator[tuple[int, int, int]]:
    """Give (data, fsdp, tensor), powers of two but for what is left over for fsdp."""
    tensor = 1
    while tensor <= min(MOST_TENSOR, devices):
        data = 1
        while data <= MOST_COPIES and devices % (tensor * data) == 0:
            yield data, devices // (tensor * data), tensor
            data *= 2
        tensor *= 2


def _varied(recipe: config.RunConfig, mesh: tuple[int, int, int], remat: str, rows: int) -> config.RunConfig:
    data, fsdp, tensor = mesh
    shards = data * fsdp
    parts = -(-recipe.dataset.batch_size // (shards * rows))
    put = lambda section, **values: section.model_copy(update=values)
    return put(
        recipe,
        mesh=put(recipe.mesh, data=data, fsdp=fsdp, tensor=tensor),
        model=put(recipe.model, remat=remat),
        train=put(recipe.train, micro_batches=parts),
        dataset=put(recipe.dataset, batch_size=shards * rows * parts),
        score=put(recipe.score, batch_size=shards * rows),
    )


def _shown(mesh: tuple[int, int, int]) -> str:
    return " x ".join(str(size) for size in mesh)
