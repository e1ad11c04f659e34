"""How a directory of files becomes a checkpoint at one instant, and how one ceases to be.

On a POSIX file system by a rename: a checkpoint is written as `<step>.partial-new`, synced to disk, and gets its name
as the very last action. In a bucket, which has no atomic rename, it is written under its name, and digests.json, an
object like any other there as a whole or not at all, is written last and removed first: a step without it does not
count. What a crash leaves nothing reads, and the next writer removes.
"""

import contextlib
import shutil
from pathlib import Path

from etils import epath

from wmss_jax import digests, durable, storage
from wmss_jax.storage import Directory


def steps(root: Directory) -> list[int]:
    """Return the steps of the complete checkpoints under `root`, ascending; [] if there is no such directory."""
    return sorted(int(entry.name) for entry in _numbered(root) if exists(entry))


def exists(final: Directory) -> bool:
    """Return whether there is something under the name of a checkpoint; in a bucket, a complete one."""
    return final.exists() if isinstance(final, Path) else (final / digests.DIGESTS).exists()


def prepare(root: Directory) -> None:
    """Make the directory that checkpoints come to lie in, and remove what a crashed writer left in it.

    Raises:
        OSError: nothing can be written there.
    """
    if isinstance(root, Path):
        root.mkdir(parents=True, exist_ok=True)
        leftovers = list(root.glob("*.partial-*"))
    else:
        probe = root / ".writable"
        try:
            storage.write(probe, b"")  # said now, not after the first steps
            storage.remove(probe)
        except OSError as error:
            raise PermissionError(f"{root}: cannot write there: {error}") from error
        leftovers = [entry for entry in _numbered(root) if not exists(entry)]
    for leftover in leftovers:
        storage.remove(leftover)


def begin(final: Directory) -> Directory:
    """Return where the files of a checkpoint are to be written, the same on all processes."""
    return final.with_name(f"{final.name}.partial-new") if isinstance(final, Path) else final


def commit(partial: Directory, final: Directory) -> None:
    """Make a checkpoint of what was written to `begin(final)`; on a POSIX file system it replaces one of its name."""
    digests.write(partial)
    if isinstance(final, epath.Path):
        return
    assert isinstance(partial, Path)
    durable.sync_tree(partial)
    replaced = final.with_name(f"{final.name}.partial-old")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    durable.sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove(final: Directory) -> None:
    """Remove a checkpoint; a crash amid the removal must not leave half of one that counts."""
    if isinstance(final, Path):
        storage.remove(final.rename(final.with_name(f"{final.name}.partial-old")))
    else:
        with contextlib.suppress(FileNotFoundError):
            storage.remove(final / digests.DIGESTS)
        storage.remove(final)


def discard(partial: Directory) -> None:
    """Remove what there is of `begin`'s directory; on a POSIX file system, as far as that is possible.

    Raises:
        OSError: something in a bucket stays, and would be taken for a part of what is written there next.
    """
    if isinstance(partial, Path):
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            remove(partial)


def room(root: Directory) -> str:
    """Return what a message about a failed write says of the space there was."""
    return f", {shutil.disk_usage(root).free / 1e9:.3g} GB free" if isinstance(root, Path) else ""


def _numbered(root: Directory) -> list[Directory]:
    if not root.is_dir():
        return []
    named = [entry for entry in root.iterdir() if entry.name.isdecimal() and str(int(entry.name)) == entry.name]
    return [entry for entry in named if entry.is_dir()]
