"""topologies.py: what a topology may be called, and the devices that its compiler gives for it."""

import importlib.util

import jax.experimental.topologies
import numpy as np
import pytest

from wmss_jax import attention, hardware, sharding, topologies

KNOWN = "v5e:8x8, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, a100-80:1x1x8, h100:1x1x8, h200:1x1x8, b200:1x1x8"

MISTAKES = {
    "v7:2x2": f"--topology: 'v7' is not known; known: {KNOWN}",
    "": f"--topology: '' is not known; known: {KNOWN}",
    "v5e": f"--topology: 'v5e': write v5e:SIZES, as in {KNOWN}",
    "v5p:4x4x": f"--topology: 'v5p:4x4x': write v5p:SIZES, as in {KNOWN}",
    "v5p:4*4*4": f"--topology: 'v5p:4*4*4': write v5p:SIZES, as in {KNOWN}",
    "v5p:4x0x4": f"--topology: 'v5p:4x0x4': write v5p:SIZES, as in {KNOWN}",
    "h100:8": f"--topology: 'h100:8': write h100:SIZES, as in {KNOWN}",
    "h100:1x8": "--topology: 'h100:1x8': for GPUs, write slices x hosts x GPUs of a host: h100:1x1x8",
}


@pytest.mark.parametrize("topology", MISTAKES)
def test_mistakes(topology):
    with pytest.raises(ValueError) as caught:
        topologies.devices(topology)
    assert str(caught.value) == MISTAKES[topology]


@pytest.mark.parametrize(
    "topology, message",
    [
        ("v5p:4x4x4", "planning for v5p:4x4x4 needs libtpu: pip install 'wmss-jax[plan-tpu]'"),
        ("h100:1x1x8", "planning for h100 needs JAX's CUDA plugin: pip install 'wmss-jax[plan-cuda]'"),
    ],
)
def test_without_its_compiler_a_topology_says_what_to_install(monkeypatch, topology, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as caught:
        topologies.devices(topology)
    assert str(caught.value) == message


# topology: (devices, hosts)
TPUS = {
    "v5e:1x1": (1, 1), "v5e:2x4": (8, 2), "v5e:8x8": (64, 16), "v5p:2x2x1": (4, 1), "v5p:4x4x4": (64, 16),
    "v6e:2x2": (4, 1), "v6e:16x16": (256, 64), "tpu7x:2x2x1": (8, 1), "tpu7x:4x4x4": (128, 16),
}  # fmt: skip
GPUS = {
    "a100-80:1x1x2": (2, 1),
    "h100:1x1x8": (8, 1),
    "h100:1x4x8": (32, 4),
    "h200:2x1x4": (8, 2),
    "b200:1x1x1": (1, 1),
}


def described(topology: str) -> tuple[int, int, str]:
    """Devices, hosts, and the attention of devices that are all of one known kind."""
    found = topologies.devices(topology)
    (kind,) = {device.device_kind for device in found}
    assert hardware.facts(kind) is not None
    return len(found), len({device.process_index for device in found}), attention.backend_on(found[0])


@pytest.mark.parametrize("topology", TPUS)
def test_slices_of_tpus(topology):
    pytest.importorskip("libtpu")
    assert described(topology) == (*TPUS[topology], "splash")


@pytest.mark.parametrize("topology", GPUS)
def test_nodes_of_gpus(topology):
    pytest.importorskip("jax_plugins.xla_cuda13")
    assert described(topology) == (*GPUS[topology], "triton")


@pytest.mark.parametrize("name", topologies.GPUS)
def test_what_the_compiler_knows_of_a_gpu_agrees_with_the_data_sheet(name):
    facts, gpu = hardware.facts(topologies.GPUS[name].name), topologies.GPUS[name]
    assert facts is not None
    assert gpu.memory == pytest.approx(facts.memory, rel=0.08) and gpu.bandwidth == pytest.approx(facts.bandwidth, 0.01)


def test_a_slice_that_does_not_exist():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match=r"^--topology: there is no slice v5e:3x5: .*not divisible by"):
        topologies.devices("v5e:3x5")


@pytest.mark.parametrize(
    "kind, sizes, axis",
    [
        ("tpu", (2, 16, 4), 0), ("tpu", (1, 32, 4), 1), ("tpu", (4, 16, 2), 0),
        ("gpu", (2, 4, 1), 0), ("gpu", (1, 8, 1), 1), ("gpu", (1, 1, 8), 2),
    ],
)  # fmt: skip
def test_a_mesh_over_two_slices_splits_them_off_from_its_outermost_axis(kind, sizes, axis):
    if kind == "gpu":
        pytest.importorskip("jax_plugins.xla_cuda13")
        devices = topologies.devices("h200:2x1x4")
    else:
        pytest.importorskip("libtpu")
        topologies.devices("v5p:4x4x4")  # prepares the environment
        found = jax.experimental.topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4", num_slices=2)
        devices = found.devices
    mesh = sharding.make_mesh(*sizes, devices=devices)
    number = "slice_index" if kind == "tpu" else "process_index"  # GPUs that are not there know no slices
    slices = np.vectorize(lambda device: getattr(device, number))(mesh.devices)
    assert [np.unique(half).tolist() for half in np.split(slices, 2, axis)] == [[0], [1]]
