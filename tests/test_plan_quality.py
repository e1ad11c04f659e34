"""What compiled steps must not do: gather all layers at once, send logits, keep what was given away, and the like."""

import math

import plans
import pytest

from wmss_jax import hlo

V, D, F, L = (plans.CONFIG[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"))
N, K, H = (plans.CONFIG[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
LAYER = 2 * D * N * H + 2 * D * K * H + 3 * D * F  # parameters of a layer's matrices
T = 128
# topology: (overrides, groups of devices that share a batch, tensor)
TARGETS = {"v5e:2x4": (("mesh.tensor=2",), 4, 2), "h100:1x1x8": ((), 8, 1)}

each_target = pytest.mark.parametrize("topology", [pytest.param(name, marks=pytest.mark.slow) for name in TARGETS])
pytestmark = pytest.mark.filterwarnings(plans.TRITON_IS_DEPRECATED)


def collectives(topology: str) -> tuple[list[hlo.Collective], list[hlo.Collective]]:
    """Return those inside loops and those outside, of a joint step."""
    compiled, _ = plans.planned(topology, "joint", *plans.FEW_TOKENS, *TARGETS[topology][0])
    found = hlo.collectives(compiled.text)
    return [c for c in found if c.depth], [c for c in found if not c.depth]


def total(found: list[hlo.Collective], *kinds: str) -> float:
    """Return the bytes of these kinds, over all turns."""
    return sum(c.bytes * c.times for c in found if c.kind in kinds)


@each_target
def test_layers_are_gathered_one_at_a_time(topology):
    inside, outside = collectives(topology)
    _, shards, tensor = TARGETS[topology]
    assert {c.times for c in inside} == {L}
    once = 2 * LAYER * L / tensor
    passes = total(inside, "all-gather") / once
    assert 3 <= passes <= 4, "frozen forward, forward, and backward, which may gather anew what it recomputed with"
    elements = sum(math.prod(shape) for c in outside if c.kind == "all-gather" for shape in c.shapes)
    tokens_and_norms = 2**14
    assert 0 <= elements - 2 * V * D / tensor <= tokens_and_norms, "the heads, and nothing else"


@each_target
def test_heads_are_gathered_in_the_type_that_they_are_used_in(topology):
    _, outside = collectives(topology)
    heads = sum(
        c.bytes for c in outside if c.kind == "all-gather" and any(V // TARGETS[topology][2] in s for s in c.shapes)
    )
    assert heads == pytest.approx(2 * 2 * V * D / TARGETS[topology][2], rel=0.01)


@each_target
def test_nothing_of_the_vocabularys_size_is_sent_in_a_loop(topology):
    inside, outside = collectives(topology)
    sizes = {V, V // TARGETS[topology][2]}
    with_vocabulary = lambda found: [c for c in found if any(sizes & set(shape) for shape in c.shapes)]
    assert with_vocabulary(outside), "the heads are"
    assert not with_vocabulary(inside)


@each_target
def test_gradients_are_added_up_once_and_where_their_slice_lies(topology):
    inside, outside = collectives(topology)
    tensor = TARGETS[topology][2]
    of_layers = total(inside, "reduce-scatter") / (4 * LAYER * L / tensor)
    assert 0.8 <= of_layers <= 1.01, "a TPU all-reduces the projection of the heads"
    head = total(outside, "reduce-scatter") / (4 * V * D / tensor)
    assert head == pytest.approx(1, abs=0.01)
    largest = max(max(map(math.prod, c.shapes)) for c in outside if c.kind == "all-reduce")
    assert largest <= T * D, "no parameter's gradient"


@each_target
def test_no_device_gets_the_whole_groups_hidden_states(topology):
    """The gradient of a sharded embedding, left to the partitioner, takes them."""
    inside, outside = collectives(topology)
    _, shards, tensor = TARGETS[topology]
    rows = shards  # one a group
    elements = [math.prod(shape) for c in inside + outside for shape in c.shapes if not {V, V // tensor} & set(shape)]
    assert max(elements) < rows * T * D


@each_target
def test_state_given_away_is_used_again(topology):
    _, plan = plans.planned(topology, "joint", *plans.FEW_TOKENS, *TARGETS[topology][0])
    assert plan.memory["results"] < 2**13, "metrics alone"
    assert plan.attention == {"v": "splash", "h": "triton"}[topology[0]]
    assert plan.memory["optimizer"] == pytest.approx(2 * plan.memory["parameters"], rel=0.01)
