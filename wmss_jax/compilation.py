"""Compiled programs are kept on disk: what one run compiled, the next one finds."""

import os
from pathlib import Path

import jax

# Kept as well: programs that compile faster than JAX's second, of which a run has dozens.
SETTINGS = {"jax_persistent_cache_min_compile_time_secs": 0.2, "jax_persistent_cache_min_entry_size_bytes": -1}
MAX_BYTES = 10 * 2**30  # the least recently used make room


def use_cache() -> Path | None:
    """Have JAX keep programs in `wmss_jax/compiled` under $XDG_CACHE_HOME (~/.cache); return that directory.

    None, and nothing is changed, where the user has decided (JAX_COMPILATION_CACHE_DIR or its setting in jax.config;
    JAX_ENABLE_COMPILATION_CACHE=false) or the directory cannot be written: that costs time, nothing else. What else
    the user has set of the cache stays.

    A home directory may be shared by machines. JAX's key of a program covers jaxlib, XLA's flags, the accelerator and,
    on a CPU, its instruction set, so that none gets another's.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir is not None:
        return None
    if not jax.config.jax_enable_compilation_cache or (directory := _directory()) is None:
        return None
    settings = dict(SETTINGS)
    if jax.process_count() == 1:  # the limit brings a lock with it, at which the hosts of a pod would queue
        settings["jax_compilation_cache_max_size"] = MAX_BYTES
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory


def _directory() -> Path | None:
    """Return the directory, made if need be; None where it cannot be written."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(root) / "wmss_jax" / "compiled"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever writes there has his programs run here
    except (OSError, RuntimeError):  # the latter: no home directory
        return None
    return directory if os.access(directory, os.W_OK | os.X_OK) else None
