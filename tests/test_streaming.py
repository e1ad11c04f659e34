"""Import: every tensor read once, in pieces, and little memory beside the parameters that come of it."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import wmss_jax as wmss
from wmss_jax import hf, streaming, tensorfile
from wmss_jax.models import CausalLM, qwen3


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory):
    """A directory of several files, random bfloat16: 0.5 GB, or as many as WMSS_TEST_IMPORT_GB says."""
    gigabytes = float(os.environ.get("WMSS_TEST_IMPORT_GB", "0.5"))
    out = tmp_path_factory.mktemp("import")
    config = tiny.CONFIG
    layers = max(2, round((gigabytes * 1e9 / 2 - 2 * 32000 * 1024) / 13.6e6))
    config = dataclasses.replace(
        config, vocab_size=32000, hidden_size=1024, intermediate_size=3072, num_layers=layers, num_heads=16,
        num_kv_heads=8, head_dim=128,
    )  # fmt: skip
    model = CausalLM("qwen3", config)
    rng = np.random.default_rng(0)
    (out / "config.json").write_text(json.dumps(qwen3.to_hf(config)))
    shapes = {name: row.their_shape(model.sizes) for row in model.rows for name in row.names(model.sizes)}
    random = ((name, rng.integers(0, 2**14, shape, np.uint16).view(jnp.bfloat16)) for name, shape in shapes.items())
    tensorfile.write(out, random, {name: 2 * math.prod(shape) for name, shape in shapes.items()}, int(2e8))
    return out


IMPORT = """
import json, sys, threading, time
import jax, wmss_jax as wmss
mesh = wmss.make_mesh(1, 8, 1) if sys.argv[2] == "8" else None
anonymous = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
jax.block_until_ready(jax.numpy.zeros(()))
peak, before = 0, anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
model, params = wmss.load(sys.argv[1], mesh, sys.argv[3])
jax.block_until_ready(params)
shards = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
print(json.dumps({"excess": peak - before - sum(shards), "largest": max(shards), "all": sum(shards)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("devices, dtype", [("1", "bfloat16"), ("8", "float32")])
def test_an_import_holds_little_beside_its_result(random_checkpoint, devices, dtype):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
    command = [sys.executable, "-c", IMPORT, str(random_checkpoint), devices, dtype]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    print({name: f"{value / 1e6:.0f} MB" for name, value in said.items()})
    assert said["excess"] <= said["largest"] + 500e6, said


@pytest.mark.parametrize("mesh", [None, (2, 2, 2), (1, 4, 2)])
def test_tensors_read_in_pieces_are_the_tensors(golden, monkeypatch, mesh):
    """Pieces of one row of the outermost letter, and replicas on `data`, against whole tensors turned by the table."""
    monkeypatch.setattr(streaming, "PIECE_BYTES", 1)
    model, params = wmss.load(golden / "qwen3/untied", mesh=None if mesh is None else wmss.make_mesh(*mesh))
    files = {}
    for file in (golden / "qwen3/untied").glob("*.safetensors"):
        files |= load_file(file)
    for row in model.rows:
        parts = [row.to_ours(files[name], model.sizes) for name in row.names(model.sizes)]
        np.testing.assert_array_equal(hf.leaf_of(params, row), np.stack(parts) if row.stacked else parts[0])
