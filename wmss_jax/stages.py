"""Stages on disk: what each was made from, whether it is finished, and where its model lies.

Every stage of a run has a record, `stages/<name>.json`: its inputs, written before the work starts, and its output,
written when it is done. A finished stage is skipped, an unfinished one gone on with; one made from other inputs is
refused, never overwritten.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from wmss_jax import checkpoint, digests, hf, processes, roles, storage
from wmss_jax.models import CausalLM
from wmss_jax.storage import Directory, GcsPath


def run(
    record: Path, inputs: Mapping[str, Any], work: Callable[[], dict[str, Any]], made: Directory | None = None
) -> dict[str, Any]:
    """Return the output of a stage: what `work()` returned when it was finished, now or in an earlier run.

    Args:
        inputs: JSON of everything that the output depends on.
        work: does the stage's work; called again after an interruption, it goes on.
        made: directory that the work fills. While there is nothing in it, an unfinished stage may begin again from
            other inputs: a mistake that stopped it at its start can be mended where it was made.

    Raises:
        ValueError: the record is of other inputs; the keys that differ are named.
        FileExistsError: `made` holds something without a record of what it was made from.
    """
    inputs = json.loads(json.dumps(inputs))
    # By process 0 for all: the others might look before or after it has written.
    known = processes.agreed(lambda: _begin(record, inputs, made))
    if known is not None:
        return known
    output = json.loads(json.dumps(work()))
    return processes.agreed(lambda: _finish(record, inputs, output))


def _begin(record: Path, inputs: Mapping[str, Any], made: Directory | None) -> dict[str, Any] | None:
    """Return the output of a finished stage; None where it is to be done, its inputs then being on record."""
    known = json.loads(record.read_text()) if record.exists() else {"inputs": {}, "output": None}
    begun = made is not None and _has_something(made)
    if begun and not record.exists():
        other = "train.checkpoint_bucket" if isinstance(made, GcsPath) else "work_dir"
        raise FileExistsError(f"{made}: exists, and no {record} says from what; remove it or choose another {other}")
    if begun or known["output"] is not None:
        _check_same(record, known["inputs"], inputs)
    now = {"inputs": inputs, "output": None, **({"made": str(made)} if isinstance(made, GcsPath) else {})}
    if known["output"] is None and known != now:
        _check_not_elsewhere(record, known, made)
        record.parent.mkdir(parents=True, exist_ok=True)
        _write(record, now)
    return known["output"]


def _check_not_elsewhere(record: Path, known: Mapping[str, Any], made: Directory | None) -> None:
    """Raise ValueError where a stage was begun in a bucket and is to go on here, in another one, or the other way."""
    before = known.get("made")
    if before is None and isinstance(made, GcsPath):
        before = record.parent.parent / made.parent.name / made.name
    if before is not None and storage.path(before) != made and _has_something(storage.path(before)):
        raise ValueError(
            f"{record}: this stage was begun with its checkpoints in {before}, not in {made}; set "
            f"train.checkpoint_bucket to what it was, or remove them to begin anew"
        )


def _has_something(made: Directory) -> bool:
    if isinstance(made, Path):
        return made.exists() and any(made.iterdir())
    return made.is_dir()


def _finish(record: Path, inputs: Mapping[str, Any], output: dict[str, Any]) -> dict[str, Any]:
    record.parent.mkdir(parents=True, exist_ok=True)
    _write(record, {"inputs": inputs, "output": output})
    return output


def finished(record: Path) -> bool:
    """Return whether the stage of a record was done to its end."""
    return record.exists() and json.loads(record.read_text())["output"] is not None


def _check_same(record: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    before, now = _flat(known), _flat(wanted)
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"{record}: this work_dir holds the stage of another recipe or other data: {'; '.join(changed[:5])}"
            f"{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}; choose another work_dir"
        )


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: leaf for name, node in tree.items() for key, leaf in _flat(node, f"{path}.{name}".strip(".")).items()}


def clear_partial(directory: Path) -> None:
    """Remove what a killed process left of `directory` under a temporary name (`hf.new_directory`).

    The name has the process id in it, which is always the same in a container.
    """
    for leftover in directory.parent.glob(f"{directory.name}.partial-*") if processes.first() else ():
        shutil.rmtree(leftover)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(file)


@dataclasses.dataclass(frozen=True)
class ModelRef:
    """Parameters on disk: a Hugging Face directory, or one role of a checkpoint, which may be an adapter.

    Attributes:
        role: None for a Hugging Face directory.
        settings: compute_dtype, remat and attention of the model that `load` returns.
        known_base: of an adapter, what it was trained on, where the caller has it; else its checkpoint says it.
        kept: where given, what `load` read stays there, for a caller that loads the same parameters many times.
    """

    directory: Directory
    role: str | None
    settings: tuple[tuple[str, str | None], ...] = ()
    known_base: "ModelRef | None" = dataclasses.field(default=None, compare=False)
    kept: dict[Any, Any] | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def named(cls, model: str, settings: tuple[tuple[str, str | None], ...] = ()) -> "ModelRef":
        """Return the reference that a path or hub id means: of a checkpoint, the strong role.

        Raises:
            FileNotFoundError: it is neither; see `hf.resolve`.
        """
        directory = storage.path(model)
        if (directory / checkpoint.META).is_file():
            return cls(directory, "strong", settings)
        if isinstance(directory, GcsPath):
            raise FileNotFoundError(f"{model}: no checkpoint; of buckets these are read, no Hugging Face directories")
        return cls(hf.resolve(model), None, settings)

    def load(self, mesh: Mesh | None, dtype: str | None = None) -> tuple[CausalLM, PyTree[Array]]:
        """Return model and parameters; `dtype` of the parameters, default that of the file.

        An adapter comes merged into its base, as it is shipped.
        """
        if self.kept is None:
            return self._load(mesh, dtype)
        key = self.directory, self.role, mesh, dtype
        if key not in self.kept:
            self.kept[key] = self._load(mesh, dtype)
        return self.kept[key]

    def _load(self, mesh: Mesh | None, dtype: str | None) -> tuple[CausalLM, PyTree[Array]]:
        model, params = self.load_stored(mesh, dtype)
        if model.lora is None:
            return model, params
        _, base = self._checked_base().load(mesh, dtype)
        return model.base, model.merge(base, params, mesh)

    def load_stored(self, mesh: Mesh | None, dtype: str | None = None) -> tuple[CausalLM, PyTree[Array]]:
        """Return what lies on disk: of an adapter, the adapter alone."""
        in_hf = self.role is None
        model, params = hf.load(self._local, mesh, dtype) if in_hf else self._role(mesh, dtype)
        return dataclasses.replace(model, **dict[str, Any](self.settings)), params

    def load_head(self, mesh: Mesh | None) -> PyTree[Array]:
        """Return the parameters that make logits of hidden states; nothing else is read."""
        if self.base is not None:
            return self.base.load_head(mesh)  # adapters leave the head alone
        if self.role is None:
            return hf.load_head(self._local, mesh)
        return self._role(mesh, head_only=True)[1]

    @functools.cached_property
    def base(self) -> "ModelRef | None":
        """What an adapter was trained on; None for whole models."""
        if self.known_base is not None:
            return self.known_base
        said = None if self.role is None else checkpoint.read_meta(self.directory).get("base")
        if said is None:
            return None
        directory = storage.path(said["directory"]) if said["role"] is not None else hf.resolve(said["directory"])
        return ModelRef(directory, said["role"], self.settings)

    def described(self) -> dict[str, Any]:
        """Return what a checkpoint of an adapter says of its base, from which `base` finds it again."""
        return {"directory": str(self.directory), "role": self.role, "digest": self.digest}

    def _role(self, mesh: Mesh | None, dtype: str | None = None, *, head_only: bool = False) -> tuple[CausalLM, PyTree]:
        try:
            return roles.load(self.directory, str(self.role), mesh, dtype, head_only=head_only)
        except checkpoint.CheckpointDamaged as error:
            fix = "put back a copy of it, or start again in another work_dir"
            raise checkpoint.CheckpointDamaged(f"{error}; {fix}") from error

    def _checked_base(self) -> "ModelRef":
        said = checkpoint.read_meta(self.directory)["base"]
        assert self.base is not None
        if self.base.digest != said["digest"]:
            raise ValueError(
                f"{self.directory}: is an adapter of another model than the one that now lies in {said['directory']} "
                f"({said['digest']}, here {self.base.digest}); put the base back"
            )
        return self.base

    @property
    def model(self) -> CausalLM:
        """The model without its parameters."""
        in_hf = self.role is None
        model = hf.model_of(self._local) if in_hf else roles.models(self.directory)[str(self.role)]
        return dataclasses.replace(model, **dict[str, Any](self.settings))

    @property
    def assets(self) -> Path:
        """Directory of this machine with the tokenizer and config files that belong to the parameters."""
        return self._local if self.role is None else storage.here(self.directory / roles.ASSETS)

    @property
    def _local(self) -> Path:
        assert isinstance(self.directory, Path)  # buckets hold checkpoints, no Hugging Face directories
        return self.directory

    @functools.cached_property
    def digest(self) -> str:
        """Digest of every byte of the parameters; read once, because it takes as long as the disk needs for them."""
        if self.role is not None:
            return digests.of((self.directory / digests.DIGESTS).read_bytes())[1]
        crc = google_crc32c.Checksum()
        for file in sorted(self._local.glob("*.safetensors")):
            with open(file, "rb") as stream:
                while block := stream.read(2**24):
                    crc.update(block)
        return crc.hexdigest().decode()
