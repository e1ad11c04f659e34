"""Where checkpoints lie: directories of a POSIX file system, or what has a common prefix in a bucket.

Both kinds of path are joined, opened and listed alike, `pathlib.Path` and etils' `epath.Path`; what they do not share
is here. The bytes of arrays go past this, from TensorStore to the bucket.
"""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

type Directory = Path | epath.Path
_BUCKET = "gs://"


def path(name: str | os.PathLike) -> Directory:
    """Return the path that `name` says: in a bucket if it begins with gs://, else of this machine.

    Raises:
        ValueError: gs:// without a bucket, or what buckets need is not installed.
    """
    text = os.fspath(name)
    if not text.startswith(_BUCKET):
        return Path(text)
    if not text.removeprefix(_BUCKET).partition("/")[0]:
        raise ValueError(f"{text}: names no bucket; give gs://BUCKET/NAME")
    _gcs()
    return epath.Path(text)


def absolute(name: str | os.PathLike) -> Directory:
    """Return `path(name)`, which stays what it is from whatever directory it is seen."""
    found = path(name)
    return found.absolute() if isinstance(found, Path) else found  # epath's would put it below the current directory


def files(directory: Directory) -> dict[str, int]:
    """Return {path below `directory`: size in bytes} of all files there, at any depth."""
    if isinstance(directory, Path):
        found = (file for file in directory.rglob("*") if not file.is_dir())
        return {file.relative_to(directory).as_posix(): file.stat().st_size for file in found}
    prefix = f"{directory}/".removeprefix(_BUCKET)
    found = _gcs().find(str(directory), detail=True)
    # Names that end with a slash are what other tools make for a directory to be seen.
    return {name.removeprefix(prefix): info["size"] for name, info in found.items() if not name.endswith("/")}


def write(file: Directory, content: bytes) -> None:
    """Write a file, and the directories to it.

    Raises:
        OSError: it could not be written.
    """
    if isinstance(file, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    else:
        with _oserror(file):
            _gcs().pipe_file(str(file), content)  # one request: an object that is there as a whole


def remove(directory: Directory) -> None:
    """Remove a directory and all in it.

    Raises:
        FileNotFoundError: there is none.
        OSError: it could not be removed.
    """
    if isinstance(directory, Path):
        shutil.rmtree(directory)
    else:
        with _oserror(directory):
            _gcs().rm(str(directory), recursive=True)


@contextlib.contextmanager
def local(directory: Directory) -> Iterator[Path]:
    """Give a directory of this machine with the files of `directory`: itself, or a copy that is gone afterwards."""
    if isinstance(directory, Path):
        yield directory
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in files(directory):
            write(Path(copy) / name, (directory / name).read_bytes())
        yield Path(copy)


def kept(directory: Directory) -> Path:
    """Return what `local` gives, there until the process ends."""
    until_exit = contextlib.ExitStack()
    atexit.register(until_exit.close)
    return until_exit.enter_context(local(directory))


@contextlib.contextmanager
def _oserror(where: Directory) -> Iterator[None]:
    """Make OSErrors of all errors inside: gcsfs has its own for what the server says, and some are of aiohttp."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{where}: {error or type(error).__name__}") from error


@functools.cache
def _gcs() -> Any:
    """Return gcsfs' file system, made so that what others write is seen: Orbax' arrays do not go through it."""
    try:
        import fsspec.config
        import gcsfs
    except ImportError as error:
        raise ValueError(f"{_BUCKET} needs gcsfs: pip install 'wmss-jax[gcs]'") from error
    del gcsfs
    # For Orbax, too, which comes to it by epath: a listing that is kept would be stale.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")
