"""Processes that carry out the runs of a study side by side; what happens to one of them happens to its run alone.

They are spawned, each bound to its share of the cores, because a program of this size gains more from the next run on
another core than from a second core of its own. The runs of one seed go to one process as far as possible, which keeps
what they have in common. Where jax finds an accelerator there is one process, since it takes all of that.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from wmss_jax.lab.study import Study

LOG = "workers.log"  # in the study's work_dir


class Run(NamedTuple):
    """One run: an arm of a seed at a learning rate; without an arm, the seed's start, M0 and M1."""

    seed: int
    arm: str | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"seed {self.seed}, " + ("M0 and M1" if self.arm is None else f"{self.arm} at {self.rate:g}")


class Failure(NamedTuple):
    """Why a run has no figures; `trace` is the traceback, where there is one."""

    message: str
    trace: str = ""


Told = Callable[[Run, Any], None]  # a run, and its {"M0"|"M1"|arm: results.Measured} or Failure


def carry_out(study: Study, runs: Sequence[Run], count: int, tell: Told) -> None:
    """Carry out all runs, the start of a seed before its arms, in at most `count` processes.

    Args:
        tell: hears of every run as it ends, in this process.

    Raises:
        RuntimeError: a process ended before it could begin.
    """
    queue = _Queue(runs)
    shares = _shares(count)
    workers = [_Worker(study, shares[0])]
    try:
        while queue.left or any(worker.run for worker in workers):
            for worker in workers:
                worker.give(queue)
            connection.wait([worker.pipe for worker in workers])
            for index, worker in enumerate(workers):
                if worker.pipe.poll():
                    told = worker.take()
                    if isinstance(told, str):  # it is ready, and says on what
                        if told == "cpu" and len(workers) == 1:
                            workers += [_Worker(study, share) for share in shares[1 : len(queue.left)]]
                        continue
                    run, result = told
                    queue.ended(run, failed=isinstance(result, Failure))
                    tell(run, result)
                    if not worker.alive:
                        workers[index] = _Worker(study, worker.cores)
    finally:
        for worker in workers:
            worker.end()


class _Queue:
    """The runs that are left, and which of them can be given out."""

    def __init__(self, runs: Sequence[Run]):
        self.left = list(runs)
        self._to_start = {run.seed for run in runs if run.arm is None}

    def next(self, seed: int | None) -> Run | None:
        """Return a run of the given seed, else the start of another, else any that can be carried out now."""
        ready = [run for run in self.left if run.arm is None or run.seed not in self._to_start]
        untouched = lambda run: run.arm is None
        preferred = [run for run in ready if run.seed == seed] or list(filter(untouched, ready)) or ready
        if not preferred:
            return None
        # Of other processes' seeds the last: its own process comes to it at the end.
        run = preferred[0] if preferred[0].seed == seed or untouched(preferred[0]) else preferred[-1]
        self.left.remove(run)
        return run

    def ended(self, run: Run, failed: bool) -> None:
        if run.arm is not None:
            return
        self._to_start.discard(run.seed)
        if failed:
            self.left = [other for other in self.left if other.seed != run.seed]


class _Worker:
    """A process from this side."""

    def __init__(self, study: Study, cores: frozenset[int] | None):
        self.cores, self.run, self._seed, self._ready = cores, None, None, False
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, study, cores), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is seen here

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def give(self, queue: _Queue) -> None:
        """Give it a run, if it waits for one."""
        if self._ready and self.run is None and (run := queue.next(self._seed)) is not None:
            self.run, self._seed = run, run.seed
            with contextlib.suppress(OSError):  # that it is no more is heard when it is asked
                self.pipe.send(run)

    def take(self) -> str | tuple[Run, Any]:
        """Return what it says: its device's platform once, then a run with its result."""
        said: Any
        try:
            said = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            code = self._process.exitcode
            if self.run is None:
                raise RuntimeError(f"an idle process of the lab ended with exit code {code}; see {LOG}") from error
            said = Failure(f"its process ended with exit code {code} (killed, or out of memory? see {LOG})")
        if not self._ready:
            self._ready = True
            return said
        run, self.run = self.run, None
        assert run is not None
        return run, said

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(count: int) -> list[frozenset[int] | None]:
    """Return the cores of each of `count` processes; None where they cannot be bound, or are fewer than processes."""
    if not hasattr(os, "sched_getaffinity") or count > cores():
        return [None] * count
    mine = sorted(os.sched_getaffinity(0))
    return [frozenset(mine[index::count]) for index in range(count)]


# -- in the process ---------------------------------------------------------------------------------------------------


def serve(pipe: Any, study: Study, cores: frozenset[int] | None) -> None:
    """Carry out the runs that come through the pipe until it, or the process at its other end, is no more."""
    if cores is not None:
        os.sched_setaffinity(0, cores)  # before jax counts them
    with open(Path(study.config.work_dir) / LOG, "a") as log:
        for stream in (sys.stdout, sys.stderr):  # what stages say would tear the parent's lines apart
            os.dup2(log.fileno(), stream.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is heard by the parent, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import jax

    from wmss_jax.lab.bench import Bench

    pipe.send(jax.default_backend())
    bench = Bench(study, say=lambda line: None)
    while True:
        run: Run = pipe.recv()
        try:
            if run.arm is None or run.rate is None:
                pipe.send(bench.start(run.seed))
            else:
                pipe.send({run.arm: bench.arm(run.seed, run.arm, run.rate)})
        except Exception as error:  # whatever it is, it is this run's alone
            said = str(error) or type(error).__name__
            pipe.send(Failure(f"{type(error).__name__}: {said}", traceback.format_exc()))


def _end_with_parent() -> None:
    """End this process at once when its parent has ended, however that came."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
