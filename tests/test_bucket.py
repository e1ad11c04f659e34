"""Checkpoints in a bucket: there once their digests are, whatever is killed. Run: pytest tests/test_bucket.py"""

import json
import os
import signal
import subprocess
import sys

import kills
import pytest
import recipes
from test_checkpoint import abstract, assert_same, make_mesh, train_state, value

from wmss_jax import checkpoint, config, storage
from wmss_jax.checkpoint import CheckpointDamaged

ROOT, PREFIX = "gs://bucket/run/sft/checkpoints", "run/sft/checkpoints/"


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
        gcs.flip(name, 8 * (len(original) // 2))
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
    gcs.flip(f"{PREFIX}3/state/_METADATA")
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
        gcs.refuse = lambda method, name: 403 if method == "write" and name.startswith(f"{PREFIX}2/{refused}") else None
        with pytest.raises(OSError, match="2"):
            writer.save(2, value(2), {})
            writer.wait()
        gcs.refuse = lambda method, name: None
        assert checkpoint.steps(ROOT) == [1]
        checkpoint.verify(f"{ROOT}/1")
        writer.save(3, value(3), {})
    assert checkpoint.steps(ROOT) == [1, 3] and not gcs.names(f"{PREFIX}2")


def test_a_bucket_that_cannot_be_written_is_said_at_once(gcs):
    gcs.refuse = lambda method, name: 403
    with pytest.raises(PermissionError, match=r"gs://bucket/run/sft/checkpoints: cannot write there: Forbidden"):
        checkpoint.Writer(ROOT)


KILLED = """
import sys
import jax.numpy as jnp
from wmss_jax import checkpoint
value = lambda step: {"w": jnp.full((32, 8), step, jnp.float32), "step": jnp.int32(step)}
with checkpoint.Writer(sys.argv[1], keep_last=2) as writer:
    for step in (1, 2, 3):
        writer.save(step, value(step), {"lam": step}, files={"assets/a": b"a"})
"""


@pytest.mark.parametrize(
    ("method", "name", "kept"),
    [
        ("write", "3/state/", [1, 2]),
        ("write", "3/digests.json", [1, 2]),
        ("remove", "1/digests.json", [1, 2, 3]),
        ("remove", "1/state/", [2, 3]),
    ],
)
def test_killed_at_a_request_of_a_save(gcs, method, name, kept):
    """What counts is whole, and the next writer removes the rest. A fork would not do: both libraries have threads."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, ROOT], env={**os.environ, "JAX_PLATFORMS": "cpu"})

    def strike(*request):
        if request[0] == method and request[1].startswith(PREFIX + name):
            process.kill()
            return 503
        return None

    gcs.refuse = strike
    assert process.wait(timeout=120) == -signal.SIGKILL
    gcs.refuse = lambda method, name: None
    assert checkpoint.steps(ROOT) == kept
    for step in kept:
        checkpoint.verify(f"{ROOT}/{step}")
    newest, tree, meta = checkpoint.resume(ROOT, value(0))
    assert newest == meta["lam"] == kept[-1]
    assert_same(tree, value(newest))
    checkpoint.Writer(ROOT)
    assert {int(name.removeprefix(PREFIX).split("/")[0]) for name in gcs.names()} == set(kept)


# -- a whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_four_times_ends_bitwise_as_one_with_local_checkpoints(gcs, tmp_path, tmp_path_factory):
    undisturbed = recipes.finished(tmp_path_factory) / "run"
    environment = recipes.environment(recipes.shared(tmp_path_factory))
    root, there = recipes.write(tmp_path), "train.checkpoint_dir=gs://bucket/run"
    with kills.forks(root, environment) as forks:
        for moment in ("pretrain save 2", "sft digest 4", "joint save 4", "joint digest 6"):
            outcome = forks.run(kills.Event(moment), there)
            assert outcome.code == -signal.SIGKILL, f"not killed at {moment}:\n{outcome.said}"
        last = forks.run(kills.NEVER, there)
    assert last.code == 0, last.said
    kills.assert_same_run(root / "run", undisturbed, storage.path("gs://bucket/run"))
    assert {path.name for path in (root / "run/sft").iterdir()} == {"metrics.jsonl"}
    summary = json.loads((root / "run/summary.json").read_text())
    assert summary["models"]["M1"] == f"{ROOT}/{recipes.STEPS['sft']}"


# -- names ------------------------------------------------------------------------------------------------------------


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
