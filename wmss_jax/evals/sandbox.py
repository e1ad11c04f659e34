"""Generated programs run here and nowhere else: in bubblewrap, cut off from everything, within limits.

    sandbox = Sandbox.open()                                          # ValueError where bubblewrap cannot work
    sandbox.passes("def f(x): return x + 1", "assert f(1) == 2")      # Outcome(passed=True, reason="")
    sandbox.output("print(input())", "hello")                         # Output(text="hello\\n", reason="")

A program sees Python and the system's libraries, read-only, and an empty /tmp of its own. It has no network, no home,
no other process, no capability, and cannot make namespaces (which would give it new ones). It runs under limits on CPU
and wall-clock time, memory, processes, files and output, and dies with this process. Each process may take `memory_mb`:
a program takes at most processes × memory_mb + 2 × scratch_mb.
"""

import contextlib
import dataclasses
import json
import os
import platform
import random
import selectors
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_INSIDE = Path(__file__).with_name("inside.py")
_SETTINGS = {
    "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "TMPDIR": "/tmp", "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may take."""

    wall_s: float = 20.0
    cpu_s: int = 10  # of each process
    memory_mb: int = 1024  # of each process; address space
    processes: int = 8  # threads count
    file_mb: int = 16  # of each file
    scratch_mb: int = 64  # of /tmp, and of /dev/shm
    output_kb: int = 1024


class Outcome(NamedTuple):
    """Whether a program passed its tests, and else why not."""

    passed: bool
    reason: str


class Output(NamedTuple):
    """What a program wrote to its standard output; `reason` says why it was ended, or failed, and is else empty."""

    text: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """How programs are run. `unsafe` runs them as ordinary processes of this user, within the limits alone."""

    limits: Limits = Limits()
    unsafe: bool = False

    @classmethod
    def open(cls, limits: Limits = Limits(), *, unsafe: bool = False) -> "Sandbox":
        """Return a sandbox that was tried.

        Raises:
            ValueError: bubblewrap is missing or cannot work here, and `unsafe` does not allow to do without.
        """
        made = cls(limits, unsafe)
        if not unsafe and (reason := made._broken()):
            raise ValueError(
                f"generated programs are run in a sandbox only, and {reason}; install bubblewrap (apt-get install "
                f"bubblewrap), or run them as yourself, with all that you may do, by --unsafe-no-sandbox"
            )
        return made

    def passes(self, program: str, tests: str, own: Sequence[str] = ()) -> Outcome:
        """Return whether a program passes tests.

        Args:
            tests: Python text that calls functions of the program; they pass if they end without an exception.
            own: names that the tests mean of the program, although Python has a builtin of that name.
        """
        with contextlib.ExitStack() as stack:
            ask_read, ask_write = stack.enter_context(_pipe())
            tell_read, tell_write = stack.enter_context(_pipe())
            verdict_read, verdict_write = stack.enter_context(_pipe())
            served = self._start(stack, "serve", {"program": program}, (ask_read.take(), tell_write.take(), None))
            judged = self._start(
                stack, "judge", {"tests": tests, "own": list(own)},
                (tell_read.take(), ask_write.take(), verdict_write.take()),
            )  # fmt: skip
            done = self._watch(judged, {verdict_read.number: "verdict", **_outputs(served), **_outputs(judged)})
        if done.reason:
            return Outcome(False, done.reason)
        if not done.read["verdict"]:
            return Outcome(False, f"the tests ended without a verdict: {_last_line(done.read['stderr'])}")
        verdict = json.loads(done.read["verdict"])
        return Outcome(verdict["passed"], verdict["reason"])

    def output(self, program: str, stdin: str = "") -> Output:
        """Return what a program writes, given `stdin`."""
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(_file(stdin))
            process = self._start(stack, "script", {"program": program}, (None, None, None), source)
            done = self._watch(process, _outputs(process))
        reason = done.reason
        if not reason and process.returncode:
            reason = f"exit code {process.returncode}: {_last_line(done.read['stderr'])}"
        return Output(done.read["stdout"].decode(errors="replace"), reason)

    def _broken(self) -> str:
        """Return why the sandbox cannot work; an empty text if it does."""
        if shutil.which("bwrap") is None:
            return "bubblewrap (bwrap) is not installed"
        if platform.machine() not in _SYSCALLS:
            return f"it knows no system calls of {platform.machine()} (known: {', '.join(_SYSCALLS)})"
        tried = self.output("print(6 * 7)")
        return "" if tried.text == "42\n" else f"bubblewrap does not work here ({tried.reason or tried.text!r})"

    def _start(
        self,
        stack: contextlib.ExitStack,
        role: str,
        task: Mapping[str, Any],
        ends: tuple[int | None, int | None, int | None],
        stdin: Any = subprocess.DEVNULL,
    ) -> subprocess.Popen:
        """Start one process of a role; it is dead when the stack closes. `ends` are closed here, they are its own."""
        as_root = os.geteuid() == 0 and not self.unsafe
        payload = {
            **task, "role": role, "limits": dataclasses.asdict(self.limits),
            # The kernel does not count root's processes, so root's programs get a user of their own each.
            "uid": random.SystemRandom().randrange(2**30, 2**31 - 1) if as_root else None,
            # Outside of a namespace of its own, the limit would count everything else that this user runs.
            "count_processes": not self.unsafe,
        }  # fmt: skip
        given = stack.enter_context(_file(json.dumps(payload)))
        numbers = [given.fileno(), *(-1 if end is None else end for end in ends)]
        kept = [number for number in numbers if number >= 0]
        python = [sys.executable, "-I", "-B", "-X", "utf8", "-c", _INSIDE.read_text(), *map(str, numbers)]
        try:
            if self.unsafe:
                settings, cwd = _SETTINGS, stack.enter_context(tempfile.TemporaryDirectory())
            else:
                cwd, settings = "/", _SETTINGS
                with _file(_filter(platform.machine())) as rules:
                    command = [*_jail(self.limits, as_root), "--seccomp", str(rules.fileno()), "--", *python]
                    return self._popen(stack, command, [*kept, rules.fileno()], stdin, cwd, settings)
            return self._popen(stack, python, kept, stdin, cwd, settings)
        finally:
            for end in ends:
                if end is not None:
                    os.close(end)

    def _popen(
        self, stack: contextlib.ExitStack, command: list[str], kept: list[int], stdin: Any, cwd: str, env: dict
    ) -> subprocess.Popen:
        process = subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=kept, cwd=cwd, env=env,
            start_new_session=True,
        )  # fmt: skip
        stack.callback(_end, process)
        return process

    def _watch(self, process: subprocess.Popen, streams: Mapping[int, str]) -> "_Done":
        """Read the streams until a process ends, or a limit of time or output is reached."""
        read = {name: bytearray() for name in streams.values()}
        deadline, most = time.monotonic() + self.limits.wall_s, self.limits.output_kb * 1024
        with selectors.DefaultSelector() as selector:
            for number in streams:
                selector.register(number, selectors.EVENT_READ)
            while True:
                # What it wrote before it ended is in the pipes by the time that it is seen to have ended.
                ended = process.poll() is not None
                events = selector.select(0 if ended else min(0.05, max(0.0, deadline - time.monotonic())))
                for key, _ in events:
                    block = os.read(key.fd, 65536)
                    if not block:
                        selector.unregister(key.fd)
                    read[streams[key.fd]] += block
                if sum(map(len, read.values())) > most:
                    return _Done(read, f"more than {self.limits.output_kb} KB of output")
                if ended and not any(key.fd in selector.get_map() for key, _ in events):
                    return _Done(read, "")
                if time.monotonic() > deadline:
                    return _Done(read, f"more than {self.limits.wall_s:g} s")


class _Done(NamedTuple):
    read: dict[str, bytearray]
    reason: str


def _outputs(process: subprocess.Popen) -> dict[int, str]:
    assert process.stdout is not None and process.stderr is not None
    return {process.stdout.fileno(): "stdout", process.stderr.fileno(): "stderr"}


def _last_line(text: bytearray) -> str:
    return (text.decode(errors="replace").strip().splitlines() or ["no error message"])[-1][:300]


# -- processes and descriptors ----------------------------------------------------------------------------------------


class _End:
    """One end of a pipe, closed by whoever has it."""

    def __init__(self, number: int):
        self.number = number

    def take(self) -> int:
        """Return the descriptor, which the caller closes from now on."""
        number, self.number = self.number, -1
        return number


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[_End, _End]]:
    ends = [_End(number) for number in os.pipe()]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            if end.number >= 0:
                os.close(end.number)


@contextlib.contextmanager
def _file(content: str | bytes) -> Iterator[Any]:
    """A file without a name, to be read from its start."""
    with tempfile.TemporaryFile() as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.seek(0)
        yield file


def _end(process: subprocess.Popen) -> None:
    """Kill a process and, with bubblewrap, all that it started: they end with the first of their namespace."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


# -- bubblewrap -------------------------------------------------------------------------------------------------------


def _jail(limits: Limits, as_root: bool) -> list[str]:
    """Return bubblewrap's command line up to the program."""
    command = [
        str(shutil.which("bwrap")), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
        "--unshare-cgroup-try", "--die-with-parent", "--cap-drop", "ALL", "--hostname", "sandbox",
    ]  # fmt: skip
    if as_root:  # to become another user, which `inside.enter` does before anything else
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    size = str(limits.scratch_mb * 2**20)
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    for scratch in ("/dev/shm", "/tmp"):
        command += ["--perms", "1777", "--size", size, "--tmpfs", scratch]
    made = {Path("/tmp")}  # before what lies in it, such as a virtual environment
    for path in _needed():
        for parent in reversed(path.parents[:-1]):
            if parent not in made:
                command += ["--perms", "0755", "--dir", str(parent)]
                made.add(parent)
        if path.is_symlink() and path.parent == Path("/"):  # /bin -> usr/bin
            command += ["--symlink", os.readlink(path), str(path)]
        else:
            command += ["--ro-bind", str(path), str(path)]
            made.add(path)
    return [*command, "--remount-ro", "/", "--chdir", "/tmp"]


def _needed() -> list[Path]:
    """Return what Python needs: itself, its packages, and the system's libraries."""
    system = [
        Path(f"/{name}") for name in ("usr", "bin", "lib", "lib32", "lib64", "etc/ld.so.cache", "etc/alternatives")
    ]
    own = {
        Path(sys.base_prefix),
        Path(sys.base_exec_prefix),
        Path(sys.prefix),
        Path(sys.executable).resolve().parents[1],
    }
    paths = [path for path in system if path.exists()]
    for path in sorted(own):
        if not any(path.is_relative_to(there) for there in paths):
            paths.append(path)
    return paths


# -- system calls that no program needs -------------------------------------------------------------------------------

_X86_64, _AARCH64 = 0, 1
_NUMBERS = {  # x86-64, arm64
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268), "open_by_handle_at": (304, 265),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "kexec_load": (246, 104),
    # memory that no limit counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
_SYSCALLS = {"x86_64": _X86_64, "aarch64": _AARCH64}
_ARCHITECTURE = (0xC000003E, 0xC00000B7)  # AUDIT_ARCH_*
_CLONE, _CLONE3, _FIRST_X32 = (56, 220), 435, 0x40000000
_NEW_NAMESPACE = 0x7E020000  # CLONE_NEW*: user, mount, pid, net, ipc, uts, cgroup
_ALLOW, _KILL, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # errno EPERM, ENOSYS


def _filter(machine: str) -> bytes:
    """Return a seccomp program (classic BPF): refuse the calls above, and clone() that makes namespaces.

    clone3() has its flags in memory, where no filter can look: as if it did not exist, then libraries take clone().
    """
    which = _SYSCALLS[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    op = lambda code, if_so, if_not, k: struct.pack("=HBBI", code, if_so, if_not, k)
    rules = [op(load, 0, 0, 4), op(equal, 1, 0, _ARCHITECTURE[which]), op(give, 0, 0, _KILL), op(load, 0, 0, 0)]
    if which == _X86_64:
        rules += [op(at_least, 0, 1, _FIRST_X32), op(give, 0, 0, _REFUSE)]
    for numbers in _NUMBERS.values():
        rules += [op(equal, 0, 1, numbers[which]), op(give, 0, 0, _REFUSE)]
    rules += [op(equal, 0, 1, _CLONE3), op(give, 0, 0, _UNKNOWN)]
    rules += [op(equal, 0, 3, _CLONE[which]), op(load, 0, 0, 16), op(any_bit, 0, 1, _NEW_NAMESPACE)]
    rules += [op(give, 0, 0, _REFUSE), op(give, 0, 0, _ALLOW)]
    return b"".join(rules)
