"""Accelerators that are not there, as XLA's compilers know them: devices to compile programs for, not to run them on.

    devices("v5p:4x4x4")       a TPU slice, as the cloud names it: 64 chips
    devices("h100:1x4x8")      GPUs: slices × hosts × GPUs of a host: 32 of them

The compilers come with the extras `plan-tpu` (libtpu) and `plan-cuda` (JAX's CUDA plugin); neither needs a device.
"""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies


class Gpu(NamedTuple):
    """What XLA's CUDA compiler asks of a GPU (GpuTargetConfigProto), in its units.

    The figures are those of openxla/xla, xla/backends/gpu/target_config/specs/ (a100_sxm_80, h100_sxm, h200, b200),
    which were read off the devices.
    """

    name: str
    capability: int  # the major version; the minor one is 0
    cores: int
    fpus: int
    shared_per_core: int
    shared_per_block: int
    l2: int
    clock_ghz: float
    memory: int
    bandwidth: int


GPUS = {
    "a100-80": Gpu(
        "NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 166912, 41943040, 1.41, 85100068864, 2039040000000
    ),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 233472, 232448, 52428800, 1.98, 84942979072, 3352320000000),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", 9, 132, 128, 233472, 232448, 52428800, 1.98, 151397597184, 4800000000000),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 233472, 232448, 132644864, 1.965, 191514411008, 7672320000000),
}  # fmt: skip
TPUS = {"v5e": "v5e:8x8", "v5p": "v5p:4x4x4", "v6e": "v6e:16x16", "tpu7x": "tpu7x:4x4x4"}  # each with an example

# ACCELERATED_FEATURES is the "a" of sm_90a, without which there is no wgmma.
_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {g.shared_per_core}
  shared_memory_per_block_optin: {g.shared_per_block}
  core_count: {g.cores} fpus_per_core: {g.fpus} clock_rate_ghz: {g.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {g.bandwidth} l2_cache_size: {g.l2} device_memory_size: {g.memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {g.capability} minor: 0 feature_extension: {extension} }}
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 ecc_enabled: true name: "{g.name}"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{g.name}"
"""


def devices(topology: str) -> list[jax.Device]:
    """Return the devices of a topology, written "v5p:4x4x4" or "h100:1x4x8" (slices × hosts × GPUs of a host).

    Raises:
        ValueError: it is not known, no such slice exists, or the compiler for it is not installed.
    """
    name, _, layout = topology.partition(":")
    if name not in TPUS and name not in GPUS:
        raise ValueError(f"--topology: {name!r} is not known; known: {_known()}")
    if not re.fullmatch(r"\d+(x\d+)+", layout) or 0 in (sizes := [int(n) for n in layout.split("x")]):
        raise ValueError(f"--topology: {topology!r}: write {name}:SIZES, as in {_known()}")
    if name in TPUS:
        return _tpus(topology)
    if len(sizes) != 3:
        raise ValueError(f"--topology: {topology!r}: for GPUs, write slices x hosts x GPUs of a host: {name}:1x1x8")
    return _gpus(name, layout)


def _tpus(topology: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"planning for {topology} needs libtpu: pip install 'wmss-jax[plan-tpu]'")
    # libtpu asks the cloud's metadata server which slice this host is part of, and locks the chips for one process;
    # neither is wanted of a mere compiler.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology: there is no slice {topology}: {_reason(error)}") from error


def _gpus(name: str, layout: str) -> list[jax.Device]:
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise ValueError(f"planning for {name} needs JAX's CUDA plugin: pip install 'wmss-jax[plan-cuda]'")
    extension = "ACCELERATED_FEATURES" if GPUS[name].capability >= 9 else "NONE"
    config = _GPU_CONFIG.format(g=GPUS[name], extension=extension)
    found = topologies.get_topology_desc(platform="cuda", topology_name=name, topology=layout, target_config=config)
    return list(found.devices)


def _known() -> str:
    return ", ".join([*TPUS.values(), *(f"{name}:1x1x8" for name in GPUS)])


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].split(": ", 1)[-1]
