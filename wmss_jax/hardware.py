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
    """

    kind: str
    bf16_flops: float


ACCELERATORS = (
    # docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x, "peak compute per chip"; the kinds are those of
    # jax/_src/tpu_info.py. A v4 or v5p chip has two cores and is one device.
    Accelerator(r"TPU v4", 275e12),
    Accelerator(r"TPU v5 lite|TPU v5e", 197e12),
    Accelerator(r"TPU v5p?", 459e12),
    Accelerator(r"TPU v6 lite|TPU v6e", 918e12),
    Accelerator(r"TPU7x", 2307e12 / 2),  # two cores a chip, each of them a device
    # NVIDIA's data sheets of A100, H100, H200, HGX B200 and L4, tensor core FLOP/s without sparsity.
    Accelerator(r"NVIDIA A100.*", 312e12),
    Accelerator(r"NVIDIA H100.*HBM3", 989e12),  # SXM, by its memory: "NVIDIA H100 80GB HBM3"
    Accelerator(r"NVIDIA H100 PCIe", 756e12),
    Accelerator(r"NVIDIA H[12]00 NVL", 835e12),
    Accelerator(r"NVIDIA H200", 989e12),
    Accelerator(r"NVIDIA B200", 2250e12),
    Accelerator(r"NVIDIA L4", 121e12),
)


def peak_flops(device: jax.Device) -> float | None:
    """Return the peak FLOP/s of a device in dense bfloat16 matrix products; None where it is not known (a CPU)."""
    row = next((row for row in ACCELERATORS if re.fullmatch(row.kind, device.device_kind)), None)
    # A slice of a GPU ("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is not the whole of it.
    return None if row is None or " MIG " in device.device_kind else row.bf16_flops
