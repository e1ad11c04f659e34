"""What a training stage tells while it runs: metrics.jsonl always, a progress bar, TensorBoard and traces as extras."""

import contextlib
import datetime
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

FILE = "metrics.jsonl"
Write = Callable[[int, Mapping[str, float]], None]  # (step, its metrics)
Sink = tuple[Write, Callable[[], None]]  # write and close

_UNTRACED = 2  # steps at the start of a process: the first one compiles, the second may still allocate


class Tracker:
    """Records the metrics of one stage; a context manager.

    `<work_dir>/metrics.jsonl` has one JSON object a line: `step`, `time` (seconds since 1970) and the metrics; what
    is not finite is null. Lines of steps after `start_step` are dropped first: a resumed run computes them again.

    Args:
        total_steps: at which the stage ends.
        start_step: last step that the resumed checkpoint has; 0 for a new stage.
        tensorboard: write `<work_dir>/tensorboard` as well.
        primary: false on all processes but one, which then say and write nothing.
        plain_every_s: seconds between two plain lines, which replace the bar where the output is no terminal.
        console: where bar and lines go; default: standard error.

    Raises:
        ModuleNotFoundError: TensorBoard is wanted and tensorboardX is not installed.
    """

    def __init__(
        self,
        work_dir: str | os.PathLike,
        total_steps: int,
        tensorboard: bool = False,
        *,
        start_step: int = 0,
        primary: bool = True,
        plain_every_s: float = 30.0,
        console: Console | None = None,
    ):
        self._sinks: list[Sink] = []
        if not primary:
            return
        directory = Path(work_dir)
        directory.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._sinks.append(_tensorboard(directory / "tensorboard", start_step))
        # Another service (wandb, trackio) is one more function here, made like `_tensorboard`.
        self._sinks.append(_jsonl(directory / FILE, start_step))
        console = console or Console(stderr=True)
        if console.is_terminal:
            self._sinks.append(_bar(console, start_step, total_steps))
        else:
            self._sinks.append(_lines(console, total_steps, plain_every_s))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step; `loss`, `tokens_per_s` and `mfu` are also shown.

        Raises:
            ValueError: a metric is called `step` or `time`.
        """
        if not self._sinks:
            return  # not even float(): it would wait for the device
        if metrics.keys() & {"step", "time"}:
            raise ValueError(f"metrics cannot be called step or time; got {', '.join(metrics)}")
        values = {name: float(value) for name, value in metrics.items()}
        for write, _ in self._sinks:
            write(step, values)

    def close(self) -> None:
        """Close files and bar; `with` does it."""
        while self._sinks:
            self._sinks.pop()[1]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _jsonl(file: Path, start_step: int) -> Sink:
    if file.exists():
        kept = [line for line in file.read_text().splitlines() if _step(line) <= start_step]
        partial = file.with_name(f"{file.name}.partial")  # a crash here must not lose the lines to keep
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(file)
    stream = open(file, "a", buffering=1)  # noqa: SIM115  (a line at a time, so that others can follow)

    def write(step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        stream.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")

    return write, stream.close


def _step(line: str) -> float:
    """Return the step of a line; of one torn by a crash, infinity."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


def _tensorboard(directory: Path, start_step: int) -> Sink:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "TensorBoard files need tensorboardX: pip install 'wmss-jax[tracking]', or switch tensorboard off"
        ) from error
    # TensorBoard then hides what an earlier run wrote from this step on. The suffix, because the name has seconds only.
    writer = SummaryWriter(str(directory), purge_step=start_step + 1, filename_suffix=f".{start_step}")

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _bar(console: Console, start_step: int, total_steps: int) -> Sink:
    progress = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=console)
    task = progress.add_task("", total=total_steps, completed=start_step)
    text = _status(total_steps)
    progress.start()
    return lambda step, values: progress.update(task, completed=step, description=text(step, values)), progress.stop


def _lines(console: Console, total_steps: int, every_s: float) -> Sink:
    due, text = -math.inf, _status(total_steps)

    def write(step: int, values: Mapping[str, float]) -> None:
        nonlocal due
        line = f"step {step}/{total_steps}  {text(step, values)}"
        if time.monotonic() >= due or step == total_steps:
            due = time.monotonic() + every_s
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return write, lambda: None


def _status(total_steps: int) -> Callable[[int, Mapping[str, float]], str]:
    """Return what makes a step's values a line: loss, speed, time left by the pace since the first call."""
    first: tuple[int, float] | None = None  # the time before it is loading and compiling

    def text(step: int, values: Mapping[str, float]) -> str:
        nonlocal first
        first = first or (step, time.monotonic())
        parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
        if "tokens_per_s" in values:
            parts.append(f"{values['tokens_per_s']:,.0f} tokens/s")
        if "mfu" in values:
            parts.append(f"{values['mfu']:.1%} of peak")
        if step > first[0]:
            left_s = (time.monotonic() - first[1]) / (step - first[0]) * (total_steps - step)
            parts.append(f"ETA {datetime.timedelta(seconds=max(0, round(left_s)))}")
        return "  ".join(parts)

    return text


@contextlib.contextmanager
def profiled(directory: Path, steps: int | None) -> Iterator[Callable[[Any], None]]:
    """Give what is to be called with the result of every step, once it is dispatched, for `steps` of them to be traced.

    JAX's profiler traces from the third step on; `xprof --logdir DIRECTORY`, or TensorBoard, shows what it wrote. The
    trace is written as well where the loop ends early. With None nothing is traced.
    """
    count, running, last = 0, False, None

    def after_step(result: Any) -> None:
        nonlocal count, running, last
        count, last = count + 1, result
        if steps is not None and count in (_UNTRACED, _UNTRACED + steps):
            jax.block_until_ready(result)  # a step is whole in the trace or not in it
            if running:
                jax.profiler.stop_trace()
            else:
                jax.profiler.start_trace(directory)
            running = not running

    try:
        yield after_step
    finally:
        if running:
            try:
                jax.block_until_ready(last)
            finally:
                jax.profiler.stop_trace()
