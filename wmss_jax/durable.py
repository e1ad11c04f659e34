"""Making sure that what was written is on the disk before anything says so."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Return when a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Return when a directory and all beneath it are on the disk."""
    for path in (*directory.rglob("*"), directory):
        sync(path)
