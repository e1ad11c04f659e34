"""Calls of functions that may never return, in processes that are killed when they do not.

    with Killable("wmss_jax.evals.symbolic:same", deadline_s=10, imports=["math_verify"]) as same:
        same("\\\\boxed{1/2}", "0.5")            # Reply(value={...}, problem="")
        same("99999999!", "1")                 # Reply(value=None, problem="no answer within 10 s")

Signals and threads do not end a computation that is stuck in C; killing a process does. Each worker is a process that
has imported the function, and forks: only its child computes, so that killing one costs a fork and not the imports.
"""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

MEMORY_BYTES = 4 * 2**30  # address space of a child: 10^10^10 ends there and not the machine


class Reply(NamedTuple):
    """What a call returned, or else why there is nothing: it hung, died, or raised."""

    value: Any
    problem: str
    hung: bool = False


class Killable:
    """A function `module:name` of JSON values, callable from several threads: one call a worker at a time.

    Args:
        imports: modules that the function imports when it is called; a worker has them before it forks.
        workers: 0: one for each core.
    """

    def __init__(self, function: str, *, deadline_s: float, imports: Sequence[str] = (), workers: int = 0):
        self._command = [sys.executable, "-m", __name__, function, str(deadline_s), *imports]
        count = workers or max(1, len(os.sched_getaffinity(0)))
        self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        self._all: list[subprocess.Popen] = []
        self._lock = threading.Lock()
        self.workers = count
        for _ in range(count):
            self._idle.put(None)  # started when first needed

    def __enter__(self) -> "Killable":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            with contextlib.suppress(OSError):
                worker.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
            worker.wait()
            worker.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]

    def __call__(self, *arguments: Any) -> Reply:
        """Return what the function makes of the arguments; never an exception of its own."""
        worker = self._idle.get()
        try:
            worker = worker or self._started()
            said = self._ask(worker, arguments)
            if said is None:  # the worker itself is gone, perhaps for want of memory: once more, in a new one
                worker = self._started()
                said = self._ask(worker, arguments)
            return Reply(**said) if said is not None else Reply(None, "the worker process ends before it answers")
        finally:
            self._idle.put(worker)

    def _started(self) -> subprocess.Popen:
        worker = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with self._lock:
            self._all.append(worker)
        return worker

    def _ask(self, worker: subprocess.Popen, arguments: tuple) -> dict[str, Any] | None:
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(arguments).encode() + b"\n")
            worker.stdin.flush()
        except BrokenPipeError:
            return None
        line = worker.stdout.readline()
        return json.loads(line) if line else None


# -- in the worker ----------------------------------------------------------------------------------------------------


class _Child(NamedTuple):
    process: int
    calls: int
    replies: int


def _main() -> None:
    """Answer a line of arguments with a line of reply, until there are no more."""
    module, _, name = sys.argv[1].partition(":")
    deadline_s = float(sys.argv[2])
    replies = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no reply
    function = getattr(import_module(module), name)
    for wanted in sys.argv[3:]:
        with contextlib.suppress(ModuleNotFoundError):  # the function says what is missing, and how to get it
            import_module(wanted)
    child = None
    for line in sys.stdin.buffer:
        child = child or _fork(function)
        _write_all(child.calls, line)
        reply, alive = _reply(child, deadline_s)
        if not alive:
            _kill(child)
            child = None
        _write_all(replies, reply)
    if child is not None:
        _kill(child)


def _fork(function: Callable[..., Any]) -> _Child:
    call_read, call_write = os.pipe()
    reply_read, reply_write = os.pipe()
    process = os.fork()
    if process:
        os.close(call_read)
        os.close(reply_write)
        return _Child(process, call_write, reply_read)
    os.close(call_write)
    os.close(reply_read)
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with os.fdopen(call_read, "rb") as calls:
        for line in calls:
            try:
                reply = {"value": function(*json.loads(line)), "problem": ""}
            except Exception as error:
                reply = {"value": None, "problem": f"{type(error).__name__}: {error}"[:300]}
            _write_all(reply_write, json.dumps(reply).encode() + b"\n")
    os._exit(0)


def _reply(child: _Child, deadline_s: float) -> tuple[bytes, bool]:
    """Return the child's reply, and whether it lives."""
    said = b""
    while not said.endswith(b"\n"):
        if not select.select([child.replies], [], [], deadline_s)[0]:
            said = {"value": None, "problem": f"no answer within {deadline_s:g} s", "hung": True}
            return json.dumps(said).encode() + b"\n", False
        block = os.read(child.replies, 65536)
        if not block:
            return json.dumps({"value": None, "problem": "the computation ended its process"}).encode() + b"\n", False
        said += block
    return said, True


def _kill(child: _Child) -> None:
    os.kill(child.process, signal.SIGKILL)
    os.waitpid(child.process, 0)
    os.close(child.calls)
    os.close(child.replies)


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


if __name__ == "__main__":
    _main()
