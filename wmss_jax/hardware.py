"""What accelerators can do, by the name that JAX gives them: one row a kind, from the vendors' data sheets."""

import re
from typing import NamedTuple

import jax


class Accelerator(NamedTuple):
    """One JAX device, which is what `jax.devices()` lists: usually a chip, on some TPUs a core of it.

    Attributes:
        kind: regular expression of the whole `device_kind`.
        bf16_flops: peak FLOP/s of dense bfloat16 matrix products; data sheets like to give those of sparse ones, twice
            as many.
        memory: bytes of its high-bandwidth memory.
        bandwidth: bytes/s between that memory and the device.
        link: bytes/s that it sends to, and as many that it receives from, all its neighbours on the fast interconnect
            (ICI, NVLink); data sheets give the sum of both directions.
        network: the same between hosts, where that is another one: an A100 has its share of 8 × 200 Gb/s there, later
            ones have 8 × 400 (NVIDIA's DGX data sheets). None: the fast interconnect spans hosts.
    """

    kind: str
    bf16_flops: float
    memory: float
    bandwidth: float
    link: float
    network: float | None = None


_GB, _GIB = 1e9, 2**30

ACCELERATORS = (
    # docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x, "key chip specifications"; the kinds are those of
    # jax/_src/tpu_info.py. A v4 or v5p chip has two cores and is one device.
    Accelerator(r"TPU v4", 275e12, 32 * _GIB, 1228 * _GB, 300 * _GB / 2),
    Accelerator(r"TPU v5 lite|TPU v5e", 197e12, 16 * _GIB, 819 * _GB, 400 * _GB / 2),
    Accelerator(r"TPU v5p?", 459e12, 95 * _GIB, 2765 * _GB, 1200 * _GB / 2),
    Accelerator(r"TPU v6 lite|TPU v6e", 918e12, 32 * _GIB, 1638 * _GB, 800 * _GB / 2),
    # Two cores a chip, each of them a device.
    Accelerator(r"TPU7x", 2307e12 / 2, 192 * _GIB / 2, 7380 * _GB / 2, 1200 * _GB / 4),
    # NVIDIA's data sheets of A100, H100, H200, HGX B200 and L4, tensor core FLOP/s without sparsity. An L4 has PCIe.
    Accelerator(r"NVIDIA A100.*80GB.*", 312e12, 80 * _GIB, 2039 * _GB, 600 * _GB / 2, 25 * _GB),
    Accelerator(r"NVIDIA A100(?!.*80GB).*", 312e12, 40 * _GIB, 1555 * _GB, 600 * _GB / 2, 25 * _GB),
    Accelerator(r"NVIDIA H100.*HBM3", 989e12, 80 * _GIB, 3350 * _GB, 900 * _GB / 2, 50 * _GB),  # "H100 80GB HBM3", SXM
    Accelerator(r"NVIDIA H100 PCIe", 756e12, 80 * _GIB, 2000 * _GB, 600 * _GB / 2, 50 * _GB),
    Accelerator(r"NVIDIA H100 NVL", 835e12, 94 * _GB, 3900 * _GB, 600 * _GB / 2, 50 * _GB),
    Accelerator(r"NVIDIA H200 NVL", 835e12, 141 * _GB, 4800 * _GB, 900 * _GB / 2, 50 * _GB),
    Accelerator(r"NVIDIA H200( 141GB.*)?", 989e12, 141 * _GB, 4800 * _GB, 900 * _GB / 2, 50 * _GB),
    Accelerator(r"NVIDIA B200", 2250e12, 180 * _GB, 7700 * _GB, 1800 * _GB / 2, 50 * _GB),
    Accelerator(r"NVIDIA L4", 121e12, 24 * _GB, 300 * _GB, 64 * _GB / 2, 12.5 * _GB),
)


def facts(device_kind: str) -> Accelerator | None:
    """Return the row of a device kind; None where it is not known (a CPU)."""
    # A slice of a GPU ("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is not the whole of it.
    known = None if " MIG " in device_kind else device_kind
    return next((row for row in ACCELERATORS if known and re.fullmatch(row.kind, known)), None)


def peak_flops(device: jax.Device) -> float | None:
    """Return the peak FLOP/s of a device in dense bfloat16 matrix products; None where it is not known (a CPU)."""
    row = facts(device.device_kind)
    return None if row is None else row.bf16_flops
