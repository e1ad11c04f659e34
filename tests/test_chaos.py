"""What a run survives: kills in every phase, lost processes, other devices, damage, full disks. Run: make test-chaos"""

import collections
import os
import random
import re
import shutil
import signal
import subprocess
import time

import kills
import numpy as np
import pytest
import recipes
from kills import CHANGE, FIRST, SAVE, Event
from test_checkpoint import files_of, flip
from test_processes import MESH, await_checkpoint, free_port, losses, seen, start, together

from wmss_jax import checkpoint
from wmss_jax.checkpoint import CheckpointDamaged

pytestmark = pytest.mark.chaos

ALL = "train.keep_last=99"  # every checkpoint stays, to be compared


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return recipes.environment(recipes.shared(tmp_path_factory))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment):
    """The work directory of a run that nothing happened to, with all its checkpoints."""
    root = recipes.write(tmp_path_factory.mktemp("undisturbed"))
    recipes.wmss("run", "recipe.yaml", ALL, root=root, env=environment, check=True)
    return root / "run"


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def events(seed):
    """Twenty moments, in the order in which a run comes by; within a save at random instants of it."""
    rng = random.Random(seed)
    save = lambda stage, step: Event(f"{stage} {rng.choice(['save', 'digest'])} {step}", 1, rng.choice([0, 1e-4, 1e-3]))
    return [
        Event("pretrain begun"), Event("pretrain step 1"), save("pretrain", 2), save("pretrain", 4),
        Event("sft begun"), Event("sft step 2", 1, 1e-4), Event("sft save 2"), Event(f"sft step {rng.randint(3, 5)}"),
        save("sft", 6), Event("sft done"), Event("scores", rng.randint(1, 2)), Event("curriculum-1 done"),
        Event("joint step 1"), save("joint", 2), Event("joint digest 4"), save("joint", 6), Event("joint done"),
        save("sft_continued", 4), Event("export"), Event("answers", rng.randint(1, 4)),
    ]  # fmt: skip


def test_twenty_kills_in_all_phases_and_every_restart_ends_bitwise_the_same(undisturbed, environment, tmp_path):
    """After each kill all that calls itself a checkpoint is whole and has the bits of the undisturbed run's."""
    root, phases = recipes.write(tmp_path), []
    with kills.forks(root, environment) as forks:
        for event in events(seed=1):
            outcome = forks.run(event, ALL)
            assert outcome.code == -signal.SIGKILL, f"not killed at {event}:\n{outcome.said}"
            print(f"kill {len(phases) + 1:2}: {event.moment} + {event.delay_s:g} s: {outcome.phase}")
            phases.append(outcome.phase)
            for found in root.glob("run/*/checkpoints/*"):
                if found.name.isdecimal():
                    checkpoint.verify(found)
                    kills.assert_same_state(found, undisturbed / found.relative_to(root / "run"))
        last = forks.run(kills.NEVER, ALL)
    assert last.code == 0, last.said
    kills.assert_same_run(root / "run", undisturbed)
    assert not list((root / "run").rglob("*.partial*"))
    kinds = collections.Counter(phase.split(": ")[-1] for phase in phases)
    print(dict(kinds))
    assert len(phases) == 20 and kinds[SAVE] >= 6 and kinds[FIRST] >= 3 and kinds[CHANGE] >= 3
    assert {"pretrain", "sft", "joint", "sft_continued"} <= {phase.split(": ")[0] for phase in phases}


# -- lost processes, other devices ------------------------------------------------------------------------------------

LONG = ("train", "recipe.yaml", "--stage", "sft", "pretrain.steps=2", "sft.steps=50", *MESH)


def finish(root, devices, *overrides):
    process = start(root, *LONG, *overrides, devices=devices)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes with four devices each make of fifty steps."""
    root = recipes.write(tmp_path_factory.mktemp("two"))
    for _, err, code in together(root, *LONG):
        assert code == 0, err
    return root


@pytest.mark.parametrize("lost", [0, 1])
def test_one_of_two_killed_ends_the_other_with_a_message_and_a_restart_goes_on(two_processes, tmp_path, lost):
    """Of process 0, which coordinates, and of another one."""
    root, port, deadline_s = recipes.write(tmp_path), free_port(), 10
    deadline = {"WMSS_HEARTBEAT_SECONDS": str(deadline_s)}
    running = [start(root, *LONG, rank=rank, port=port, **deadline) for rank in (0, 1)]
    await_checkpoint(root, 10, running)
    running[lost].send_signal(signal.SIGKILL)
    since = time.monotonic()
    running[lost].communicate()
    _, err = running[1 - lost].communicate(timeout=120)
    took = time.monotonic() - since
    print(
        f"process {lost} killed: the other ended with {running[1 - lost].returncode} after {took:.1f} s, saying\n{err}"
    )
    assert running[1 - lost].returncode not in (0, 75) and took < 2 * deadline_s + 10
    assert "Terminating process" in err and "another task died" in err  # JAX's words
    if lost:
        assert re.search(r"tasks are unhealthy \(stopped sending heartbeats\):\n1\n", err), "which one"
    for _, err, code in together(root, *LONG):
        assert code == 0, err
    last = "run/sft/checkpoints/50"
    kills.assert_same_state(root / last, two_processes / last)


@pytest.fixture(scope="module")
def stopped_on_eight(tmp_path_factory):
    """A run on eight devices that was killed some time after its tenth step."""
    root = recipes.write(tmp_path_factory.mktemp("eight"))
    process = start(root, *LONG, devices=8)
    await_checkpoint(root, 10, [process])
    process.kill()
    process.communicate()
    return root


@pytest.mark.parametrize("now", ["8 devices", "4 devices", "1 device", "2 processes"])
def test_saved_on_eight_devices_gone_on_with_elsewhere(stopped_on_eight, two_processes, tmp_path, now):
    """The same examples in every row of every step, and the same losses within 1e-5."""
    root = recipes.copy(stopped_on_eight, tmp_path / "copy")
    saved = checkpoint.latest(root / "run/sft/checkpoints")
    assert saved < 50
    if now == "2 processes":
        for _, err, code in together(root, *LONG):
            assert code == 0, err
    else:
        fsdp = {"8 devices": "{data: 2, fsdp: 4}", "4 devices": "{fsdp: 4}", "1 device": "{fsdp: 1}"}[now]
        finish(root, int(now.split()[0]), f"mesh={fsdp}")
    after, expected = losses(root)[saved - 50 :], losses(two_processes)[saved:]
    print(now, f"from step {saved}: largest relative difference", np.max(np.abs(after / expected - 1)))
    np.testing.assert_allclose(after, expected, rtol=1e-5)
    assert seen(root) == seen(two_processes)


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(environment, tmp_path_factory):
    """A run that was killed in its SFT, after the checkpoints of steps 2 and 4."""
    root = recipes.write(tmp_path_factory.mktemp("stopped"))
    with kills.forks(root, environment) as forks:
        assert forks.run(Event("sft digest 6")).code == -signal.SIGKILL
    assert checkpoint.steps(root / "run/sft/checkpoints") == [2, 4]
    return root


def truncated(checkpoint_dir):
    file = max(files_of(checkpoint_dir / "state"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    return file


def half_deleted(checkpoint_dir):
    for file in (files := files_of(checkpoint_dir))[::2]:
        file.unlink()
    return files[0]


def flipped(checkpoint_dir):
    file = max(files_of(checkpoint_dir / "state"), key=lambda path: path.stat().st_size)
    flip(file, 8 * (file.stat().st_size // 2))
    return file


@pytest.mark.parametrize("damage", [truncated, half_deleted, flipped])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken_only_when_asked(
    stopped, undisturbed, environment, tmp_path, damage
):
    root = recipes.copy(stopped, tmp_path / "copy")
    newest = root / "run/sft/checkpoints/4"
    file = damage(newest)
    with kills.forks(root, environment) as forks:
        refused = forks.run()
        assert refused.code == 2, refused.said
        (line,) = [text for text in refused.said.splitlines() if text.startswith("wmss: error")]
        for part in (
            "sft/checkpoints/4: ",
            str(file.relative_to(newest)),
            "sft/checkpoints/2 is intact; train.resume_",
        ):
            assert part in line
        assert checkpoint.steps(newest.parent) == [2, 4], "nothing was removed or trained"
        asked = forks.run(kills.NEVER, "train.resume_from=newest_intact")
    assert asked.code == 0, asked.said
    kills.assert_same_run(root / "run", undisturbed, same_recipe=False)


def test_twelve_random_single_bits_anywhere_in_a_training_checkpoint_are_all_noticed(stopped):
    rng, directory = random.Random(0), stopped / "run/sft/checkpoints/4"
    sizes = {file: 8 * file.stat().st_size for file in files_of(directory)}
    for file in rng.choices(list(sizes), sizes.values(), k=12):  # as the bits of the whole lie
        bit = rng.randrange(sizes[file])
        flip(file, bit)
        with pytest.raises(CheckpointDamaged, match="sft/checkpoints/4: "):
            checkpoint.verify(directory)
        flip(file, bit)
    checkpoint.verify(directory)


# -- full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system can be mounted by root only: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_loses_nothing(stopped, undisturbed, environment, small_disk):
    """With no room at all, with room for a part of a checkpoint, and with room for little more than one."""
    root = recipes.copy(stopped, small_disk / "copy")
    one = sum(file.stat().st_size for file in files_of(root / "run/sft/checkpoints/4"))
    before = {step: kills.arrays(root / f"run/sft/checkpoints/{step}") for step in (2, 4)}
    codes = []
    with kills.forks(root, environment) as forks:
        for room in (0, one // 2, 3 * one // 2):
            filler = small_disk / "filler"
            filler.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - room)))
            outcome = forks.run()
            filler.unlink()
            print(f"room for {room / one:.1f} checkpoints: code {outcome.code}\n{outcome.said[-500:]}")
            codes.append(outcome.code)
            assert outcome.code in (1, 2) and "No space left on device" in outcome.said
            for step in checkpoint.steps(root / "run/sft/checkpoints"):
                checkpoint.verify(root / f"run/sft/checkpoints/{step}")
                for name, array in before.get(step, {}).items():
                    np.testing.assert_array_equal(kills.arrays(root / f"run/sft/checkpoints/{step}")[name], array)
            assert checkpoint.latest(root / "run/sft/checkpoints") >= 4
        last = forks.run()
    assert last.code == 0, last.said
    kills.assert_same_run(root / "run", undisturbed, same_recipe=False)
