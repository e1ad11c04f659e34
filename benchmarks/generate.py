"""Greedy generation by wmss_jax against transformers + torch, on the same weights and prompts.

    python -m benchmarks.generate [--layers 4 --width 256 --vocab 32768 --rows 32 --prompt 64 --new 128] [--pairs 15]
    python -m benchmarks.generate --device gpu --shape qwen3_0_6b --pairs 5

The faster of torch's dynamic and static caches counts. Each contestant is a process of its own on the same core, with
one thread, in float32, and generates when told to, so that they can be timed in turn; or on one GPU in bfloat16, one
after another. The comparison counts if all continuations are the same, but where the best two logits of the token at
which they part are within the gap that rounding explains.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import shapes, timing
from benchmarks.peers import Side, Worker, model_config

GAPS = {"cpu": 1e-4, "gpu": 0.15}  # of logits of order 1; on a GPU hidden states have 8 bits
WARMUP = 2
TARGET = 3.0
OURS = "wmss"
PEERS = ("torch_dynamic", "torch_static")


def sides(directory: Path, new_tokens: int) -> dict[str, Side]:
    """Return who takes part."""
    inputs = (str(directory / "model"), str(directory / "prompts.npy"), str(new_tokens))
    torch = {f"torch_{cache}": Side("torch", ("torch_generate.py", *inputs, cache)) for cache in ("dynamic", "static")}
    return {OURS: Side(None, ("wmss_generate.py", *inputs)), **torch}


def write_inputs(directory: Path, args: argparse.Namespace) -> None:
    """Write a random model, of larger weights than one starts from so that logits differ, and random prompts."""
    import jax
    import numpy as np

    import wmss_jax as wmss
    from wmss_jax.models import CausalLM

    if args.device == "gpu":
        jax.config.update("jax_platforms", "cpu")  # the workers need all of the GPU
    args.seq = args.prompt + args.new
    model = CausalLM("qwen3", model_config(args))
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    wmss.save(model, model.init(jax.random.key(0), dtype), directory / "model")
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (args.rows, args.prompt), dtype=np.int32)
    np.save(directory / "prompts.npy", prompts)


def largest_gap(directory: Path, ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Return the largest distance of the best two logits among the tokens at which continuations part; 0: nowhere."""
    import jax
    import numpy as np

    import wmss_jax as wmss

    model, params = wmss.load(directory / "model", dtype="float32")
    prompts, logits, gaps = np.load(directory / "prompts.npy"), jax.jit(model.logits), [0.0]
    for prompt, mine, other in zip(prompts.tolist(), ours, theirs, strict=True):
        parting = [n for n in range(len(mine)) if mine[n] != other[n]]
        if parting:
            tokens = np.array([prompt + mine], np.int32)
            best = np.sort(np.asarray(logits(params, tokens))[0, len(prompt) + parting[0] - 1])
            gaps.append(float(best[-1] - best[-2]))
    return max(gaps)


def report(directory: Path, args: argparse.Namespace, times: dict[str, Any], answers: dict[str, Any]) -> None:
    """Emit the comparison, null where the continuations differ, and every contestant's own figures."""
    present = [name for name in PEERS if name in times]
    if present:
        fastest = min(present, key=lambda name: timing.spread(times[name]).median)
        gap = largest_gap(directory, answers[OURS][0]["result"], answers[fastest][0]["result"])
        counts = gap <= GAPS[args.device]
        spread = timing.ratio(times, fastest, OURS)
        cpu = {name: [answer["cpu_seconds"] for answer in answers[name][WARMUP:]] for name in (fastest, OURS)}
        timing.say(f"{fastest} over {OURS}: {spread}, of CPU seconds {timing.ratio(cpu, fastest, OURS)}; gap {gap:.1e}")
        if not counts:
            timing.say(f"DOES NOT COUNT: continuations part where the best two logits are {gap:.1e} apart")
        timing.emit(
            "generate.vs_transformers", spread.median if counts else None, target=TARGET, better="higher", unit="ratio"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=GAPS, default="cpu", help="default cpu")
    parser.add_argument("--shape", choices=shapes.SHAPES, help="in place of layers, width and vocab")
    sizes = {"layers": 4, "width": 256, "vocab": 32768, "rows": 32, "prompt": 64, "new": 128, "pairs": 15}
    for flag, default in sizes.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error(f"--pairs must be at least 2 to have a spread, got {args.pairs}")
    os.environ["WMSS_BENCH_DEVICE"] = args.device
    core = timing.pin(threads=1) if args.device == "cpu" else ("all",)
    timing.say(f"core {core[0]}; {timing.one_line(timing.machine())}")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_inputs(directory, args)
        made = sides(directory, args.new)
        # In turn where they sleep meanwhile; on a GPU each has all of its memory.
        times, answers = {}, {}
        for group in [made] if args.device == "cpu" else [{name: side} for name, side in made.items()]:
            found_times, found = measured(directory, group, args.pairs)
            times, answers = times | found_times, answers | found
            for name, seconds in found_times.items():
                rate = args.rows * args.new / timing.spread(seconds).median
                timing.emit(f"generate.{name}_tokens_per_s", rate, target=None, better="higher", unit="tokens/s")
        report(directory, args, times, answers)


def measured(directory: Path, group: dict[str, Side], pairs: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the times and the answers of these sides, timed in turn; a peer that fails is left out."""
    workers, answers = {}, {}
    for name, side in group.items():
        try:
            worker = Worker(name, side, directory)
            answers[name] = [worker.step() for _ in range(WARMUP)]
        except (RuntimeError, OSError) as error:
            if name == OURS:
                raise SystemExit(f"{name} failed: {error}") from error
            timing.say(f"skipped {name}: {error}")
            answers.pop(name, None)
            continue
        workers[name] = worker
    steps = {name: lambda name=name: answers[name].append(workers[name].step()) for name in workers}
    times = timing.interleaved(steps, pairs, warmup=0)
    for worker in workers.values():
        worker.stop()
    return times, answers


if __name__ == "__main__":
    main()
