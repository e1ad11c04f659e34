"""Model FLOPs per token, from the config: what a step has to compute, whatever the program computes besides.

    forward = flops.forward(model, seq_len=4096)
    flops.step([(forward, "trained"), (forward, "resident")])       # a strong role and its frozen weak one

They are counted here, not by XLA: `cost_analysis` counts the body of a scan over the layers once.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from wmss_jax.models import CausalLM
from wmss_jax.models.table import Row


class Cost(NamedTuple):
    """FLOPs per token of one forward pass; a product of matrices has 2 for each of their multiplications.

    Attributes:
        body: products with the matrices of the layers.
        attention: products of queries with keys, and of probabilities with values.
        head: hidden states to logits.
    """

    body: float
    attention: float
    head: float


def forward(model: CausalLM, seq_len: int) -> Cost:
    """Return the FLOPs per token of a forward pass over rows of `seq_len` tokens.

    PaLM's count (arXiv 2204.02311, appendix B; its 6N + 12·L·H·Q·T is forward and backward): 2 for every parameter of
    a matrix, 4·N·H·T for the attention of a layer, as if every query saw the whole row; neither the causal mask nor
    segments or windows are subtracted. An adapter's own two thin matrices are left out.
    """
    model, sizes = model.base, model.config.sizes
    # Norms, scales and biases are vectors in the checkpoint, whatever their shape here.
    matrices = [row for row in model.rows if row.path.startswith("layers.") and len(row.their_shape(sizes)) > 1]
    return Cost(
        body=2 * sum(math.prod(row.our_shape(sizes)) * _used(row, sizes) for row in matrices),
        attention=4 * sizes["L"] * sizes["N"] * sizes["H"] * seq_len,
        head=2 * sizes["D"] * sizes["V"],
    )


def _used(row: Row, sizes: Mapping[str, int]) -> float:
    """Return which share of a parameter one token meets: of experts, A of E."""
    return sizes["A"] / sizes["E"] if "E" in row.stacks else 1


Use = Literal["trained", "adapted", "resident", "cached"]

# What a step does with a role, in forward passes of (body, attention, head). A backward pass costs one for the gradient
# of a product's input and one for that of its matrix; in attention both factors are inputs.
PASSES: dict[Use, tuple[int, int, int]] = {
    "trained": (3, 3, 3),
    "adapted": (2, 3, 2),  # LoRA: no gradient of the base's matrices, the head's among them
    "resident": (1, 1, 1),  # frozen
    "cached": (0, 0, 1),  # frozen, its final hidden states read from disk
}


def step(roles: Iterable[tuple[Cost, Use]], remat: bool = False) -> float:
    """Return the FLOPs per token of a training step on these roles (DESIGN.md §6).

    Args:
        roles: each role's forward pass and what the step does with it.
        remat: count, too, what the backward pass recomputes where it recomputes whole layers. That is work of the
            hardware, not of the model: utilisation (MFU) is defined without it.
    """
    total = 0.0
    for cost, use in roles:
        total += sum(flops * passes for flops, passes in zip(cost, PASSES[use], strict=True))
        if remat and use in ("trained", "adapted"):
            total += cost.body + cost.attention
    return total
