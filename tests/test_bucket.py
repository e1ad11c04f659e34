"""Checkpoints in a bucket: there once their digests are, whatever is killed. Run: pytest tests/test_bucket.py"""

import json
import os
import signal
import subprocess
import sys

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from bucket import serve
from test_checkpoint import abstract, assert_same, make_mesh, train_state, value

from wmss_jax import checkpoint, config, storage
from wmss_jax.checkpoint import CheckpointDamaged

ROOT, PREFIX = "gs://bucket/run/sft/checkpoints", "run/sft/checkpoints/"


@pytest.fixture(scope="module")
def server():
    """One for the module, because the libraries keep the address they saw first."""
    with serve() as gcs, pytest.MonkeyPatch.context() as patch:
        for name, text in gcs.environment.items():
            patch.setenv(name, text)
        fsspec.config.set_conf_env(fsspec.config.conf)
        yield gcs
        fsspec.config.conf.pop("gcs")


@pytest.fixture
def gcs(server):
    server.objects.clear(), server.log.clear()
    server.refuse = lambda bucket, name: None
    return server


def flip(gcs, name, bit=5):
    data = bytearray(gcs.objects["bucket", name])
    data[bit // 8] ^= 1 << bit % 8
    gcs.objects["bucket", name] = bytes(data)


def test_round_trip_onto_another_mesh_with_files_and_meta(gcs):
    state = train_state(make_mesh("8"))
    with checkpoint.Writer(ROOT) as writer:
        writer.save(7, state, {"lam": 0.5}, metric=2.0, files={"assets/tokenizer.json": b"{}"})
    assert_same(checkpoint.restore(f"{ROOT}/7", abstract(train_state(make_mesh("2x2x2")))), state)
    meta = checkpoint.read_meta(f"{ROOT}/7")
    assert (meta["step"], meta["lam"], meta["metric"]) == (7, 0.5, 2.0)
    recorded = json.loads(gcs.objects["bucket", f"{PREFIX}7/digests.json"])
    assert {f"{PREFIX}7/{name}" for name in (*recorded, "digests.json")} == set(gcs.names())
    with storage.local(storage.path(f"{ROOT}/7/assets")) as assets:
        assert [(file.name, file.read_bytes()) for file in assets.iterdir()] == [("tokenizer.json", b"{}")]
    assert gcs.log[-1] == ("write", f"{PREFIX}7/digests.json")


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, [5, 6]), ({"keep_last": 1, "keep_every_steps": 5, "keep_best": 1}, [2, 5, 6])],
)
def test_pruning_removes_the_digests_first(gcs, settings, kept):
    metrics = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: None, 6: 9.0}
    with checkpoint.Writer(ROOT, **settings) as writer:
        for step, metric in metrics.items():
            writer.save(step, value(step), {}, metric=metric)
    assert checkpoint.steps(ROOT) == kept
    assert {name.removeprefix(PREFIX).split("/")[0] for name in gcs.names()} == {str(step) for step in kept}
    removed = [name.removeprefix(PREFIX) for what, name in gcs.log if what == "remove"]
    for step in metrics.keys() - kept:
        assert next(name for name in removed if name.startswith(f"{step}/")) == f"{step}/digests.json"


def test_damage_is_named_and_the_one_before_taken_only_when_asked(gcs):
    with checkpoint.Writer(ROOT, keep_last=3) as writer:
        for step in (1, 2, 3):
            writer.save(step, value(step), {})
    for name in gcs.names(f"{PREFIX}3/"):
        original = gcs.objects["bucket", name]
        flip(gcs, name, 8 * (len(original) // 2))
        with pytest.raises(CheckpointDamaged, match=r"3: "):
            checkpoint.verify(f"{ROOT}/3")
        if not name.endswith("digests.json"):
            gcs.objects["bucket", name] = original[:-1]
            with pytest.raises(CheckpointDamaged, match=rf"{name.removeprefix(PREFIX + '3/')}: \d+ bytes instead"):
                checkpoint.verify(f"{ROOT}/3", "sizes")
            del gcs.objects["bucket", name]
            with pytest.raises(CheckpointDamaged, match=r": missing"):
                checkpoint.verify(f"{ROOT}/3", "sizes")
        gcs.objects["bucket", name] = original
    assert checkpoint.resume(ROOT, value(0))[0] == 3
    flip(gcs, f"{PREFIX}3/state/_METADATA")
    with pytest.raises(CheckpointDamaged, match=r"gs://bucket/.*/3: state/_METADATA: crc32c .*/2 is intact; use"):
        checkpoint.resume(ROOT, value(0))
    step, tree, _ = checkpoint.resume(ROOT, value(0), use_previous=True)
    assert step == 2
    assert_same(tree, value(2))


def test_a_directory_without_digests_does_not_count_and_the_next_writer_removes_it(gcs):
    with checkpoint.Writer(ROOT) as writer:
        writer.save(1, value(1), {})
        writer.save(2, value(2), {})
    del gcs.objects["bucket", f"{PREFIX}2/digests.json"]
    gcs.objects["bucket", f"{PREFIX}notes/2/text"] = b"of another"
    assert checkpoint.steps(ROOT) == [1] and checkpoint.resume(ROOT, value(0))[0] == 1
    with pytest.raises(CheckpointDamaged, match="missing; not a checkpoint"):
        checkpoint.restore(f"{ROOT}/2", value(0))
    checkpoint.Writer(ROOT)
    assert {name.removeprefix(PREFIX).split("/")[0] for name in gcs.names()} == {"1", "notes"}
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoint.restore(f"{ROOT}/2", value(0))


def test_a_step_is_replaced_and_a_given_up_continuation_removed(gcs):
    with checkpoint.Writer(ROOT, keep_last=9) as writer:
        for step in (1, 2, 3):
            writer.save(step, value(step), {})
    with checkpoint.Writer(ROOT, keep_last=9) as writer:  # resumed from 1
        writer.save(2, value(20), {})
    assert checkpoint.steps(ROOT) == [1, 2]
    assert_same(checkpoint.restore(f"{ROOT}/2", value(0)), value(20))
    with pytest.raises(FileExistsError, match="exists already"):
        checkpoint.save(f"{ROOT}/2", value(1), {})


# Orbax leaves the other tasks of a failed write behind; collected late, they find their event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("refused", ["state/", "digests.json", "meta.json"])
def test_a_refused_write_is_an_oserror_and_leaves_the_step_before(gcs, refused):
    with checkpoint.Writer(ROOT) as writer:
        writer.save(1, value(1), {})
        writer.wait()
        gcs.refuse = lambda bucket, name: 403 if name.startswith(f"{PREFIX}2/{refused}") else None
        with pytest.raises(OSError, match="2"):
            writer.save(2, value(2), {})
            writer.wait()
        gcs.refuse = lambda bucket, name: None
        assert checkpoint.steps(ROOT) == [1]
        checkpoint.verify(f"{ROOT}/1")
        writer.save(3, value(3), {})
    assert checkpoint.steps(ROOT) == [1, 3] and not gcs.names(f"{PREFIX}2")


def test_a_bucket_that_cannot_be_written_is_said_at_once(gcs):
    gcs.refuse = lambda bucket, name: 403
    with pytest.raises(PermissionError, match=r"gs://bucket/run/sft/checkpoints: cannot write there: Forbidden"):
        checkpoint.Writer(ROOT)


KILLED = """
import sys
import jax.numpy as jnp
from wmss_jax import checkpoint
value = lambda step: {"w": jnp.full((32, 8), step, jnp.float32), "step": jnp.int32(step)}
with checkpoint.Writer(sys.argv[1], keep_last=2) as writer:
    for step in (1, 2, 3, 4):
        writer.save(step, value(step), {"lam": step}, files={"assets/a": b"a"})
"""


def test_killed_at_any_write_or_removal_of_a_save(gcs):
    """The writer is killed by what it asks of the bucket: at each of the requests from its second save on."""
    run = [sys.executable, "-c", KILLED, ROOT]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    assert subprocess.run(run, env=environment).returncode == 0
    requests = gcs.log.index(("write", f"{PREFIX}2/digests.json")), len(gcs.log)
    # A fork would not do: the threads of both libraries do not live through it.
    for moment in np.linspace(*requests, 6, endpoint=False, dtype=int):
        gcs.objects.clear(), gcs.log.clear()
        process = subprocess.Popen(run, env=environment)

        def count(bucket, name, process=process, moment=moment):
            if len(gcs.log) >= moment:
                process.send_signal(signal.SIGKILL)
                return 503
            return None

        gcs.refuse = count
        assert process.wait() == -signal.SIGKILL
        gcs.refuse = lambda bucket, name: None
        kept = checkpoint.steps(ROOT)
        assert kept and kept[0] >= 1
        for step in kept:
            checkpoint.verify(f"{ROOT}/{step}")
            assert_same(checkpoint.restore(f"{ROOT}/{step}", value(0)), value(step))
        checkpoint.Writer(ROOT)
        assert {int(name.removeprefix(PREFIX).split("/")[0]) for name in gcs.names()} == set(kept)


def test_names_that_are_refused(monkeypatch):
    for name in ("gs://", "gs:///run"):
        with pytest.raises(ValueError, match="names no bucket"):
            storage.path(name)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    storage._gcs.cache_clear()
    with pytest.raises(ValueError, match=r"gs:// needs gcsfs: pip install 'wmss-jax\[gcs\]'"):
        storage.path("gs://bucket/run")
    assert isinstance(config.TrainConfig(checkpoint_dir="gs://bucket/run"), config.TrainConfig)
    for name, said in {"gs://": "names no bucket", "s3://bucket/run": "neither a directory nor gs://"}.items():
        with pytest.raises(ValueError, match=said):
            config.TrainConfig(checkpoint_dir=name)
