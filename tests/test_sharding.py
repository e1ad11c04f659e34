"""Eight simulated devices against one, and what the compiled programs communicate and hold."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

import wmss_jax as wmss
from wmss_jax import sharding
from wmss_jax.objectives import LogitMix, Sft

MODEL = tiny.model(num_layers=1)
MESHES = {"fsdp 8": (1, 8, 1), "data 2 × fsdp 2 × tensor 2": (2, 2, 2)}


@functools.cache
def losses(objective, mesh_shape=None, steps=50, micro_batches=1):
    mesh = None if mesh_shape is None else wmss.make_mesh(*mesh_shape)
    place = tiny.params if mesh is None else functools.partial(tiny.sharded, mesh=mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = wmss.init_state({"strong": place(MODEL, 0)}, tx)
    frozen = {"weak": place(MODEL, 1)} if "weak" in objective.roles else {}
    step = wmss.make_train_step(MODEL, objective, tx, mesh=mesh, chunk_tokens=10, micro_batches=micro_batches)
    out = []
    for seed in range(steps):
        state, metrics = step(state, frozen, tiny.batch(rows=16, seed=seed, segments=True))
        out.append(metrics["loss"])
    assert step._cache_size() == 1, "one compilation"
    return np.array(out)


@pytest.mark.parametrize("objective", [Sft(), LogitMix()])
@pytest.mark.parametrize("mesh_shape", MESHES.values(), ids=MESHES)
def test_eight_devices_equal_one(objective, mesh_shape):
    np.testing.assert_allclose(losses(objective, mesh_shape), losses(objective), rtol=1e-5)


def test_micro_batches_on_a_mesh_equal_whole_batches_on_one_device():
    """Each micro-batch takes every device's own rows; the sum is the same."""
    np.testing.assert_allclose(losses(LogitMix(), (2, 2, 2), 5, 2), losses(LogitMix())[:5], rtol=1e-5)


def test_scores_on_a_mesh_equal_one_device():
    batch, mesh = tiny.batch(segments=True), wmss.make_mesh(2, 2, 2)
    score = lambda params, mesh: jax.jit(functools.partial(wmss.score, MODEL, mesh=mesh, chunk_tokens=10))(
        params, batch
    )
    one, eight = score(tiny.params(MODEL), None), score(tiny.sharded(MODEL, 0, mesh), mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, eight)


def test_parameters_and_optimizer_state_are_born_sharded():
    mesh = wmss.make_mesh(1, 4, 2)
    params = MODEL.init(jax.random.key(0), mesh=mesh)
    assert params["unembed"].sharding.spec == P("fsdp", "tensor")
    assert params["layers"]["mlp"]["up_proj"].sharding.spec == P(None, "fsdp", "tensor")
    state = wmss.init_state({"strong": params}, optax.adamw(1e-3))
    moments = optax.tree.get(state.opt_state, "mu")["strong"]
    assert jax.tree.map(lambda x: x.sharding, moments) == jax.tree.map(lambda x: x.sharding, params)
    assert optax.tree.get(state.opt_state, "count").sharding.is_fully_replicated


@functools.cache
def compiled_step(mesh_shape, objective, T=64, V=4096):
    """The optimised HLO of a step whose vocabulary dwarfs everything else, at chunk = T/8 of a device's tokens."""
    model = tiny.model(num_layers=1, vocab_size=V)
    mesh = None if mesh_shape is None else wmss.make_mesh(*mesh_shape)
    shards = sharding.batch_shards(mesh)
    batch = tiny.batch(rows=shards, T=T, V=V)
    place = tiny.params if mesh is None else functools.partial(tiny.sharded, mesh=mesh)
    tx = optax.sgd(0.1)
    state = wmss.init_state({"strong": place(model, 0)}, tx)
    step = wmss.make_train_step(model, objective, tx, mesh=mesh, chunk_tokens=T // 8, z_loss=1e-4, diagnose_every=2)
    return step.lower(state, {"weak": place(model, 1)}, batch).compile().as_text()


def computations(hlo):
    """{name: lines} of every computation of an HLO module."""
    found, name = {}, None
    for line in hlo.splitlines():
        if line and not line.startswith((" ", "}")):
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def inside_loops(hlo):
    """The lines of all computations that a while loop's body reaches."""
    bodies = computations(hlo)
    seen, queue = set(), re.findall(r"body=%?([\w.\-]+)", hlo)
    while queue:
        name = queue.pop()
        if name not in seen and name in bodies:
            seen.add(name)
            text = "\n".join(bodies[name])
            queue += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", text)
            for branches in re.findall(r"branch_computations={([^}]*)}", text):
                queue += [branch.strip().lstrip("%") for branch in branches.split(",")]
    return [line for name in seen for line in bodies[name]]


def elements(line):
    """Sizes of all arrays in the result type of an HLO instruction."""
    result = line.split(" = ", 1)[-1].split("(%", 1)[0]
    return [
        int(np.prod([int(n) for n in dims.split(",") if n] or [1])) for dims in re.findall(r"\w+\[([\d,]*)\]", result)
    ]


COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")


@pytest.mark.parametrize("objective", [Sft(), LogitMix()])
@pytest.mark.parametrize("mesh_shape", MESHES.values(), ids=MESHES)
def test_no_collective_of_vocabulary_size_inside_a_loop(objective, mesh_shape, V=4096):
    hlo = compiled_step(mesh_shape, objective)
    assert any(COLLECTIVE.search(line) for line in hlo.splitlines()), "the reader finds collectives at all"
    loops = inside_loops(hlo)
    assert any("dot(" in line for line in loops) or any("fusion" in line for line in loops)
    shard = V // mesh_shape[2]
    large = [line.strip() for line in loops if COLLECTIVE.search(line) and max(elements(line)) >= shard]
    assert not large, "\n".join(large)


@pytest.mark.parametrize("objective", [Sft(), LogitMix()])
@pytest.mark.parametrize("mesh_shape", [None, *MESHES.values()], ids=["one device", *MESHES])
def test_no_buffer_of_logits_size(objective, mesh_shape, T=64, V=4096):
    """At chunk = T/8 nothing as large as a quarter of a device's logits exists, but for the head's own matrices."""
    hlo = compiled_step(mesh_shape, objective)
    D = tiny.CONFIG.hidden_size
    heads = (
        {D * V, D * V // 8, D * V // 4, D * V // 2} | {n * D * V for n in (2, 4, 8)} if D * V > T * V // 4 else set()
    )
    logits = T * V // (1 if mesh_shape is None else mesh_shape[2])
    large = {n for line in hlo.splitlines() for n in elements(line) if n >= logits // 4} - heads
    assert not large


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"data": 3}, "does not cover 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"fsdp": 0}, "must be >= 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        wmss.make_mesh(**axes)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A device of the kind that needs nothing more to be arranged."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "any"

    @property
    def process_index(self):
        return self.id // 2


@pytest.mark.parametrize(
    "sizes, over", [((2, 4, 2), (2, 1, 1)), ((4, 2, 2), (2, 1, 1)), ((1, 8, 2), (1, 2, 1)), ((1, 1, 16), (1, 1, 2))]
)
def test_slices_are_split_off_from_the_outermost_axis(sizes, over):
    """Every device once, and each slice's devices one block of the mesh, whatever order they are given in."""
    devices = [Gpu(number, slice_index=number % 2) for number in range(16)]
    mesh = sharding.arranged(sizes, devices)
    assert mesh.shape == sizes and {device.id for device in mesh.flat} == set(range(16))
    slices = np.vectorize(lambda device: device.slice_index)(mesh)
    axis = over.index(2)
    halves = np.split(slices, 2, axis)
    assert [np.unique(half).tolist() for half in halves] == [[0], [1]]


@pytest.mark.parametrize("sizes, slices", [((2, 4, 1), [8]), ((3, 4, 1), [4, 4, 4]), ((1, 6, 2), [4, 4, 4])])
def test_other_slices(sizes, slices):
    numbers = [number for number, size in enumerate(slices) for _ in range(size)]
    mesh = sharding.arranged(sizes, [Gpu(i, slice_index=number) for i, number in enumerate(numbers)])
    assert mesh.shape == sizes


@pytest.mark.parametrize("slices, said", [([4, 4, 4, 2, 2], "over 5 slices of 2, 4 devices"), ([6, 10], "slices of 6")])
def test_slices_over_which_no_axis_splits_are_refused(slices, said):
    numbers = [number for number, size in enumerate(slices) for _ in range(size)]
    with pytest.raises(ValueError, match=said):
        sharding.arranged((2, 4, 2), [Gpu(i, slice_index=number) for i, number in enumerate(numbers)])


def test_a_mesh_axis_that_does_not_divide_says_which_number_to_change():
    with pytest.raises(ValueError, match=r"mesh.tensor=4 does not divide the number of kv heads \(K=2\)"):
        MODEL.shardings(wmss.make_mesh(1, 2, 4))


def test_an_axis_without_a_rule_raises():
    with pytest.raises(ValueError, match="no sharding rule for axis 'Q'"):
        sharding.constrain(jnp.zeros((2, 2)), "B Q")
