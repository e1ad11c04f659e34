"""digests.json: size and crc32c of every other file in a directory, and whether the files still agree with it.

In a bucket both come from the store, which has them of every object: nothing is read back for them.
"""

import concurrent.futures
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import google_crc32c
import jax
import numpy as np
from jax.experimental import multihost_utils

from wmss_jax import storage
from wmss_jax.storage import Directory, Name

DIGESTS = "digests.json"
Level = Literal["full", "sizes"]


class CheckpointDamaged(ValueError):
    """A checkpoint is not what was written; the message names the files and what is wrong with them."""


def write(directory: Directory) -> None:
    """Write digests.json for the files in `directory`, which must be complete."""
    made = _digests(directory, sorted(_sizes(directory)))
    (directory / DIGESTS).write_bytes(json.dumps(made, indent=1).encode())


def read(directory: Directory) -> dict[str, list]:
    """Return {file: its `digest` when it was written}.

    Raises:
        FileNotFoundError: no such directory.
        CheckpointDamaged: it has no digests.json, or not one that can be read.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such checkpoint")
    try:
        recorded = json.loads((directory / DIGESTS).read_bytes())
        return {name: [int(size), str(crc)] for name, (size, crc) in recorded.items()}
    except FileNotFoundError:
        raise CheckpointDamaged(f"{directory}: {DIGESTS}: missing; not a checkpoint, or not a whole one") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointDamaged(f"{directory}: {DIGESTS}: {error}") from error


def verify(directory: Name, level: Level = "full") -> None:
    """Return if a checkpoint has the files that were written, in the same sizes and, at "full", the same checksums.

    In a run of several processes each reads its share of the files, and all of them raise if one does.

    Raises:
        FileNotFoundError: no such directory.
        CheckpointDamaged: it has not; every file that differs is named.
    """
    directory = storage.path(directory)
    try:
        damage = "; ".join(_differences(directory, read(directory), level))
    except CheckpointDamaged as error:
        damage = str(error).removeprefix(f"{directory}: ")
    anywhere = multihost_utils.process_allgather(np.asarray(bool(damage)))
    if np.any(anywhere):
        raise CheckpointDamaged(f"{directory}: {damage or 'damaged, as another process found: see its message'}")


def digest(file: Path) -> list:
    """Return [size in bytes, crc32c in hexadecimal]."""
    size, crc = 0, 0
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 24):
            size, crc = size + len(chunk), google_crc32c.extend(crc, chunk)
    return [size, f"{crc:08x}"]


def of(content: bytes) -> list:
    """Return `digest` of a file with this content."""
    return [len(content), f"{google_crc32c.value(content):08x}"]


def _sizes(directory: Directory) -> dict[str, int]:
    if isinstance(directory, Path):
        files = (path for path in directory.rglob("*") if not path.is_dir())
        found = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    else:
        found = {name: size for name, (size, _) in directory.objects().items()}
    return {name: size for name, size in found.items() if name != DIGESTS}


def _digests(directory: Directory, names: Sequence[str]) -> dict[str, list]:
    if not isinstance(directory, Path):
        found = directory.objects()
        return {name: list(found[name]) for name in names}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # network file systems are fast only in parallel
        return dict(zip(names, pool.map(lambda name: digest(directory / name), names), strict=True))


def _differences(directory: Directory, recorded: Mapping[str, list], level: Level) -> list[str]:
    present = dict(sorted(_sizes(directory).items()))
    found = [f"{name}: missing" for name in recorded if name not in present]
    for name, size in present.items():
        if name not in recorded:
            found.append(f"{name}: not part of the checkpoint")
        elif size != recorded[name][0]:
            found.append(f"{name}: {size} bytes instead of {recorded[name][0]}")
    if level == "full" and not found:
        mine = sorted(recorded)[jax.process_index() :: jax.process_count()]
        for name, (_, crc) in _digests(directory, mine).items():
            if crc != recorded[name][1]:
                found.append(f"{name}: crc32c {crc} instead of {recorded[name][1]}")
    return found
