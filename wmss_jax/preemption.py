"""Being asked to stop: SIGTERM, as schedulers send it before they take a machine away. Save, exit 75, go on later.

One process hears the signal in Python. Of several, JAX listens: a signal reaches them at different moments, or only
one of them, and they have to stop after the same step, or they would wait for each other forever. Its coordination
service tells all, and picks a step that none has begun.
"""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# Every process asks in the same places, so that the n-th question is the same one everywhere.
_questions = itertools.count()


class Preempted(SystemExit):
    """The run was asked to stop (SIGTERM) and has saved; the same command goes on from there. Exits with code 75.

    A SystemExit, as KeyboardInterrupt is none of the errors that a caller's `except Exception` is meant for.
    """

    def __init__(self, message: str = "stopped; the same command goes on from the last finished stage or checkpoint"):
        super().__init__(75)
        self.message = message


@contextlib.contextmanager
def exit_when_asked() -> Iterator[None]:
    """Raise Preempted where SIGTERM comes outside of a training loop, which saves first.

    Nothing is lost but what the stage at hand has not written yet. Of several processes, those that ask do.
    """

    def stop(*_: object) -> None:
        raise Preempted

    with _on_sigterm(stop):
        yield


def exit_if_asked() -> None:
    """Raise Preempted, of several processes on all at the same call, if they were asked to stop."""
    if jax.process_count() > 1 and _reached():
        raise Preempted


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Give the question whether to save and stop now, to be asked between two steps; SIGTERM does nothing else inside.

    Of several processes all have to ask, and all get the same answer; the first yes comes up to a few seconds after
    the signal, and holds.
    """
    asked = threading.Event()

    def now() -> bool:
        if jax.process_count() > 1 and not asked.is_set() and _reached():
            asked.set()
        return asked.is_set()

    with _on_sigterm(lambda *_: asked.set()):
        yield now


def _reached() -> bool:
    return multihost_utils.reached_preemption_sync_point(next(_questions))


@contextlib.contextmanager
def _on_sigterm(handle: Callable[..., None]) -> Iterator[None]:
    # Of several processes JAX has the handler, since `processes.start`. In a thread signals cannot be handled at all:
    # whoever runs a stage there stops it otherwise.
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
