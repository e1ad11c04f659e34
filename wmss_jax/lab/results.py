"""What a study found, as tidy rows: one number a row, with all that it depends on; in memory and as Parquet."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Figures = dict[str, dict[str, float]]  # {split: {metric: value}}
_META = b"wmss_lab"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is left of a run: its figures, and the optimizer steps of its joint stage.

    Among the figures are those of "run", what it took: seconds, and cpu_seconds of all its threads.
    """

    figures: Figures
    steps: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of one run.

    Attributes:
        arm: M0 and M1 are the starting points that a seed's arms have in common.
        rate: peak learning rate; None of M0 and M1.
        steps: optimizer steps of the joint stage.
        split: a task of the recipe; held_out; training.
        config_digest: of the arm's recipe, without seed and rate.
        data_digest: of all the seed's data.
        versions: "jax 0.12.0, ..."
    """

    arm: str
    seed: int
    rate: float | None
    steps: int
    split: str
    metric: str
    value: float
    config_digest: str
    data_digest: str
    versions: str


SCHEMA = pa.schema(
    [
        ("arm", pa.string()),
        ("seed", pa.int64()),
        ("rate", pa.float64()),
        ("steps", pa.int64()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("config_digest", pa.string()),
        ("data_digest", pa.string()),
        ("versions", pa.string()),
    ]
)


def write(path: Path, rows: Iterable[Row], meta: dict[str, Any]) -> None:
    """Write the rows as Parquet, sorted by arm, seed, rate, split and metric.

    Args:
        meta: JSON kept in the file: the study, and how it was run.
    """
    rank = lambda row: (row.arm, row.seed, row.rate or 0.0, row.split, row.metric)
    table = pa.Table.from_pylist([dataclasses.asdict(row) for row in sorted(rows, key=rank)], schema=SCHEMA)
    partial = path.with_name(f"{path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({_META: json.dumps(meta).encode()}), partial, compression="zstd")
    partial.replace(path)


def read(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return rows and meta of a file that `write` made.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; run the study first (wmss lab)")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error
    meta = (table.schema.metadata or {}).get(_META)
    if meta is None or table.schema.names != SCHEMA.names:
        raise ValueError(f"{path}: no results of `wmss lab`")
    return [Row(**row) for row in table.to_pylist()], json.loads(meta)


def values(rows: Sequence[Row], split: str, metric: str) -> dict[tuple[str, float | None], dict[int, float]]:
    """Return {(arm, rate): {seed: value}} of one metric on one split."""
    found: dict[tuple[str, float | None], dict[int, float]] = {}
    for row in rows:
        if row.split == split and row.metric == metric:
            found.setdefault((row.arm, row.rate), {})[row.seed] = row.value
    return found
