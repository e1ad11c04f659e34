"""What the table says about the names that JAX gives devices. Run: pytest tests/test_hardware.py"""

import re
import types

import jax
import pytest

from wmss_jax import hardware


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),  # half a chip
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("TPU v4 lite", None),  # another chip than v4
        ("NVIDIA L40S", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_peak_by_the_name_of_the_device(kind, tflops):
    device: jax.Device = types.SimpleNamespace(device_kind=kind)
    assert hardware.peak_flops(device) == (None if tflops is None else pytest.approx(tflops * 1e12))
    assert sum(bool(re.fullmatch(row.kind, kind)) for row in hardware.ACCELERATORS) <= 1


def test_a_cpu_has_no_known_peak():
    assert hardware.peak_flops(jax.devices("cpu")[0]) is None
