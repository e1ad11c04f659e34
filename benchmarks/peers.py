"""One training step of wmss_jax against transformers, a two-model loop in torch, and Tunix.

    python -m benchmarks.peers [--layers 4 --width 256 --vocab 32768 --rows 4 --seq 512] [--pairs 15]
    python -m benchmarks.peers --device gpu --shape qwen3_0_6b --rows 2 --seq 4096

All train the same Qwen3 from the same Hugging Face directory on the same batch, in float32, with the same AdamW, on
the same one core; or on one GPU with products in bfloat16, one after another, since none shares its memory. Each is a
process of its own in its own environment (see environments.py; torch's takes 5 GB, and $WMSS_BENCH_PYTHON_TORCH names
one that is there) that takes a step when told to, so that they can be timed in turn while others sleep. A comparison
counts if the losses of both sides agree.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import environments, shapes, timing

LOSS_TOLERANCES = {"cpu": 1e-4, "gpu": 2e-2}
# Steps whose losses must agree. In bfloat16 on a GPU the losses of the second and third were up to 2 % apart, in both
# directions, where the first agreed; probably because Adam's first update is little else than the gradient's sign,
# which rounding decides where gradients are small.
COMPARED_STEPS = {"cpu": 3, "gpu": 1}
WARMUP_STEPS = 3  # compilation, allocators; and losses that agree after it show that the optimizers do
WORKERS = Path(__file__).parent / "peer_workers"


class Side(NamedTuple):
    """One contestant: the environment it runs in (None: ours), its script and the script's arguments."""

    environment: str | None
    command: tuple[str, ...]


class Comparison(NamedTuple):
    """peer's seconds / our seconds."""

    peer: str
    ours: str
    target: float


SIDES = {
    "wmss_resident": Side(None, ("wmss_step.py", "logit_mix")),
    "wmss_sft": Side(None, ("wmss_step.py", "sft")),
    "torch_two_model": Side("torch", ("torch_two_model.py",)),
    "transformers_sft": Side("torch", ("torch_sft.py",)),
    "tunix_sft": Side("tunix", ("tunix_sft.py",)),
}
COMPARISONS = {
    "wmss_resident_vs_torch_two_model": Comparison("torch_two_model", "wmss_resident", 1.3),
    "sft_vs_tunix_sft": Comparison("tunix_sft", "wmss_sft", 1.5),
    "sft_vs_transformers_sft": Comparison("transformers_sft", "wmss_sft", 0.95),
}


def _requirements(environment: str) -> tuple[str, ...]:
    """Return what an environment holds; what both sides use has our version, so that only the peer's code differs."""
    same = lambda *names: [f"{name}=={importlib.metadata.version(name)}" for name in names]
    wanted = {
        "torch": ("torch==2.13.0", *same("transformers", "numpy")),
        "tunix": ("google-tunix==0.1.7", *same("jax", "jaxlib", "flax", "optax")),
    }
    return wanted[environment]


class Worker:
    """A running contestant: `step()` makes it take one step and returns its answer."""

    def __init__(self, name: str, side: Side, directory: Path):
        python = sys.executable
        if side.environment is not None:
            python = os.environ.get(f"WMSS_BENCH_PYTHON_{side.environment.upper()}") or str(
                environments.python_of(side.environment, _requirements(side.environment))
            )
        script, *arguments = side.command
        self._log = directory / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(WORKERS / script), *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1,
            )  # fmt: skip
        self.versions = self._read()["versions"]

    def step(self) -> dict[str, Any]:
        self._process.stdin.write("step\n")
        return self._read()

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            said = [line.strip() for line in self._log.read_text().splitlines() if line.strip()]
            raise RuntimeError(f"exit code {self._process.wait()}: {said[-1] if said else 'no message'}")
        return json.loads(line)


def model_config(args: argparse.Namespace) -> Any:
    """Return the config of a published shape, or of the small model that the arguments describe."""
    # Larger weights than one starts from: logits then differ, and losses agree only where models do.
    if args.shape:
        return shapes.config(args.shape, init_std=0.05)
    from wmss_jax.models import qwen3

    # rope_theta is Qwen3's own, since Tunix 0.1.7 rotates by that whatever its config says.
    return qwen3.Config(
        vocab_size=args.vocab, hidden_size=args.width, intermediate_size=4 * args.width, num_layers=args.layers,
        num_heads=4, num_kv_heads=2, head_dim=64, rope_theta=1e6, norm_eps=1e-6, tied=False, max_positions=args.seq,
        init_std=0.05,
    )  # fmt: skip


def write_inputs(directory: Path, args: argparse.Namespace) -> None:
    """Write two random models and a batch: whole rows of one segment, of which the first quarter is the prompt."""
    import jax
    import numpy as np

    import wmss_jax as wmss
    from wmss_jax.models import CausalLM

    if args.device == "gpu":
        jax.config.update("jax_platforms", "cpu")  # the workers need all of the GPU
    model = CausalLM("qwen3", model_config(args))
    for seed, role in enumerate(("strong", "weak")):
        dtype = "float32" if args.device == "cpu" else "bfloat16"  # there the weak one is held in it
        wmss.save(model, model.init(jax.random.key(seed), dtype), directory / role)
    # Never token 0, which Tunix's examples take for padding.
    tokens = np.random.default_rng(0).integers(1, model.config.vocab_size, (args.rows, args.seq), dtype=np.int32)
    mask = np.ones_like(tokens, dtype=np.float32)
    mask[:, : args.seq // 4] = 0
    np.savez(directory / "batch.npz", tokens=tokens, mask=mask)


def start(directory: Path, names: Iterable[str]) -> tuple[dict[str, Worker], dict[str, list[dict[str, Any]]]]:
    """Return the workers that run and what they answered to their first steps; a peer that fails is left out."""
    workers, answers = {}, {}
    inputs = [str(directory / part) for part in ("strong", "weak", "batch.npz")]
    for name in names:
        side = SIDES[name]
        script, *arguments = side.command
        try:
            worker = Worker(name, side._replace(command=(script, *inputs, *arguments)), directory)
            answers[name] = [worker.step() for _ in range(WARMUP_STEPS)]
        except (RuntimeError, OSError) as error:
            if side.environment is None:
                raise SystemExit(f"{name} failed: {error}") from error
            timing.say(f"skipped {name}: {error}")
            continue
        workers[name] = worker
        losses = ", ".join(f"{answer['result']:.6f}" for answer in answers[name])
        timing.say(f"{name}: losses {losses} ({timing.one_line(worker.versions)})")
    return workers, answers


def measured(
    directory: Path, names: Iterable[str], pairs: int
) -> tuple[dict[str, list[float]], dict[str, list[dict[str, Any]]]]:
    """Return the times and the answers of these sides, timed in turn."""
    workers, answers = start(directory, names)
    steps = {name: lambda name=name: answers[name].append(workers[name].step()) for name in workers}
    try:
        times = timing.interleaved(steps, pairs, warmup=0)
    except (RuntimeError, OSError) as error:
        raise SystemExit(f"a worker died between its {WARMUP_STEPS} first steps and the last: {error}") from error
    for worker in workers.values():
        worker.stop()
    return times, answers


def compare(name: str, times: dict[str, list[float]], answers: dict[str, list[dict[str, Any]]], device: str) -> None:
    """Emit one comparison; with value null, if the two sides did not train the same thing."""
    peer, ours, target = COMPARISONS[name]
    steps, tolerance = COMPARED_STEPS[device], LOSS_TOLERANCES[device]
    first = zip(answers[peer][:steps], answers[ours][:steps], strict=True)
    gaps = [abs(theirs["result"] - mine["result"]) for theirs, mine in first]
    gap, counts = max(gaps), all(gap <= tolerance for gap in gaps)  # not max(gaps) <= ...: it may miss a NaN
    if not counts:
        timing.say(f"{name} DOES NOT COUNT: losses differ by {gap:.1e}, allowed is {tolerance:.0e}")
    spread = timing.ratio(times, peer, ours)
    # Both sides have one thread on one core, so CPU seconds are wall seconds less what neighbours took.
    cpu = {side: [answer["cpu_seconds"] for answer in answers[side][WARMUP_STEPS:]] for side in (peer, ours)}
    timing.say(f"{name}: {spread}, of CPU seconds {timing.ratio(cpu, peer, ours)}, losses within {gap:.1e}")
    timing.emit(f"peers.{name}", spread.median if counts else None, target=target, better="higher", unit="ratio")


def report(name: str, times: list[float], answers: list[dict[str, Any]]) -> None:
    """Emit what one side needs by itself; on stderr also how much of the core it had: less than all is a neighbour."""
    seconds, peak = timing.spread(times), answers[-1]["peak_bytes"] / 2**30
    share = sum(answer["cpu_seconds"] for answer in answers) / sum(answer["seconds"] for answer in answers)
    timing.say(f"{name}: {seconds} s a step, {share:.1%} of them on the core; last loss {answers[-1]['result']:.6f}")
    timing.emit(f"peers.{name}_seconds", seconds.median, target=None, better="lower", unit="s")
    timing.emit(f"peers.{name}_peak_memory", peak, target=None, better="lower", unit="GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=LOSS_TOLERANCES, default="cpu", help="default cpu")
    parser.add_argument("--shape", choices=shapes.SHAPES, help="in place of layers, width and vocab")
    for flag, default in {"layers": 4, "width": 256, "vocab": 32768, "rows": 4, "seq": 512, "pairs": 15}.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error(f"--pairs must be at least 2 to have a spread, got {args.pairs}")
    os.environ["WMSS_BENCH_DEVICE"] = args.device
    core = timing.pin(threads=1) if args.device == "cpu" else ("all",)
    timing.say(f"core {core[0]}; {timing.one_line(timing.machine())}")

    with tempfile.TemporaryDirectory() as directory:
        write_inputs(Path(directory), args)
        # In turn where they sleep meanwhile; on a GPU each has all of its memory.
        groups = [list(SIDES)] if args.device == "cpu" else [[name] for name in SIDES if not name.startswith("tunix")]
        times, answers = {}, {}
        for names in groups:
            found_times, found = measured(Path(directory), names, args.pairs)
            times, answers = times | found_times, answers | found
            for name in found_times:
                report(name, times[name], answers[name][WARMUP_STEPS:])

    for name, comparison in COMPARISONS.items():
        if comparison.peer in times:
            compare(name, times, answers, args.device)


if __name__ == "__main__":
    main()
