"""How files become a checkpoint at one instant, and how a checkpoint ceases to be one.

On a POSIX file system by a rename: a checkpoint is written as `<step>.partial-new`, synced to disk, and gets its name
as the very last action. A bucket has no rename that is one action: there a checkpoint is written under its own name,
and is one exactly while it has its digests.json, an object that is there as a whole or not at all. That is written
last, when all else is, and removed first. What a crash leaves nothing reads, and the next writer removes.
"""

import contextlib
import shutil
from pathlib import Path

import jax

from wmss_jax import digests, durable
from wmss_jax.storage import Directory, GcsPath


def steps(root: Directory) -> list[int]:
    """Return the steps of the complete checkpoints under `root`, ascending; [] if there is no such directory."""
    return sorted(int(entry.name) for entry in _numbered(root) if isinstance(entry, Path) or exists(entry))


def exists(final: Directory) -> bool:
    """Return whether the name of a checkpoint is taken; in a bucket, by a complete one."""
    return final.exists() if isinstance(final, Path) else (final / digests.DIGESTS).is_file()


def clean(root: Directory) -> None:
    """Make the directory that checkpoints come to lie in, and remove what crashed writers left in it."""
    if isinstance(root, Path):
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob("*.partial-*"):
            shutil.rmtree(leftover)
    else:
        for entry in _numbered(root):
            if not exists(entry):
                remove(entry)


def begin(final: Directory) -> Directory:
    """Return where the files of a checkpoint are to be written, the same on all processes."""
    return final.with_name(f"{final.name}.partial-new") if isinstance(final, Path) else final


def commit(partial: Directory, final: Directory) -> None:
    """Make a checkpoint of what was written to `begin(final)`. On a POSIX file system it replaces one of its name."""
    digests.write(partial)
    if isinstance(partial, Path) and isinstance(final, Path):
        durable.sync_tree(partial)
        replaced = final.with_name(f"{final.name}.partial-old")
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        durable.sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def remove(final: Directory) -> None:
    """Remove a checkpoint: a crash on the way must not leave half of one that counts."""
    if isinstance(final, Path):
        shutil.rmtree(final.rename(final.with_name(f"{final.name}.partial-old")))
    else:
        (final / digests.DIGESTS).unlink()  # by an error here all the rest stays, too
        final.rmtree()


def clear(partial: Directory) -> None:
    """Remove what there is in `begin`'s directory before anything is written there."""
    if isinstance(partial, Path):
        shutil.rmtree(partial, ignore_errors=True)
    else:
        remove(partial)


def discard(partial: Directory) -> None:
    """Remove what was written to `begin`'s directory, as far as that is possible; the next writer tries again."""
    if isinstance(partial, Path):
        shutil.rmtree(partial, ignore_errors=True)
    elif jax.process_index() == 0:  # which alone knows that it will not write the digests yet
        with contextlib.suppress(OSError):
            remove(partial)


def room(root: Directory) -> str:
    """Return what the message about a failed write says of the space there was."""
    return f", {shutil.disk_usage(root).free / 1e9:.3g} GB free" if isinstance(root, Path) else ""


def _numbered(root: Directory) -> list[Path] | list[GcsPath]:
    is_number = lambda name: name.isdecimal() and str(int(name)) == name
    if isinstance(root, Path):
        return [entry for entry in root.iterdir() if entry.is_dir() and is_number(entry.name)] if root.is_dir() else []
    return [entry for entry in root.iterdir() if is_number(entry.name)]
