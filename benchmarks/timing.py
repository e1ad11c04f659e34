"""Clocks and figures: what every benchmark shares. Standard library only, so that it can run before jax is imported.

Two programs are compared by running them in turn, round after round, and taking the median of their ratios *within*
a round: a machine that slows down for a minute then slows both alike. A figure is one line of JSON on stdout;
everything meant for people goes to stderr.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers", "torch", "google-tunix")
# Whatever library multiplies matrices reads one of these when it is loaded.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")


class Spread(NamedTuple):
    """The median of a sample and its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


def interleaved(
    steps: Mapping[str, Callable[[], object]], pairs: int = 15, *, warmup: int = 2
) -> dict[str, list[float]]:
    """Return seconds per call of every step, one number per round; in a round each runs once.

    Args:
        steps: callables that return when their work is done (jax: after block_until_ready).
        warmup: unmeasured calls of each beforehand, compilation among them.
    """
    for _ in range(warmup):
        for step in steps.values():
            step()
    names, times = list(steps), {name: [] for name in steps}
    for round_ in range(pairs):
        for name in _order(names, round_):
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
        say(f"round {round_ + 1}/{pairs}: " + ", ".join(f"{name} {times[name][-1]:.4g} s" for name in names))
    return times


def ratio(times: Mapping[str, Sequence[float]], a: str, b: str) -> Spread:
    """Return time_a / time_b, each ratio taken within one round."""
    return spread([ta / tb for ta, tb in zip(times[a], times[b], strict=True)])


def spread(sample: Sequence[float]) -> Spread:
    """Return the median and quartiles of at least two numbers."""
    low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
    return Spread(median, low, high)


def emit(
    name: str, value: float | None, *, target: float | None, better: Literal["lower", "higher"], unit: str
) -> None:
    """Print a figure as one line of JSON on stdout; a value of None is a comparison that does not count."""
    value = float(f"{value:.5g}") if isinstance(value, float) else value
    print(json.dumps({"name": name, "value": value, "target": target, "better": better, "unit": unit}), flush=True)


def say(message: str) -> None:
    """Print one line for people, on stderr."""
    print(message, file=sys.stderr, flush=True)


def pin(threads: int = 1) -> tuple[int, ...]:
    """Bind this process and all it will start to the `threads` idlest cores, and return these.

    XLA makes as many threads as it may use cores, torch as many as OMP_NUM_THREADS says: after this they agree.

    Raises:
        RuntimeError: jax or torch is loaded already, with threads of its own.
        ValueError: there are not that many cores.
    """
    loaded = [name for name in ("jax", "torch") if name in sys.modules]
    if loaded:
        raise RuntimeError(f"pin() must come before {loaded[0]} is imported; its threads are made already")
    cores = os.sched_getaffinity(0)
    if not 1 <= threads <= len(cores):
        raise ValueError(f"threads must be 1 to {len(cores)}, the cores this process may use; got {threads}")
    before = _idle_ticks()
    time.sleep(1)  # long enough to tell a neighbour's run from noise
    after = _idle_ticks()
    chosen = tuple(sorted(sorted(cores, key=lambda core: before[core] - after[core])[:threads]))
    os.sched_setaffinity(0, chosen)
    os.environ |= dict.fromkeys(_THREAD_VARIABLES, str(threads))
    return chosen


def machine() -> dict[str, str]:
    """Return what a figure depends on besides the code: processor, cores, memory, versions; plain strings."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {"cpu": _cpu(), "cores": str(os.cpu_count()), "memory": f"{memory / 2**30:.0f} GiB"}
    if "jax" in sys.modules:
        facts["device"] = sys.modules["jax"].devices()[0].device_kind
    return {**facts, "python": platform.python_version(), **versions(PACKAGES)}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that this environment has."""
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed}


def one_line(facts: Mapping[str, str]) -> str:
    """Return facts such as those of `machine` as "cpu AMD EPYC, cores 2, ..."."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _order(names: list[str], round_: int) -> list[str]:
    """Return the names rotated by one every round and reversed every other: nobody always follows the same one."""
    start = round_ % len(names)
    rotated = names[start:] + names[:start]
    return rotated if round_ % 2 == 0 else rotated[::-1]


def _idle_ticks() -> dict[int, int]:
    """Return per core the clock ticks it has been idle since boot (proc(5), fourth number of a cpuN line)."""
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    return {int(line[0][3:]): int(line[4]) for line in lines if line[0].startswith("cpu") and line[0] != "cpu"}


def _cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.machine()
