"""Where checkpoints lie: in a directory of a file system, or under a prefix in a bucket of Google Cloud Storage.

`GcsPath` has those of `pathlib.Path`'s methods that checkpoints need, with two promises that file system layers over
buckets do not give: an error of the store is raised, never taken for "not there", and nothing is cached.
The bytes of arrays go past this, from TensorStore to the bucket.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SCHEME = "gs://"
# Of the rest Orbax, TensorStore and gcsfs do not all make the same object: "?" and "#" end a path for one of them.
_NAME = re.compile(r"[\w.~=+@-]+(/[\w.~=+@-]+)*", re.ASCII)


@dataclasses.dataclass(frozen=True, order=True)
class GcsPath:
    """An object in a bucket, or all those whose names begin with `key` and a slash, its "directory".

    No `os.PathLike`: `Path(...)` of it would silently be a directory named "gs:" here.

    Raises, in every method that asks the store:
        PermissionError: it refuses.
        FileNotFoundError: no such bucket, or no such object where one is read.
        OSError: anything else, after retries.
        ValueError: gcsfs is not installed.
    """

    bucket: str
    key: str = ""

    @classmethod
    def parse(cls, text: str) -> "GcsPath":
        """Return the path that gs://BUCKET/NAME says.

        Raises:
            ValueError: it says none.
        """
        name = text.removeprefix(_SCHEME).rstrip("/")
        if not text.startswith(_SCHEME) or not _NAME.fullmatch(name) or {".", ".."} & set(name.split("/")):
            raise ValueError(f"{text}: expected gs://BUCKET/NAME, of letters, digits and . _ - ~ = + @")
        return cls(*name.split("/", 1))

    def __str__(self) -> str:
        return f"{_SCHEME}{self._name}"

    def __truediv__(self, name: str) -> "GcsPath":
        return dataclasses.replace(self, key=f"{self.key}/{name}".lstrip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "GcsPath":
        return dataclasses.replace(self, key=self.key.rpartition("/")[0])

    def is_file(self) -> bool:
        with errors_of(self) as store:
            try:
                store.call("GET", "b/{}/o/{}", self.bucket, self.key, fields="name")
            except FileNotFoundError:
                return False
        return True

    def is_dir(self) -> bool:
        """Return whether any object lies below."""
        return any(page.get("items") for page in self._pages(maxResults=1))

    def iterdir(self) -> Iterator["GcsPath"]:
        for page in self._pages(delimiter="/"):
            for name in (*page.get("prefixes", ()), *(item["name"] for item in page.get("items", ()))):
                if name != self._prefix:  # an object that some tools make for a directory to be seen
                    yield dataclasses.replace(self, key=name.rstrip("/"))

    def objects(self) -> dict[str, tuple[int, str]]:
        """Return {name: (size in bytes, crc32c in hexadecimal)} of what lies below, as the store holds it.

        The store takes both from the bytes as it gets them; they change only with the object.
        """
        items = (item for page in self._pages() for item in page.get("items", ()))
        found = {item["name"].removeprefix(self._prefix): item for item in items if not item["name"].endswith("/")}
        return {name: (int(i["size"]), base64.b64decode(i["crc32c"]).hex()) for name, i in found.items()}

    def read_bytes(self) -> bytes:
        with errors_of(self) as store:
            return store.cat_file(self._name)

    def write_bytes(self, content: bytes) -> None:
        """Write the object: there as a whole afterwards, or not at all."""
        with errors_of(self) as store:
            store.pipe_file(self._name, content)

    def unlink(self) -> None:
        """Remove the object, if there is one."""
        # A removal that is asked for again, because its answer was lost, finds nothing.
        with errors_of(self) as store, contextlib.suppress(FileNotFoundError):
            store.call("DELETE", "b/{}/o/{}", self.bucket, self.key)

    def rmtree(self) -> None:
        """Remove all objects below, in no order."""
        names = [item["name"] for page in self._pages() for item in page.get("items", ())]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda name: dataclasses.replace(self, key=name).unlink(), names))

    @property
    def _name(self) -> str:
        return f"{self.bucket}/{self.key}".rstrip("/")

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    def _pages(self, **query: Any) -> Iterator[dict[str, Any]]:
        """Give the answers to a listing of what is below. gcsfs' own listings make "not there" of some errors."""
        token = {}
        while True:
            with errors_of(self) as store:
                page = store.call("GET", "b/{}/o", self.bucket, prefix=self._prefix, json_out=True, **query, **token)
            yield page
            if "nextPageToken" not in page:
                return
            token = {"pageToken": page["nextPageToken"]}


type Directory = Path | GcsPath
type Name = str | os.PathLike[str] | GcsPath


def path(name: Name) -> Directory:
    """Return where `name` is: in a bucket if it begins with gs://, else on this machine.

    Raises:
        ValueError: gs:// and no name that can be used.
    """
    if isinstance(name, GcsPath):
        return name
    text = os.fspath(name)
    return GcsPath.parse(text) if text.startswith(_SCHEME) else Path(text)


def absolute(name: Name) -> Directory:
    """Return `path(name)`, which stays what it is from whatever directory it is seen."""
    found = path(name)
    return found.absolute() if isinstance(found, Path) else found


def write(file: Directory, content: bytes) -> None:
    """Write a file, and the directories to it."""
    if isinstance(file, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def here(directory: Directory) -> Path:
    """Return a directory of this machine with the files of `directory`: itself, or a copy that goes with the process.

    For what is small: the copy takes the memory that its largest file needs.
    """
    return directory if isinstance(directory, Path) else _copied(directory)


@functools.cache
def _copied(directory: GcsPath) -> Path:
    copy = Path(_scratch().name) / directory.bucket / directory.key
    for name in directory.objects():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((directory / name).read_bytes())
    return copy


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="wmss-")


def check_usable(directory: GcsPath) -> None:
    """Return if objects can be listed, written, read and removed there; each says by its error why it cannot."""
    list(directory._pages(maxResults=1))
    probe = directory / f".wmss-{os.urandom(8).hex()}"
    probe.write_bytes(b"wmss")
    try:
        probe.read_bytes()
    finally:
        probe.unlink()


@contextlib.contextmanager
def errors_of(where: Directory) -> Iterator[Any]:
    """Make of everything that gcsfs and what lies below it raise OSErrors that name the path, in a line; see `GcsPath`.

    Those of a file system are such already. Gives gcsfs' file system.
    """
    if isinstance(where, Path):
        yield None
        return
    store = _gcs()
    try:
        yield store
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: no such bucket or object") from error
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        if str(error).startswith("Forbidden") or getattr(error, "code", None) in (401, "401"):
            hint = "give the account of this machine's credentials the role Storage Object User there"
            raise PermissionError(f"{where}: {said}; {hint}") from error
        raise OSError(f"{where}: {said}") from error


def _gcs() -> Any:
    """Return gcsfs' file system.

    Raises:
        ValueError: gcsfs is not installed.
    """
    try:
        return _file_system()
    except ImportError as error:
        raise ValueError(f"{_SCHEME} needs gcsfs: pip install 'wmss-jax[gcs]'") from error


@functools.cache
def _file_system() -> Any:
    import fsspec.config
    import gcsfs

    # It prints tracebacks of what it raises as well, where nobody has said where its log is to go.
    logging.getLogger("gcsfs").addHandler(logging.NullHandler())
    # For Orbax, too, which comes to it by other ways: a listing that is kept would be stale.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return gcsfs.GCSFileSystem(use_listings_cache=False)
