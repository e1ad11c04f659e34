"""Eight simulated devices for every test; rank promotion is an error; compiled code is not optimised."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# The suite spends its time in the compiler, not in the programs: without LLVM's optimisations it runs 3 times faster.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers have it from the process that started them
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="wmss-tests-")  # a `wmss` process keeps programs here
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import jax
import numpy as np
import pytest

# Tests are for the CPU devices; those marked `accelerator` ask for others by name, where there are any.
PRESENT = [name for name, device in {"cuda": "/dev/nvidia0", "tpu": "/dev/vfio/0"}.items() if Path(device).exists()]
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", ",".join(["cpu", *PRESENT]))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", "")  # chosen: none. No recipe switches it on for the tests after it


def accelerators() -> list[jax.Device]:
    """The GPUs or TPUs that tests marked `accelerator` run on."""
    return [device for name in PRESENT for device in jax.devices(name)]


@pytest.fixture(scope="session")
def golden() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """What one test of a worker compiled, those of its module find."""
    import recipes

    with recipes.compiled_once(tmp_path_factory):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def _gcs_server():
    """One for the session, because the libraries keep the address that they saw first."""
    import fsspec.config
    from bucket import serving

    with serving() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, text in bucket.environment.items():
            patch.setenv(name, text)
        fsspec.config.set_conf_env(fsspec.config.conf)
        yield bucket


@pytest.fixture
def gcs(_gcs_server):
    """A stand-in for Google Cloud Storage, empty, for this process and all that it starts; see bucket.py."""
    _gcs_server.control(reset=True)
    return _gcs_server
