"""The side of a worker that all share: what to train, how, and the conversation with peers.py. Standard library only.

A worker is started as `python SCRIPT` with where its inputs lie. It loads, says so in one line of JSON on stdout, and
then takes one step for each line it reads.
"""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

DEVICE = os.environ.get("WMSS_BENCH_DEVICE", "cpu")  # or gpu
COMPUTE = {"cpu": "float32", "gpu": "bfloat16"}[DEVICE]  # what is trained is float32 on both
LAMBDA = 0.5  # of the mixed logits
LEARNING_RATE, BETA1, BETA2, EPSILON, WEIGHT_DECAY = 1e-4, 0.9, 0.999, 1e-8, 0.01

# The conversation has stdout for itself: whatever a library prints goes to the log.
_ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def serve(step, packages):
    """Take a step for every line on stdin; `step` returns its result, for JSON, when all of its work is done."""
    _answer({"versions": {name: importlib.metadata.version(name) for name in packages}})
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        result = step()
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        _answer({"result": result, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": _peak_bytes(packages)})


def _answer(answer):
    _ANSWERS.write(json.dumps(answer) + "\n")


def _peak_bytes(packages):
    """Return the most memory this process ever had, on a GPU of the GPU's.

    On a CPU that is resident memory; getrusage would count what the parent had as well.
    """
    if DEVICE == "gpu" and "torch" in packages:  # jax may be imported there, too, and is to leave the GPU alone
        return sys.modules["torch"].cuda.max_memory_allocated()
    if DEVICE == "gpu":
        return sys.modules["jax"].devices()[0].memory_stats()["peak_bytes_in_use"]
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
