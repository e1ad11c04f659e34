"""Checkpoints in a bucket: there while their digests are, whatever is killed. Run: pytest tests/test_bucket.py"""

import json
import os
import random
import re
import signal
import subprocess
import sys

import kills
import pytest
import recipes
from bucket import BUCKET
from test_checkpoint import (
    PROCESS,
    SAID_BY_TWO,
    abstract,
    assert_same,
    make_mesh,
    said_by_two_processes,
    train_state,
    value,
)

from wmss_jax import checkpoint, cli, stages, storage, training_config
from wmss_jax.checkpoint import CheckpointDamaged
from wmss_jax.storage import GcsPath

ROOT, PREFIX = "gs://bucket/run/sft/checkpoints", "run/sft/checkpoints/"


def steps_with_objects(gcs, prefix=PREFIX):
    return {int(name.removeprefix(prefix).split("/")[0]) for name in gcs.names(prefix)}


def test_round_trip_onto_another_mesh_with_files_and_meta(gcs):
    state = train_state(make_mesh("8"))
    with checkpoint.Writer(ROOT) as writer:
        writer.save(7, state, {"lam": 0.5}, metric=2.0, files={"assets/tokenizer.json": b"{}"})
    for mesh in ("1", "2x2x2"):
        assert_same(checkpoint.restore(f"{ROOT}/7", abstract(train_state(make_mesh(mesh)))), state)
    meta = checkpoint.read_meta(f"{ROOT}/7")
    assert (meta["step"], meta["lam"], meta["metric"]) == (7, 0.5, 2.0)
    recorded = json.loads(gcs.read(f"{PREFIX}7/digests.json"))
    assert sorted(f"{PREFIX}7/{name}" for name in (*recorded, "digests.json")) == gcs.names()
    assert gcs.log()[-1] == ("write", f"{PREFIX}7/digests.json")
    assets = storage.here(storage.path(f"{ROOT}/7/assets"))
    assert [(file.name, file.read_bytes()) for file in assets.iterdir()] == [("tokenizer.json", b"{}")]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, [5, 6]), ({"keep_last": 1, "keep_every_steps": 5, "keep_best": 1}, [2, 5, 6])],
)
def test_pruning_removes_the_digests_first(gcs, settings, kept):
    metrics = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: None, 6: 9.0}
    with checkpoint.Writer(ROOT, **settings) as writer:
        for step, metric in metrics.items():
            writer.save(step, value(step), {}, metric=metric)
    assert checkpoint.steps(ROOT) == kept and checkpoint.latest(ROOT) == 6
    assert steps_with_objects(gcs) == {*kept}
    log = [(what, name.removeprefix(PREFIX)) for what, name in gcs.log()]
    for step in metrics.keys() - kept:
        committed = log.index(("write", f"{step}/digests.json"))
        after = [entry for entry in log[committed + 1 :] if entry[1].startswith(f"{step}/")]
        assert after[0] == ("remove", f"{step}/digests.json") and {what for what, _ in after} == {"remove"}


def test_damage_is_named_and_the_one_before_taken_only_when_asked(gcs):
    rng = random.Random(0)
    with checkpoint.Writer(ROOT, keep_last=3) as writer:
        for step in (1, 2, 3):
            writer.save(step, value(step), {"lam": step})
    for name in gcs.names(f"{PREFIX}3/"):
        original, inside = gcs.read(name), name.removeprefix(f"{PREFIX}3/")
        flipped = bytearray(original)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        gcs.write(name, bytes(flipped))
        with pytest.raises(CheckpointDamaged, match=r"3: " if inside == "digests.json" else rf"3: {inside}: crc32c"):
            checkpoint.verify(f"{ROOT}/3")
        if inside != "digests.json":
            gcs.write(name, original[:-1])
            with pytest.raises(CheckpointDamaged, match=rf"{inside}: \d+ bytes instead"):
                checkpoint.verify(f"{ROOT}/3", "sizes")
            gcs.remove(name)
            with pytest.raises(CheckpointDamaged, match=rf"3: {inside}: missing"):
                checkpoint.verify(f"{ROOT}/3", "sizes")
        gcs.write(name, original)
    gcs.write(f"{PREFIX}3/state/more", b"")
    with pytest.raises(CheckpointDamaged, match=r"gs://bucket/.*/3: state/more: not part .*/2 is intact; use_previous"):
        checkpoint.resume(ROOT, value(0))
    step, tree, _ = checkpoint.resume(ROOT, value(0), use_previous=True)
    assert step == 2
    assert_same(tree, value(2))
    gcs.write(f"{PREFIX}2/meta.json", gcs.read(f"{PREFIX}2/meta.json").replace(b'"lam": 2', b'"lam": 3'))
    with pytest.raises(CheckpointDamaged, match=r"meta\.json: missing or damaged"):
        checkpoint.read_meta(f"{ROOT}/2")


def test_what_has_no_digests_does_not_count_and_the_next_writer_removes_it(gcs):
    with checkpoint.Writer(ROOT) as writer:
        writer.save(1, value(1), {})
        writer.save(12, value(12), {})
    gcs.remove(f"{PREFIX}12/digests.json")
    others = [f"{PREFIX}notes/2/text", f"{PREFIX}012/text", "run/sft/checkpoints-2/3/text"]
    for name in others:
        gcs.write(name, b"of another")
    assert checkpoint.steps(ROOT) == [1] and checkpoint.resume(ROOT, value(0))[0] == 1
    with pytest.raises(CheckpointDamaged, match="missing; not a checkpoint"):
        checkpoint.restore(f"{ROOT}/12", value(0))
    checkpoint.Writer(ROOT)
    left = [name for name in gcs.names() if not name.startswith(f"{PREFIX}1/")]
    assert left == sorted(others) and checkpoint.steps(ROOT) == [1]
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoint.restore(f"{ROOT}/12", value(0))
    assert checkpoint.steps("gs://bucket/nothing") == [] and checkpoint.resume("gs://bucket/nothing", value(0)) is None


@pytest.mark.parametrize("status", [403, 400])
def test_an_error_is_not_taken_for_something_missing(gcs, status):
    """Or a store that refuses for a moment would cost the checkpoints that it did not let us look at."""
    with checkpoint.Writer(ROOT) as writer:
        writer.save(1, value(1), {})
    before = gcs.names()
    for name in ("1/digests.json", f"{PREFIX}[?]"):
        gcs.rules({"what": "read", "name": name, "nth": 1, "times": 9, "status": status})
        with pytest.raises(OSError, match=r"gs://bucket/run/sft/checkpoints.*: .*told to"):
            checkpoint.Writer(ROOT)
        with pytest.raises(OSError, match="told to"):
            checkpoint.resume(ROOT, value(0))
    gcs.rules()
    assert gcs.names() == before and checkpoint.steps(ROOT) == [1]


def test_a_step_is_replaced_and_a_given_up_continuation_removed(gcs):
    with checkpoint.Writer(ROOT, keep_last=9) as writer:
        for step in (1, 2, 3):
            writer.save(step, value(step), {})
    with checkpoint.Writer(ROOT, keep_last=9) as writer:  # resumed from 1
        writer.save(2, value(20), {})
    assert checkpoint.steps(ROOT) == [1, 2] and steps_with_objects(gcs) == {1, 2}
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
        gcs.rules({"what": "write", "name": f"{PREFIX}2/{refused}", "nth": 1, "times": 99, "status": 403})
        with pytest.raises(OSError, match=r"checkpoints/2.*told to"):
            writer.save(2, value(2), {})
            writer.wait()
        gcs.rules()
        assert checkpoint.steps(ROOT) == [1] and steps_with_objects(gcs) == {1}
        checkpoint.verify(f"{ROOT}/1")
    with checkpoint.Writer(ROOT) as writer:  # another one: Orbax' keeps its error for the next save
        writer.save(3, value(3), {})
    assert checkpoint.steps(ROOT) == [1, 3]


def test_a_removal_that_is_refused_leaves_the_checkpoint_whole(gcs):
    with pytest.raises(PermissionError, match=r"1/digests.json: .*told to"), checkpoint.Writer(ROOT, 1) as writer:
        writer.save(1, value(1), {})
        writer.wait()
        gcs.rules({"what": "remove", "name": f"{PREFIX}1/", "nth": 1, "times": 99, "status": 403})
        writer.save(2, value(2), {})
    assert checkpoint.steps(ROOT) == [1, 2]
    checkpoint.verify(f"{ROOT}/1"), checkpoint.verify(f"{ROOT}/2")


@pytest.mark.parametrize("at", ["meta.json", "state/.*ocdbt", "digests.json"])
def test_a_store_that_is_away_for_a_while_is_waited_for(gcs, at):
    with checkpoint.Writer(ROOT) as writer:
        gcs.rules({"what": ".*", "name": f"{PREFIX}1/{at}", "nth": 1, "times": 2, "status": 503})
        writer.save(1, value(1), {})
    assert checkpoint.steps(ROOT) == [1]
    assert_same(checkpoint.restore(f"{ROOT}/1", value(0)), value(1))


@pytest.mark.parametrize(
    "bucket, said", [("closed", "Forbidden.*does not have storage"), ("nowhere", "no such bucket")]
)
def test_a_bucket_that_cannot_be_used_is_the_users_mistake(gcs, bucket, said):
    where = GcsPath(bucket, "run")
    with pytest.raises(OSError, match=rf"^gs://{bucket}/run.*: .*{said}") as caught:
        storage.check_usable(where)
    assert cli._is_mistake(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(OSError, match=rf"gs://{bucket}/run/1.*: .*{said}"):
        checkpoint.save(str(where / "1"), value(1), {})


def test_a_bucket_that_can_be_used_is_left_as_it_was(gcs):
    storage.check_usable(GcsPath("bucket", "run"))
    assert gcs.names() == [] and [what for what, _ in gcs.log()] == ["write", "remove"]


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_large_objects_are_uploaded_in_parts(gcs):
    content = random.Random(0).randbytes(2**18) * 201  # more than gcsfs sends at once
    (file := GcsPath("bucket", "large")).write_bytes(content)
    assert file.read_bytes() == content


# -- kill -9 ----------------------------------------------------------------------------------------------------------

# Imports once and forks a process per scenario "name:what:object:nth:after". It confirms step 1 and is then killed, by
# the store, at its nth request of that kind about such an object: before or after that is done.
KILLED = """
import os, sys, warnings
warnings.filterwarnings("ignore", message=".*fork.*")
import gcsfs.extended_gcsfs  # which it imports at the first write
import numpy as np
from bucket import Bucket
from wmss_jax import checkpoint

def run(name, what, about, nth, after):
    value = lambda step: {"w": np.full((32, 8), step, np.float32), "step": np.array(step, np.int32)}
    with checkpoint.Writer(f"gs://bucket/{name}", keep_last=1, keep_best=1) as writer:
        for step, metric in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 4.0)):
            writer.save(step, value(step), {"lam": step}, metric, {"assets/a": b"a"})
            writer.wait()
            print(name, step, flush=True)
            if step == 1:
                rule = {"what": what, "name": f"^{name}/{about}", "nth": int(nth), "after": after == "True"}
                Bucket(os.environ["STORAGE_EMULATOR_HOST"]).rules({**rule, "kill": os.getpid()})

for scenario in sys.argv[1:]:
    if (pid := os.fork()) == 0:
        run(*scenario.split(":"))
        os._exit(0)
    print("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def killed(scenarios):
    """Return for every scenario the steps that its process had confirmed."""
    command = [sys.executable, "-c", f"import sys; sys.path.append({os.path.dirname(__file__)!r})\n{KILLED}"]
    command += [":".join(map(str, scenario)) for scenario in scenarios]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    out = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    lines = [line.split() for line in out.stdout.splitlines()]
    codes = [int(word) for name, word in lines if name == "code"]
    return {name: [int(w) for n, w in lines if n == name] for name, *_ in scenarios}, codes


def test_killed_at_any_change_of_an_object(gcs):
    """In saves and in removals alike: what counts is whole, among it all that was confirmed, and the rest goes."""
    rng, commits = random.Random(0), "[234]/digests.json"
    moments = [("write|remove", "", nth) for nth in rng.sample(range(1, 60), 4)]  # of some 100, but it varies
    moments += [("write", commits, nth) for nth in (1, 3)]
    moments += [("remove", "[123]/digests.json", nth) for nth in (1, 2)]
    moments += [("remove", "[123]/(state|meta)", rng.randint(1, 12)) for _ in range(2)]
    scenarios = [(f"run-{n}", *moment, bool(n % 2)) for n, moment in enumerate(moments)]
    confirmed, codes = killed(scenarios)
    assert codes == [-signal.SIGKILL] * len(scenarios)
    leftovers = 0
    for name, *moment in scenarios:
        root, where = f"gs://bucket/{name}", (moment, confirmed[name])
        present = checkpoint.steps(root)
        assert present and present[-1] >= confirmed[name][-1], (present, where)
        for step in present:
            checkpoint.verify(f"{root}/{step}")
            assert_same(checkpoint.restore(f"{root}/{step}", value(0)), value(step))
        leftovers += steps_with_objects(gcs, f"{name}/") > {*present}
        newest, _, meta = checkpoint.resume(root, value(0))
        assert newest == meta["lam"] == present[-1]
        with checkpoint.Writer(root, keep_last=1, keep_best=1) as writer:  # as the next start goes on
            assert steps_with_objects(gcs, f"{name}/") == {*present}, where
            for step in range(newest + 1, 5):
                writer.save(step, value(step), {"lam": step}, {2: 2.0, 3: 2.5, 4: 4.0}[step])
        assert {4} <= {*checkpoint.steps(root)} <= {2, 3, 4}, where
        assert steps_with_objects(gcs, f"{name}/") == {*checkpoint.steps(root)}, where
        assert_same(checkpoint.resume(root, value(0))[1], value(4))
    assert leftovers > 5  # or nothing was interrupted


# -- several processes, whole runs ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes(gcs):
    damage = re.search(r"    with open.*\n.*\n", PROCESS)[0]
    program = PROCESS.replace(
        damage, '    from wmss_jax import storage\n    (storage.path(root) / "3/state/_METADATA").write_bytes(b" ")\n'
    )
    assert list(said_by_two_processes(program, ROOT)) == SAID_BY_TWO


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bitwise_as_one_with_local_checkpoints(gcs, tmp_path):
    """In saves, before their last object, and amid removals; the newest that counts is always there and whole."""
    command = ("train", "recipe.yaml", "--stage", "sft", "train.keep_last=1")
    environment = recipes.environment(tmp_path)
    there = "train.checkpoint_bucket=gs://bucket/run/"
    (tmp_path / "here").mkdir(), (tmp_path / "there").mkdir()
    here, root = recipes.write(tmp_path / "here"), recipes.write(tmp_path / "there")
    with kills.forks(here, environment, command) as forks:
        undisturbed = forks.run()
        assert undisturbed.code == 0, undisturbed.said
    with kills.forks(root, environment, command) as forks:
        refused = forks.run(kills.NEVER, "train.checkpoint_bucket=gs://nowhere/run")
        (line,) = [line for line in refused.said.splitlines() if line.startswith("wmss: error")]
        assert refused.code == 2 and line == "wmss: error: gs://nowhere/run: no such bucket or object"
        for moment, nth, stage, kept in [
            ("pretrain save 2", 1, "pretrain", []),
            ("remove pretrain/checkpoints/2", 3, "pretrain", []),  # what was left of it
            ("pretrain digest 4", 1, "pretrain", [2]),
            ("sft digest 4", 1, "sft", [2]),
            ("remove sft/checkpoints/2", 3, "sft", [4]),  # as one too old
            ("sft save 6", 1, "sft", [4]),
        ]:
            outcome = forks.run(kills.Event(moment, nth), there)
            assert outcome.code == -signal.SIGKILL, f"not killed at {moment}:\n{outcome.said}"
            assert checkpoint.steps(f"gs://bucket/run/{stage}/checkpoints") == kept, moment
            for step in kept:
                checkpoint.verify(f"gs://bucket/run/{stage}/checkpoints/{step}")
        moved = forks.run(kills.NEVER)
        assert moved.code == 2 and "begun with its checkpoints in gs://bucket/run/sft/checkpoints" in moved.said
        last = forks.run(kills.NEVER, there)
    assert last.code == 0, last.said
    for stage in ("pretrain", "sft"):
        where, step = f"gs://bucket/run/{stage}/checkpoints", recipes.STEPS[stage]
        assert checkpoint.steps(where) == [step] and steps_with_objects(gcs, f"run/{stage}/checkpoints/") == {step}
        kills.assert_same_state(f"{where}/{step}", here / f"run/{stage}/checkpoints/{step}")
        assert kills.losses(root / "run" / stage) == kills.losses(here / "run" / stage)
        assert {path.name for path in (root / "run" / stage).iterdir()} == {"metrics.jsonl"}


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_stage_is_not_begun_twice_in_two_places(gcs, tmp_path):
    record, here = tmp_path / "stages/sft.json", tmp_path / "sft/checkpoints"
    there, other = GcsPath.parse(ROOT), GcsPath.parse("gs://bucket/other/sft/checkpoints")

    def begin(made):
        with pytest.raises(KeyboardInterrupt):
            stages.run(record, {"a": 1}, interrupted, made)

    def interrupted():
        raise KeyboardInterrupt

    (there / "1/meta.json").write_bytes(b"{}")
    with pytest.raises(FileExistsError, match=rf"{ROOT}: exists, and no .* choose another train.checkpoint_bucket"):
        stages.run(record, {"a": 1}, interrupted, there)
    there.rmtree()
    begin(here), begin(there), begin(other), begin(there)  # nothing in any of them
    (there / "1/meta.json").write_bytes(b"{}")
    for made in (here, other):
        with pytest.raises(ValueError, match=rf"begun with its checkpoints in {ROOT}, not in {made}; set train"):
            stages.run(record, {"a": 1}, interrupted, made)
    begin(there)
    there.rmtree(), begin(here)
    (here / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"begun with its checkpoints in {here}, not in {there}"):
        stages.run(record, {"a": 1}, interrupted, there)


def test_names_that_are_refused(monkeypatch):
    for name in ("gs://", "gs:///run", "gs://bucket/a//b", "gs://bucket/../b", "gs://bucket/a?b", "gs://bucket/a#1"):
        with pytest.raises(ValueError, match="expected gs://BUCKET/NAME"):
            storage.path(name)
        with pytest.raises(ValueError, match="expected gs://BUCKET/NAME"):
            training_config.TrainConfig(checkpoint_bucket=name)
    for name in ("s3://bucket/run", "/checkpoints"):
        with pytest.raises(ValueError, match=rf"{name}: expected gs://BUCKET/NAME"):
            training_config.TrainConfig(checkpoint_bucket=name)
    assert (
        training_config.TrainConfig(checkpoint_bucket=f"gs://{BUCKET}/a.b-c/d=1/").checkpoint_bucket
        == "gs://bucket/a.b-c/d=1"
    )
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    storage._file_system.cache_clear()
    with pytest.raises(ValueError, match=r"gs:// needs gcsfs: pip install 'wmss-jax\[gcs\]'"):
        checkpoint.steps(ROOT)
