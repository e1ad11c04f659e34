"""Says where a process stands that no longer gets on: waiting for data, for a collective, or for its start."""

import faulthandler
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO


class Watchdog:
    """What a process is at, and since when. Written by the thread that works, read by the one that watches."""

    def __init__(self, what: str):
        self.what, self.since = what, time.monotonic()

    def at(self, what: str) -> None:
        """Say what is being done now; everything before it is done."""
        self.what, self.since = what, time.monotonic()


@contextmanager
def watching(stall_s: float | None, what: str, out: IO[str] | None = None) -> Iterator[Watchdog]:
    """Give a Watchdog; what it is `at` for longer than `stall_s` seconds is reported, with the stacks of all threads.

    Once for each thing that takes so long, and again each time it has taken twice as long. Nothing is stopped: a
    collective that waits for a host which comes back goes on.

    Args:
        stall_s: None: never.
        out: a file with a descriptor; default stderr.
    """
    watchdog, over = Watchdog(what), threading.Event()
    if stall_s is None:
        yield watchdog
        return
    arguments = (watchdog, over, stall_s, out or sys.stderr)
    thread = threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        over.set()
        thread.join()


def _watch(watchdog: Watchdog, over: threading.Event, stall_s: float, out: IO[str]) -> None:
    since, limit = watchdog.since, stall_s
    while not over.wait(min(stall_s / 4, 1.0)):
        if watchdog.since != since:
            since, limit = watchdog.since, stall_s
        took = time.monotonic() - since
        if took > limit:
            print(
                f"{socket.gethostname()}: {watchdog.what} for {took:.0f} s now; where it waits:", file=out, flush=True
            )
            faulthandler.dump_traceback(file=out, all_threads=True)
            limit = 2 * took
