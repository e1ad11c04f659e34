"""Programs kept on disk: found by the next process, if the user lets it. Run: pytest tests/test_compilation.py"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import recipes
from jax.experimental.compilation_cache import compilation_cache

from wmss_jax import compilation

DIRECTORY, SWITCH = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
NAMES = [DIRECTORY, SWITCH, *compilation.SETTINGS, "jax_compilation_cache_max_size"]

# A process that makes the recipe ready and takes a training step: the loss, and programs found and not found on disk.
PROCESS = """
import collections, json
import jax, optax, recipes, tiny
from wmss_jax import objectives, runs, step, train_state
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
runs.prepare(recipes.load(), say=lambda _: None)
model, tx = tiny.model(), optax.sgd(0.1)
state, first = train_state.init_state({"strong": tiny.params(model)}, tx), tiny.batch()
train_step = step.make_train_step(model, objectives.Sft(), tx)
for _ in range(2):
    state, metrics = train_step(state, {}, first)
print(json.dumps([metrics["loss"].item(), events["cache_hits"], events["cache_misses"]]))
"""


def run(root: Path, **environment: str):
    """What PROCESS prints, run with a home directory of its own."""
    clean = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PROCESS], cwd=root, capture_output=True, text=True,
        env=clean | {"HOME": str(root / "home"), "PYTHONPATH": str(Path(__file__).parent)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    root = recipes.write(tmp_path)
    everything = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # which a user may say; else it is for some speed
    loss, hits, misses = run(root, **everything)
    assert hits == 0 and misses > 0
    programs = root / "home/.cache/wmss_jax/compiled"
    assert len(list(programs.glob("jit_train_step-*-cache"))) == 1
    assert run(root, **everything) == [loss, misses, 0]


# -- in this process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def undecided(tmp_path, monkeypatch):
    """JAX as it is where nobody has chosen a cache, and where one would be made; put back afterwards."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    for name in NAMES:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update(DIRECTORY, None)
    yield tmp_path / "cache/wmss_jax/compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_where_nobody_has_decided_it_is_on(undecided, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "12345")
    limit = jax.config.jax_compilation_cache_max_size
    assert compilation.use_cache() == undecided
    assert jax.config.jax_compilation_cache_dir == str(undecided) and undecided.stat().st_mode & 0o77 == 0
    assert jax.config.jax_persistent_cache_min_compile_time_secs < 1
    assert jax.config.jax_compilation_cache_max_size == limit  # read by JAX when it was imported
    assert compilation.use_cache() is None  # there is one now


def test_old_programs_make_room(undecided):
    compilation.use_cache()
    assert jax.config.jax_compilation_cache_max_size == compilation.MAX_BYTES
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_compilation_cache_max_size", 8000)
    compilation_cache.reset_cache()
    for number in range(8):
        jax.jit(lambda x, number=number: x * number + 1)(1.0)
    kept = [file.stat().st_size for file in undecided.glob("*-cache")]
    assert kept and sum(kept) <= 8000


@pytest.mark.parametrize("decision", ["directory", "variable", "off"])
def test_where_the_user_has_decided_nothing_is_changed(undecided, monkeypatch, decision):
    if decision == "directory":
        jax.config.update(DIRECTORY, "mine")
    if decision == "variable":
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # none, that is
    if decision == "off":
        jax.config.update(SWITCH, False)
    before = {name: getattr(jax.config, name) for name in NAMES}
    assert compilation.use_cache() is None
    assert {name: getattr(jax.config, name) for name in NAMES} == before
    assert not undecided.exists()


def no_home(monkeypatch, cache):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))


def a_file_in_its_place(monkeypatch, cache):
    (cache.parents[1]).write_text("")


def read_only(monkeypatch, cache):
    cache.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere


@pytest.mark.parametrize("obstacle", [no_home, a_file_in_its_place, read_only])
def test_where_nothing_can_be_written_it_stays_off(undecided, monkeypatch, obstacle):
    obstacle(monkeypatch, undecided)
    assert compilation.use_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="XLA's flag for it is of x86")
def test_a_program_is_not_found_by_a_cpu_with_other_instructions():
    """A part of JAX's key of a program; without it a shared home directory would crash the weaker machine."""
    code = "import jax; from jax._src.lib import xla_client as x\n"
    code += "print(x.get_topology_for_devices(jax.devices()).fingerprint())"
    of = lambda isa: subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True,
        env=os.environ | {"XLA_FLAGS": f"--xla_cpu_max_isa={isa}", "JAX_PLATFORMS": "cpu"},
    ).stdout  # fmt: skip
    assert of("SSE4_2") != of("AVX2")
