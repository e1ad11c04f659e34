"""Virtual environments of other people's programs, made on first use and kept in $WMSS_BENCH_ENVS."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.timing import say

ROOT = Path(os.environ.get("WMSS_BENCH_ENVS") or Path(__file__).parent / ".envs")


def python_of(name: str, requirements: Sequence[str]) -> Path:
    """Return the interpreter of the environment `name`, which holds exactly these requirements.

    Raises:
        RuntimeError: it cannot be made, with the installer's last word.
    """
    directory = (ROOT / name).absolute()  # not resolved: a link to the interpreter is what makes it an environment
    python, stamp = directory / "bin" / "python", directory / "requirements.txt"
    wanted = "\n".join(requirements) + "\n"
    if not (stamp.exists() and stamp.read_text() == wanted):
        say(f"making the environment {name}: {' '.join(requirements)}")
        shutil.rmtree(directory, ignore_errors=True)
        for command in _commands(directory, python, requirements):
            _run(command)
        stamp.write_text(wanted)  # last, so that one half made is made again
    return python


def _commands(directory: Path, python: Path, requirements: Sequence[str]) -> list[list[str]]:
    """Return how to make an environment: by uv where there is one, else by venv and pip."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if uv:
        return [
            [uv, "venv", "--quiet", "--python", sys.executable, str(directory)],
            [uv, "pip", "install", "--quiet", "--python", str(python), *requirements],
        ]
    return [
        [sys.executable, "-m", "venv", str(directory)],
        [str(python), "-m", "pip", "install", "--quiet", *requirements],
    ]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise RuntimeError(said[-1] if said else f"{Path(command[0]).name} exited with {done.returncode}")
