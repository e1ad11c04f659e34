"""A tiny recipe with every stage, and a finished run of it that the tests of a session share."""

import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache

from wmss_jax import config, runs, sharding

STEPS = {"pretrain": 4, "sft": 6, "joint": 6, "sft_continued": 6}
CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 300, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
    "max_position_embeddings": 64, "hidden_act": "silu", "attention_bias": False, "initializer_range": 0.1,
}  # fmt: skip
RECIPE = {
    "work_dir": "run",
    "data": ".",
    "model": {
        "config": "config.json", "tokenizer": {"vocab_size": 280}, "compute_dtype": "float32", "remat": "none",
    },
    "dataset": {"train": "train.jsonl", "chat_template": False, "seq_len": 32, "batch_size": 4},
    # A constant rate, so that stages that differ in nothing but their length are one program and compiled once.
    "optimizer": {"peak_lr": 3e-3, "schedule": "constant"},
    "train": {"checkpoint_every_steps": 2, "log_every_steps": 1},
    "pretrain": {"steps": STEPS["pretrain"]},
    "sft": {"steps": STEPS["sft"]},
    "joint": {"steps": STEPS["joint"]},
    "controls": {"sft_continued": {"objective": {"name": "sft"}}},
    "eval": {
        "data": "held_out.jsonl",
        "tasks": {"sums": {"source": "test.jsonl", "grader": "exact", "max_new_tokens": 4}},
    },
}  # fmt: skip


def write(root: Path) -> Path:
    """Write problems, architecture and recipe into `root`; paths in the recipe start there."""
    rng = random.Random(0)
    for name, n in {"train": 40, "held_out": 8, "test": 6}.items():
        pairs = [(rng.randint(1, 99), rng.randint(1, 999)) for _ in range(n)]
        rows(root / f"{name}.jsonl", [{"question": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs])
    (root / "config.json").write_text(json.dumps(CONFIG))
    (root / "recipe.yaml").write_text(json.dumps(RECIPE, indent=1))  # JSON is YAML, too
    return root


def rows(file: Path, rows: list) -> None:
    """Write one object a line; a string is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines))


def load(*overrides: str) -> config.RunConfig:
    """The recipe in the current directory."""
    return load_in(Path(), *overrides)


def load_in(root: Path, *overrides: str) -> config.RunConfig:
    return config.load(root / "recipe.yaml", overrides)


@contextlib.contextmanager
def one_device():
    """A recipe's mesh is of all devices; here it gets the first one alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
        yield


@contextlib.contextmanager
def compiled_once(factory: pytest.TempPathFactory):
    """What one test of this worker compiled the others find; by itself every stage compiles its step anew."""
    settings = {
        "jax_compilation_cache_dir": str(factory.getbasetemp() / "compiled-here"),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        compilation_cache.reset_cache()  # it looks at the settings once
        for name, value in values.items():
            jax.config.update(name, value)
        if values is settings:
            yield


def environment(shared: Path) -> dict[str, str]:
    """Of a `wmss` process with one device: compiled alike everywhere, and what one process compiled the next finds."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def shared(factory: pytest.TempPathFactory) -> Path:
    """A directory that all workers of a session share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def finished(factory: pytest.TempPathFactory) -> Path:
    """The recipe carried out by one undisturbed `wmss run`; to be copied, not changed."""
    root = shared(factory) / "finished"
    with FileLock(f"{root}.lock"):
        if not root.exists():
            partial = root.with_name("finishing")
            partial.mkdir()
            wmss("run", "recipe.yaml", root=write(partial), env=environment(shared(factory)), check=True)
            partial.rename(root)
    return root


def wmss(*arguments: str, root: Path, env: dict[str, str], check: bool = False) -> subprocess.CompletedProcess:
    """Run a real `wmss` in `root`."""
    command = [sys.executable, "-m", "wmss_jax", *arguments]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


def copy(root: Path, to: Path) -> Path:
    """A copy of a run, to go on with in other ways."""
    return Path(shutil.copytree(root, to))


def files(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of every file, to tell whether anything was touched."""
    found = ((path, path.stat()) for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (stat.st_size, stat.st_mtime_ns) for path, stat in found}


def flip_a_bit(checkpoint: Path) -> None:
    """Change one bit in the largest file of a checkpoint's arrays."""
    file = max((path for path in (checkpoint / "state").rglob("*") if path.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
