"""Checkpoints: bit-exact on any mesh, whole or not there, damage noticed. Run: pytest tests/test_checkpoint.py"""

import contextlib
import functools
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from wmss_jax import checkpoint, digests, sharding
from wmss_jax.checkpoint import CheckpointDamaged
from wmss_jax.train_state import TrainState

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16))
MESHES = {"1": (1, 1, 1), "4": (1, 4, 1), "8": (1, 8, 1), "2x2x2": (2, 2, 2), "tensor": (1, 4, 2), "data": (8, 1, 1)}


def make_mesh(name):
    data, fsdp, tensor = MESHES[name]
    return sharding.make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])


def train_state(mesh=None):
    """A state with float32 parameters, bfloat16 and float32 moments, int32 counters and empty optax states.

    Filled by numpy, because compiling costs more than all the rest here.
    """
    params, rng = {"strong": tiny.model().abstract()}, np.random.default_rng(0)
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(TX.init, params))
    places = {"strong": tiny.model().shardings(mesh)}

    def fill(path, leaf):
        array = np.asarray(rng.normal(size=leaf.shape) * 100).astype(leaf.dtype)
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if mesh is None:
            return jnp.asarray(array)
        place = functools.reduce(lambda node, name: node[name], names, places) if names else NamedSharding(mesh, P())
        return jax.device_put(array, place)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def value(step):
    return {"w": jnp.full((32, 8), step, jnp.float32), "step": jnp.int32(step)}


@pytest.fixture
def saved(tmp_path):
    """A small checkpoint."""
    checkpoint.save(tmp_path / "1", value(1), {"lam": 0.5}, {"assets/tokenizer.json": b"{}"})
    return tmp_path / "1"


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


# -- round trips ------------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_exact(tmp_path):
    state = train_state()
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(state)}
    assert kinds == {"float32", "bfloat16", "int32"}
    checkpoint.save(tmp_path / "c", state, {})
    assert_same(checkpoint.restore(tmp_path / "c", abstract(state)), state)
    assert_same(checkpoint.restore(tmp_path / "c", state), state)  # arrays serve as the abstract tree, too


def test_special_values_survive(tmp_path):
    bits = np.array([0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0x0001, 0x7F7F], np.uint16)
    tree = {"bf16": jnp.asarray(bits.view(jnp.bfloat16)), "f32": jnp.asarray([np.nan, -0.0, np.inf, 1e-45], np.float32)}
    tree |= {"bool": jnp.array([True, False]), "u32": jnp.uint32([2**32 - 1])}
    checkpoint.save(tmp_path / "c", tree, {})
    assert_same(checkpoint.restore(tmp_path / "c", abstract(tree)), tree)


@pytest.mark.parametrize("now", MESHES)
def test_restore_on_another_mesh(tmp_path, now):
    state = train_state(make_mesh("8"))
    assert len(state.params["strong"]["embed"].sharding.device_set) == 8
    checkpoint.save(tmp_path / "c", state, {})
    wanted = abstract(train_state(make_mesh(now)))
    got = checkpoint.restore(tmp_path / "c", wanted)
    assert_same(got, state)
    assert [x.sharding for x in jax.tree.leaves(got)] == [x.sharding for x in jax.tree.leaves(wanted)]


def test_restore_without_shardings_uses_the_default_device(tmp_path):
    state = train_state(make_mesh("8"))
    checkpoint.save(tmp_path / "c", state, {})
    got = checkpoint.restore(tmp_path / "c", jax.eval_shape(lambda: state))
    assert_same(got, state)
    assert all(x.sharding.device_set == {jax.devices()[0]} for x in jax.tree.leaves(got))


def test_another_tree_is_refused_on_both_sides(tmp_path):
    tree = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4), "c": jnp.zeros(5)}
    checkpoint.save(tmp_path / "c", tree, {})
    other = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4, jnp.bfloat16), "d": jnp.zeros(5)}
    stored = r"only in the checkpoint: a float32\[2, 3\], b float32\[4\], c float32\[5\]"
    wanted = r"only asked for: a float32\[3, 2\], b bfloat16\[4\], d float32\[5\]"
    with pytest.raises(ValueError, match=f"{stored}; {wanted}"):
        checkpoint.restore(tmp_path / "c", other)


def test_meta_and_files(saved):
    meta = checkpoint.read_meta(saved)
    assert meta["lam"] == 0.5 and meta["format"] == 1 and meta["step"] is None
    assert meta["versions"]["orbax-checkpoint"] and meta["versions"]["jax"] == jax.__version__
    assert (saved / "assets/tokenizer.json").read_bytes() == b"{}"
    recorded = json.loads((saved / "digests.json").read_text())
    assert set(recorded) == {path.relative_to(saved).as_posix() for path in files_of(saved)} - {"digests.json"}


def test_crc32c_is_the_standard_one(tmp_path):
    (tmp_path / "x").write_bytes(b"123456789")
    assert digests.digest(tmp_path / "x") == [9, "e3069283"]  # RFC 3720, B.4


def test_mistakes_are_refused(saved, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        checkpoint.save(saved, value(1), {})
    with pytest.raises(ValueError, match="written for you"):
        checkpoint.save(tmp_path / "x", value(1), {"step": 3})
    with pytest.raises(TypeError, match="JSON"):
        checkpoint.save(tmp_path / "x", value(1), {"path": Path()})
    for name in ("../x", "/x", "meta.json", "state/x"):
        with pytest.raises(ValueError, match="other names"):
            checkpoint.save(tmp_path / "x", value(1), {}, {name: b""})
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoint.restore(tmp_path / "nothing", value(1))
    with pytest.raises(ValueError, match=r"keep_last=0"):
        checkpoint.Writer(tmp_path, keep_last=0)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoint.save(tmp_path / "c", value(1), {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="update wmss-jax"):
        checkpoint.read_meta(tmp_path / "c")


# -- the writer -------------------------------------------------------------------------------------------------------


def test_donated_buffers_are_saved_as_they_were(tmp_path):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: -x, s), donate_argnums=0)
    mesh = make_mesh("8")
    x = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)  # slower to write than to overwrite
    place = lambda: [jax.device_put(x, NamedSharding(mesh, spec)) for spec in (P("fsdp"), P(), P(None, "fsdp"))]
    jax.block_until_ready(overwrite(place()))  # compiled
    state = place()
    copy, wanted = jax.tree.map(np.array, state), abstract(state)
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(1, state, {})
        for _ in range(3):  # whatever memory was free for reuse is overwritten now
            state = overwrite(state)
        jax.block_until_ready(state)
    assert_same(checkpoint.restore(tmp_path / "1", wanted), copy)


def test_buffers_deleted_after_save(tmp_path):
    state = train_state(make_mesh("8"))
    copy, wanted = jax.tree.map(np.array, state), abstract(state)
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(1, state, {})
        jax.tree.map(lambda x: x.delete(), state)
    assert_same(checkpoint.restore(tmp_path / "1", wanted), copy)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 1}, [6]),
        ({}, [5, 6]),
        ({"keep_last": 3}, [4, 5, 6]),
        ({"keep_last": 1, "keep_every_steps": 2}, [2, 4, 6]),
        ({"keep_last": 1, "keep_best": 1}, [2, 6]),
        ({"keep_last": 2, "keep_best": 2}, [2, 3, 5, 6]),
        ({"keep_last": 1, "keep_every_steps": 5, "keep_best": 1}, [2, 5, 6]),
    ],
)
def test_pruning(tmp_path, settings, kept):
    metrics = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: None, 6: 9.0}
    with checkpoint.Writer(tmp_path, **settings) as writer:
        for step, metric in metrics.items():
            writer.save(step, value(step), {}, metric=metric)
    assert checkpoint.steps(tmp_path) == kept and checkpoint.latest(tmp_path) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(step) for step in kept]


def test_best_survives_a_restart_and_a_damaged_one_is_no_obstacle(tmp_path):
    with checkpoint.Writer(tmp_path, keep_last=1, keep_best=1) as writer:
        writer.save(1, value(1), {}, metric=1.0)
        writer.save(2, value(2), {}, metric=2.0)
    with checkpoint.Writer(tmp_path, keep_last=1, keep_best=1) as writer:
        writer.save(3, value(3), {}, metric=3.0)
        writer.wait()
        assert checkpoint.steps(tmp_path) == [1, 3]
        (tmp_path / "1/meta.json").write_text("{}")
        writer.save(4, value(4), {}, metric=4.0)
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_a_given_up_continuation_is_replaced_and_removed(tmp_path):
    with checkpoint.Writer(tmp_path, keep_last=9) as writer:
        for step in (1, 2, 3):
            writer.save(step, value(step), {})
    with checkpoint.Writer(tmp_path, keep_last=9) as writer:  # resumed from 1
        writer.save(2, value(20), {})
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert_same(checkpoint.restore(tmp_path / "2", value(0)), value(20))


def test_steps_ignores_what_is_no_checkpoint(tmp_path):
    assert checkpoint.steps(tmp_path / "nothing") == [] and checkpoint.latest(tmp_path) is None
    for name in ("7.partial-new", "8.partial-old", "best", "012", "3"):
        (tmp_path / name).mkdir()
    (tmp_path / "5").write_text("a file")
    assert checkpoint.steps(tmp_path) == [3]
    checkpoint.Writer(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["012", "3", "5", "best"]


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_every_flipped_bit_is_found(saved):
    rng = random.Random(0)
    checkpoint.verify(saved)
    for file in files_of(saved):
        bits = range(8 * file.stat().st_size)
        for bit in rng.sample(bits, min(len(bits), 12)):
            flip(file, bit)
            with pytest.raises(CheckpointDamaged, match="1: " if file.name == "digests.json" else file.name):
                checkpoint.verify(saved)
            flip(file, bit)
    checkpoint.verify(saved)


def test_orbax_alone_does_not_notice(tmp_path):
    """Why there are digests; if this fails, Orbax has learned it and they may go."""
    tree = {"w": jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (64, 64), np.uint32))}
    checkpoint.save(tmp_path / "c", tree, {})
    data = max(files_of(tmp_path / "c"), key=lambda path: path.stat().st_size)
    flip(data, 8 * (data.stat().st_size // 2))
    silent = checkpoint.restore(tmp_path / "c", tree, verify="sizes")
    assert (np.asarray(silent["w"]) != np.asarray(tree["w"])).sum() == 1
    with pytest.raises(CheckpointDamaged, match="crc32c"):
        checkpoint.restore(tmp_path / "c", tree)


@pytest.mark.parametrize("level", ["full", "sizes"])
def test_missing_truncated_and_extra_files(saved, level):
    for file in files_of(saved):
        name, content = file.relative_to(saved).as_posix(), file.read_bytes()
        for damage in (file.unlink, lambda file=file, content=content: file.write_bytes(content[:-1])):
            damage()
            with pytest.raises(CheckpointDamaged, match=name):
                checkpoint.verify(saved, level)
            file.write_bytes(content)
    (saved / "state/more").write_text("")
    with pytest.raises(CheckpointDamaged, match="state/more: not part of the checkpoint"):
        checkpoint.verify(saved, level)
    (saved / "state/more").unlink()
    shutil.rmtree(saved / "state")
    with pytest.raises(CheckpointDamaged, match=r"state/manifest.ocdbt: missing; .*"):
        checkpoint.verify(saved, level)


def test_no_digests(saved):
    (saved / "digests.json").write_text("[1]")
    with pytest.raises(CheckpointDamaged, match=r"digests.json: "):
        checkpoint.verify(saved)
    (saved / "digests.json").unlink()
    with pytest.raises(CheckpointDamaged, match=r"digests.json: missing"):
        checkpoint.verify(saved, "sizes")


def test_damaged_meta_is_not_believed(saved):
    file = saved / "meta.json"
    file.write_text(file.read_text().replace("0.5", "0.6"))
    with pytest.raises(CheckpointDamaged, match=r"meta.json"):
        checkpoint.read_meta(saved)


def test_resume(tmp_path, caplog):
    assert checkpoint.resume(tmp_path, value(0)) is None
    with checkpoint.Writer(tmp_path, keep_last=3) as writer:
        for step in (1, 2, 3):
            writer.save(step, value(step), {"lam": step})
    step, tree, meta = checkpoint.resume(tmp_path, value(0))
    assert step == meta["step"] == meta["lam"] == 3
    assert_same(tree, value(3))
    for damaged in (3, 2):
        flip(tmp_path / f"{damaged}/state/_METADATA", 5)
        with pytest.raises(CheckpointDamaged, match=rf"3: state/_METADATA: crc32c .*/{damaged - 1} is intact; use"):
            checkpoint.resume(tmp_path, value(0))
    step, tree, _ = checkpoint.resume(tmp_path, value(0), use_previous=True)
    assert step == 1 and "Resuming from" in caplog.text
    assert_same(tree, value(1))
    flip(tmp_path / "1/state/_METADATA", 5)
    with pytest.raises(CheckpointDamaged, match="No other checkpoint"):
        checkpoint.resume(tmp_path, value(0), use_previous=True)


# -- disks and crashes ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_larger_than(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Orbax leaves the other tasks of a failed write behind; collected late, they find their event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_failed_write_is_an_oserror_and_leaves_the_step_before(tmp_path):
    big = {"w": jax.random.normal(jax.random.key(0), (512, 512)), "step": jnp.int32(2)}
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(1, value(1), {})
        writer.wait()
        writer.check()  # nothing is wrong

        def seen_between_two_steps():
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                writer.check()
                time.sleep(0.01)

        for surfaces in (writer.wait, lambda: writer.save(3, value(3), {}), seen_between_two_steps):
            with no_file_larger_than(100_000):
                writer.save(2, big, {})
                with pytest.raises(OSError, match=r"2: the checkpoint could not be written, .*File too large"):
                    surfaces()
            assert [path.name for path in tmp_path.iterdir()] == ["1"]
        checkpoint.verify(tmp_path / "1")
        writer.save(4, big, {})  # the disk has room again
    assert checkpoint.steps(tmp_path) == [1, 4]
    with no_file_larger_than(100_000), pytest.raises(OSError, match="could not be written"):
        checkpoint.save(tmp_path / "c", big, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4"]


def test_an_error_surfaces_at_the_end_of_the_block(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"1: the checkpoint could not be written, .*No space left"):  # noqa: SIM117
        with checkpoint.Writer(tmp_path) as writer:
            monkeypatch.setattr(os, "fsync", full)
            writer.save(1, value(1), {})
    assert list(tmp_path.iterdir()) == []


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        checkpoint.Writer(tmp_path / "file/run")
    with pytest.raises(OSError, match="file"):
        checkpoint.save(tmp_path / "file/run", value(1), {})
    with checkpoint.Writer(tmp_path / "run") as writer:
        writer.save(1, value(1), {})
        writer.wait()
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").write_text("in the way")
        with pytest.raises(OSError, match="run"):
            writer.save(2, value(2), {})
    checkpoint.verify(tmp_path / "moved/1")


# Imports once and forks a process per scenario "directory:kind:moment": `event:n` dies at the n-th time that Python
# touches a file (open, rename, mkdir, remove, ...), `time:s` s seconds after the second save began.
CRASHES = """
import itertools, os, signal, sys, threading, warnings
warnings.filterwarnings("ignore", message=".*fork.*")
import numpy as np
from wmss_jax import checkpoint

def run(root, kind, moment):
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    count = itertools.count(1)
    def hook(event, args):
        if event.startswith(("open", "os.", "shutil.")):
            n = next(count)
            if kind == "event" and n == int(moment):
                die()
    value = lambda step: {"w": np.full((32, 8), step, np.float32), "step": np.array(step, np.int32)}
    with checkpoint.Writer(root) as writer:
        writer.save(1, value(1), {})
        writer.wait()
        sys.addaudithook(hook)
        if kind == "time":
            threading.Timer(float(moment), die).start()
        for step in (2, 3, 4):
            writer.save(step, value(step), {})
            writer.wait()
            print(root, step, flush=True)
    print(root, "events", next(count) - 1, flush=True)
    if kind == "time":
        os._exit(0)

for scenario in sys.argv[1:]:
    if (pid := os.fork()) == 0:
        run(*scenario.split(":"))
        os._exit(0)
    os.waitpid(pid, 0)
"""


def crash(scenarios):
    """Return {directory: last word} after running them in a process of their own."""
    command = [sys.executable, "-c", CRASHES, *(":".join(map(str, scenario)) for scenario in scenarios)]
    out = subprocess.run(command, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    words = [line.split() for line in out.stdout.splitlines()]
    return {root: word for root, word, *_ in words}, [int(word[2]) for word in words if word[1] == "events"]


def test_killed_at_any_moment(tmp_path):
    """SIGKILL leaves complete checkpoints, and among them every one that `wait` had confirmed."""
    _, (events,) = crash([(tmp_path / "clean", "event", 0)])
    assert events > 100
    rng = random.Random(0)
    moments = [("event", n) for n in sorted(rng.sample(range(1, events), 12))]
    moments += [("time", round(rng.uniform(0, 0.3), 3)) for _ in range(3)]
    scenarios = [(tmp_path / str(n), *moment) for n, moment in enumerate(moments)]
    confirmed, _ = crash(scenarios)
    leftovers = 0
    for root, *moment in scenarios:
        present = checkpoint.steps(root)
        word = confirmed.get(str(root), "1")
        assert present and present[-1] >= (4 if word == "events" else int(word)), (moment, present, word)
        for step in present:
            checkpoint.verify(root / str(step))
            assert_same(checkpoint.restore(root / str(step), value(0)), value(step))
        leftovers += sum(".partial-" in path.name for path in root.iterdir())
        with checkpoint.Writer(root) as writer:
            assert sorted(path.name for path in root.iterdir()) == [str(step) for step in present]
            writer.save(9, value(9), {})
    assert leftovers > 5  # or nothing was interrupted


# One of two processes with two devices each; prints what it sees.
PROCESS = """
import sys, jax, numpy as np
root, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from jax.experimental import multihost_utils
from wmss_jax import checkpoint, sharding
mesh = sharding.make_mesh()
x = np.arange(64, dtype=np.float32).reshape(16, 4)
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
state = {"w": jax.make_array_from_callback(x.shape, place, lambda index: x[index])}
step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
with checkpoint.Writer(root) as writer:
    for n in (1, 2, 3):
        writer.save(n, state, {})
        state = step(state)
    writer.wait()
    print("steps", checkpoint.steps(root))
    writer.save(3, state, {})  # replaces it, of the same name
show = lambda found: print("resumed", found[0], np.asarray(found[1]["w"].addressable_shards[0].data)[0, 0])
show(checkpoint.resume(root, state))
multihost_utils.sync_global_devices("read")
if rank == 0:
    with open(f"{root}/3/state/_METADATA", "ab") as file:
        file.write(b" ")
multihost_utils.sync_global_devices("damaged")
show(checkpoint.resume(root, state, use_previous=True))
try:
    checkpoint.resume(root, state)
except checkpoint.CheckpointDamaged as error:
    print("refused", "use_previous" in str(error))
"""


def said_by_two_processes(program, root, *options):
    """What each of two processes that run the program on one directory says of its steps."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *options, "-c", program, str(root), port]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, str(rank)], env=env, **pipes) for rank in range(2)]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        yield [line for line in out.splitlines() if line.startswith(("steps", "resumed", "refused"))]


SAID_BY_TWO = [
    ["steps [2, 3]", f"resumed 3 {first + 3}.0", f"resumed 2 {first + 1}.0", "refused True"] for first in (0, 32)
]


@pytest.mark.slow
def test_two_processes(tmp_path):
    assert list(said_by_two_processes(PROCESS, tmp_path, "-W", "error")) == SAID_BY_TWO


def test_sharded_arrays_keep_their_layout(tmp_path):
    """Replicated, split over one and over two axes: each comes back as it was."""
    mesh = make_mesh("2x2x2")
    x = jnp.arange(64 * 16, dtype=jnp.float32).reshape(64, 16)
    specs = [P(), P("fsdp"), P("tensor", "fsdp"), P(("data", "fsdp"), "tensor")]
    tree = [jax.device_put(x, NamedSharding(mesh, spec)) for spec in specs]
    checkpoint.save(tmp_path / "c", tree, {})
    got = checkpoint.restore(tmp_path / "c", tree)
    assert_same(got, tree)
    assert [x.sharding for x in got] == [x.sharding for x in tree]
