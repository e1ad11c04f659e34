"""Recipes on several real processes that share the work: gloo between them, four simulated devices each."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import recipes

from wmss_jax import processes, sharding

MESH = ("mesh={data: 2, fsdp: 4}", "dataset.batch_size=8", "score.batch_size=8")
LONG = ("pretrain.steps=2", "sft.steps=50", *MESH)

# `wmss`, noting of every row that a stage of 50 steps trains on, in seen-<rank>.jsonl: step, row of the batch, crc32.
NOTING = """
import json, os, zlib
from wmss_jax import cli, data

given = data.batches

def batches(dataset, plan, **settings):
    found = given(dataset, plan, **settings)
    if plan.total_steps != 50:
        yield from found
        return
    with open(f"seen-{os.environ.get('JAX_PROCESS_ID', '0')}.jsonl", "a", buffering=1) as notes:
        for step, batch in enumerate(found, settings["start_step"] + 1):
            for row, *content in zip(settings["rows"], *(batch[name] for name in sorted(batch))):
                crc = zlib.crc32(b"".join(part.tobytes() for part in content))
                print(json.dumps([step, int(row), crc]), file=notes)
            yield batch

data.batches = batches
cli.main()
"""


def start(root, *arguments, rank=None, count=2, port=0, devices=4, **more):
    """A `wmss` process; `rank` of `count` that belong together."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **more}
    if rank is not None:
        where = {processes.ADDRESS: f"localhost:{port}", processes.COUNT: str(count), processes.INDEX: str(rank)}
        env |= where
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", NOTING, *arguments], cwd=root, env=env, **pipes)


def together(root, *arguments, ranks=(0, 1), each=((), ()), **more):
    """[(stdout, stderr, exit code)] of two processes that were started together."""
    port = free_port()
    running = [start(root, *arguments, *each[rank], rank=rank, port=port, **more) for rank in ranks]
    return [(*process.communicate(timeout=400), process.returncode) for process in running]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def await_checkpoint(root, step, running):
    waiting = time.monotonic()
    while not (root / f"run/sft/checkpoints/{step}").exists():
        assert time.monotonic() - waiting < 300 and all(process.poll() is None for process in running)
        time.sleep(0.05)


def losses(root, stage="sft"):
    lines = [json.loads(line) for line in (root / "run" / stage / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


def seen(root):
    """{(step, row of the batch): crc32 of what was trained on} of all processes together."""
    found = {}
    for file in root.glob("seen-*.jsonl"):
        for step, row, crc in map(json.loads, file.read_text().splitlines()):
            assert found.setdefault((step, row), crc) == crc
    return found


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory):
    """{devices: root}: a recipe of 50 steps of SFT on one device, which ends there; whole on eight, and whole on two
    processes with four devices each, of which one gets a SIGTERM; what all processes said."""
    roots = {name: recipes.write(tmp_path_factory.mktemp(name)) for name in ("one", "eight", "two")}
    one = ("train", "recipe.yaml", "--stage", "sft", *LONG, "mesh={data: 1, fsdp: 1}")
    whole = ("run", "recipe.yaml", *LONG, "joint.weak={placement: cached}")
    for name, arguments, devices in (("one", one, 1), ("eight", whole, 8)):
        process = start(roots[name], *arguments, devices=devices)
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
    port = free_port()
    running = [start(roots["two"], *whole, rank=rank, port=port) for rank in (0, 1)]
    await_checkpoint(roots["two"], 4, running)
    running[1].send_signal(signal.SIGTERM)
    stopped = [(*process.communicate(timeout=120), process.returncode) for process in running]
    return roots, stopped, together(roots["two"], *whole)


@pytest.mark.slow
def test_fifty_losses_and_all_examples_are_the_same_on_one_device_eight_and_two_processes(carried_out):
    roots, _, _ = carried_out
    expected, rows = losses(roots["one"]), seen(roots["one"])
    assert len(expected) == 50 and len(rows) == 50 * 8
    for name in ("eight", "two"):
        print(name, "largest relative difference", np.max(np.abs(losses(roots[name]) / expected - 1)))
        np.testing.assert_allclose(losses(roots[name]), expected, rtol=1e-5)
        assert seen(roots[name]) == rows


@pytest.mark.slow
def test_sigterm_to_one_process_saves_on_both_after_the_same_step(carried_out):
    _, stopped, _ = carried_out
    said = set()
    for _, err, code in stopped:
        assert code == 75
        said |= {line for line in err.splitlines() if line.startswith("wmss: saved step")}
    assert len(said) == 1, said


@pytest.mark.slow
def test_a_whole_recipe_of_two_processes_ends_as_that_of_one(carried_out):
    """Every stage: cache, scores, curriculum, weak agent from disk, export, evaluation. Only process 0 speaks."""
    roots, _, ((_, err, code), (out, _, other)) = carried_out
    assert (code, other) == (0, 0), err
    assert not [line for line in out.splitlines() if line and not re.search("Gloo|peer ranks", line)]
    alone, two = (roots[name] / "run" for name in ("eight", "two"))
    for stage in ("pretrain", "joint"):
        np.testing.assert_allclose(losses(roots["two"], stage), losses(roots["eight"], stage), rtol=1e-4)
    scores = [sorted((work / "scores").glob("*.parquet"), key=mean_entropy) for work in (two, alone)]
    for ours, theirs in zip(*scores, strict=True):
        for name in ("entropy", "nll", "margin", "n_tokens"):
            np.testing.assert_allclose(pq.read_table(ours)[name], pq.read_table(theirs)[name], rtol=1e-4)
    exported = [work / "export/model.safetensors" for work in (two, alone)]
    assert exported[0].stat().st_size == exported[1].stat().st_size
    figures = [json.loads((work / "summary.json").read_text())["eval"] for work in (two, alone)]
    assert figures[0].keys() == figures[1].keys()


def mean_entropy(file):
    return float(np.mean(pq.read_table(file)["entropy"]))


@pytest.mark.slow
def test_processes_that_differ_say_in_what_before_anything_is_trained(tmp_path):
    root = recipes.write(tmp_path)
    alone_a_mistake = ("dataset.batch_size=12",)  # which does not split over eight devices
    results = together(root, "train", "recipe.yaml", *MESH, each=((), alone_a_mistake))
    host = socket.gethostname()
    for _, err, code in results:
        assert code == 2
        said = [line for line in err.splitlines() if line.startswith("wmss: error:")]
        assert len(said) == 1 and f"process 1 on {host} differs from process 0 on {host} in recipe" in said[0]
    assert not (root / "run/sft").exists() and not (root / "run/pretrain").exists()


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_is_told_by_all(tmp_path):
    root = recipes.write(tmp_path)
    (root / "train.jsonl").write_text('{"question": "1+1="}\n')
    for _, err, code in together(root, "train", "recipe.yaml", *MESH):
        assert code == 2 and "train.jsonl" in err


def test_a_process_whose_peers_never_come_gives_up(tmp_path):
    root, port = recipes.write(tmp_path), free_port()
    process = start(root, "train", "recipe.yaml", rank=1, port=port, WMSS_START_SECONDS="2")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert f"nobody answers at localhost:{port} (JAX_COORDINATOR_ADDRESS) within 2 s" in err


@pytest.mark.parametrize(
    "variables, said",
    [
        ({processes.COUNT: "2"}, "JAX_NUM_PROCESSES given without JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        (
            {processes.ADDRESS: "h:1", processes.COUNT: "2", processes.INDEX: "2"},
            "JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=2: expected a count and a number from 0 below it",
        ),
        (
            {processes.ADDRESS: "h:1", processes.COUNT: "2", processes.INDEX: "1", "WMSS_START_SECONDS": "soon"},
            "WMSS_START_SECONDS=soon: expected a whole number of seconds",
        ),
    ],
)
def test_variables_that_make_no_sense_are_refused(monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        processes.start()
    assert said in str(error.value)


@pytest.mark.parametrize(
    "variables, several",
    [
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, True), ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # a shell inside an allocation, not one of its tasks
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, True), ({"JOB_COMPLETION_INDEX": "3"}, True),
        ({}, False),
    ],
)  # fmt: skip
def test_a_launcher_says_whether_there_are_others(monkeypatch, variables, several):
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes._in_cluster() == several


def test_one_process_needs_nobody():
    assert processes.agreed(lambda: {"a": [1]}) == {"a": [1]} and processes.gathered(b"x") == [b"x"]
    assert processes.first()
    processes.check_alike({"recipe": "any"})


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_the_rows_of_a_batch_come_to_their_devices(mesh):
    """Given and taken: every device of this process has the rows that its place in the mesh is for."""
    mesh = sharding.make_mesh(*mesh)
    values = np.arange(16 * 3).reshape(16, 3)
    placed = sharding.place_rows({"x": values}, mesh)["x"]
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])
    np.testing.assert_array_equal(sharding.taken_rows(placed), values)
    np.testing.assert_array_equal(sharding.local_rows(mesh, 16), np.arange(16))
