"""A recipe made ready: its work directory, tokenizer, encoded examples and mesh, which all stages share."""

import dataclasses
import functools
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from wmss_jax import (
    attention,
    compilation,
    config,
    data,
    examples,
    hf,
    processes,
    sharding,
    stages,
    storage,
    tokenizer,
    training_config,
)
from wmss_jax.models import multimodal
from wmss_jax.models.lora import Lora
from wmss_jax.sources import SourceConfig
from wmss_jax.stages import ModelRef
from wmss_jax.storage import Directory


@dataclasses.dataclass(frozen=True)
class Run:
    """A recipe with everything that its stages share."""

    recipe: config.RunConfig
    work: Path
    mesh: Mesh | None
    tokenizer: Any
    dataset: data.Dataset
    held_out: data.Dataset | None
    say: Callable[[str], None]

    @property
    def model_settings(self) -> tuple[tuple[str, str | None], ...]:
        """Settings of every model of the run, as `ModelRef` takes them."""
        return tuple((name, getattr(self.recipe.model, name)) for name in ("compute_dtype", "remat", "attention"))

    @property
    def lora(self) -> Lora | None:
        """What the training stages adapt; None where they train whole models."""
        return None if self.recipe.lora is None else _lora(self.recipe.lora)

    def ref(self, model: str) -> ModelRef:
        """Return a reference to a Hugging Face directory, a hub id, or the strong role of a checkpoint."""
        return ModelRef.named(model, self.model_settings)

    def other(self, model: str, key: str) -> ModelRef:
        """Return `ref` of a model that is to meet the recipe's own, whose tokens it must know under the same ids.

        Args:
            key: of the recipe, that names the model.

        Raises:
            ValueError: its vocabulary is another one.
        """
        found = self.ref(model)
        _check_vocabulary(self, found, f"{key}: {model}")
        return found

    def name_of(self, directory: Directory) -> str:
        """Return what `named` finds a directory by: in the work directory by its place there, which may be moved."""
        return directory.relative_to(self.work).as_posix() if isinstance(directory, Path) else str(directory)

    def named(self, name: str) -> Directory:
        """Return the directory that `name_of` gave a name."""
        found = storage.path(name)
        return self.work / found if isinstance(found, Path) else found

    def encoded(self, sources: Sequence[SourceConfig]) -> data.Dataset:
        """Return other examples than the recipe's own, encoded alike."""
        return _encoded(self.recipe, self.tokenizer, sources)

    def finished(self, name: str) -> bool:
        """Return whether a stage is done and will not be done again."""
        return stages.finished(self.work / "stages" / f"{name}.json")

    def stage(
        self, name: str, inputs: Mapping[str, Any], work: Callable[[], dict[str, Any]], made: Directory | None = None
    ) -> dict[str, Any]:
        """Return a stage's output, from its record or by doing it; see `stages.run`."""
        self.say(f"{name} ...")
        return stages.run(self.work / "stages" / f"{name}.json", inputs, work, made)


def prepare(recipe: config.RunConfig, say: Callable[[str], None] = print) -> Run:
    """Return a recipe's tokenizer, examples and mesh, made or found in its work directory."""
    processes.check_alike({"recipe": config.digest(recipe)})  # first, or one alone would find the mistakes below
    work, say = Path(recipe.work_dir), say if processes.first() else _say_nothing
    mesh = sharding.make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    device = mesh.devices.flat[0]
    backend = attention.backend_on(device, recipe.model.attention)
    say(f"{mesh.size} x {device.device_kind}, attention {backend}")
    compilation.use_cache()
    shards, parts = sharding.batch_shards(mesh), recipe.train.micro_batches
    if (rows := recipe.dataset.batch_size) % (shards * parts):
        raise ValueError(
            f"dataset.batch_size: {rows} rows do not split over {shards * parts} = train.micro_batches × mesh.data × "
            f"mesh.fsdp; make it a multiple"
        )
    if (rows := recipe.score.batch_size or shards) % shards:
        raise ValueError(
            f"score.batch_size: {rows} rows do not split over {shards} = mesh.data × mesh.fsdp; make it a multiple"
        )
    _check_lora(recipe)
    made = _assets(recipe, work)
    encoded = functools.partial(_encoded, recipe, made)
    dataset = encoded(recipe.dataset.train)
    r = dataset.report
    say(
        f"{r.examples:,} examples, {r.tokens:,} tokens; {r.dropped:,} dropped and {r.truncated:,} truncated as too long"
    )
    held_out = encoded(recipe.eval.data) if recipe.eval.data else None
    processes.check_alike({"data set": dataset.fingerprint})
    return Run(recipe, work, None if mesh.size == 1 else mesh, made, dataset, held_out, say)


def _check_vocabulary(run: Run, other: ModelRef, name: str) -> None:
    """Raise ValueError unless a model knows the recipe's tokens: compared one by one where its tokenizer is there."""
    tokens, rows = len(run.tokenizer), other.model.vocabulary[0]
    if tokens > rows:
        raise ValueError(f"{name} has rows for {rows} tokens, the recipe's tokenizer has {tokens}; give another model")
    if not any((other.assets / file).exists() for file in tokenizer.FILES):
        run.say(f"{name} has no tokenizer: of its vocabulary only the size is known to fit")
        return
    differ, absent = tokenizer.differences(run.tokenizer, tokenizer.load(other.assets))
    if differ:
        raise ValueError(
            f"{name} has another vocabulary: {len(differ)} tokens have other ids, e.g. {', '.join(differ[:3])}; logits "
            f"of different vocabularies cannot be mixed, give a model with the recipe's"
        )
    if absent:
        run.say(f"{name} was trained without {len(absent)} tokens of the recipe's tokenizer: {', '.join(absent[:8])}")


def _say_nothing(line: str) -> None:
    del line  # process 0 says it


def _check_lora(recipe: config.RunConfig) -> None:
    """Raise ValueError where the model has no matrices of the names that are to be adapted."""
    if recipe.lora is not None:
        hf.from_config(hf.read_config(_model_source(recipe)), lora=_lora(recipe.lora))


def _lora(wanted: training_config.LoraConfig) -> Lora:
    return Lora(wanted.rank, wanted.alpha, wanted.targets)


def _model_source(recipe: config.RunConfig) -> Path:
    """Return the directory, or the config.json alone, that the recipe's model starts from."""
    m = recipe.model
    return Path(m.config) if m.config is not None else hf.resolve(str(m.path))


def _encoded(recipe: config.RunConfig, made: Any, sources: Sequence[SourceConfig]) -> data.Dataset:
    d = recipe.dataset
    prepare = functools.partial(
        data.prepare, sources, made, root=recipe.data, seq_len=d.seq_len, too_long=d.too_long,
        chat_template=d.chat_template, system_prompt=d.system_prompt, cache_dir=Path(recipe.work_dir) / "cache",
    )  # fmt: skip
    if jax.process_count() > 1:
        processes.by_first(prepare)
    return prepare()


def _assets(recipe: config.RunConfig, work: Path) -> Any:
    """Return the tokenizer, having put its files and the model's config.json into `assets/`."""
    directory, m = work / "assets", recipe.model
    source = _model_source(recipe)
    model_dir = source if source.suffix != ".json" else source.parent
    found = hf.resolve(m.tokenizer) if isinstance(m.tokenizer, str) else model_dir
    settings = hf.read_config(source)

    def make() -> None:
        stages.clear_partial(directory)
        if directory.exists():
            return
        with hf.new_directory(directory) as new:
            if isinstance(m.tokenizer, training_config.TokenizerConfig):
                made = tokenizer.train(_texts(recipe), m.tokenizer.vocab_size, new, chats=_in_chats(recipe))
            else:
                made = tokenizer.load(found)
                hf.carry(found, new)
            if len(made) > (rows := hf.from_config(settings).sizes["V"]):
                raise ValueError(
                    f"the tokenizer has {len(made)} tokens, the model's vocabulary {rows}: "
                    f"raise vocab_size in config.json or lower model.tokenizer.vocab_size"
                )
            (new / "config.json").write_text(
                json.dumps(settings if m.path else _begun(settings, made), indent=2) + "\n"
            )

    inputs = {"config": settings, "tokenizer": _tokenizer_inputs(recipe, found)}
    record = work / "stages" / "assets.json"

    def forget_unused() -> None:
        used = len(list(record.parent.glob("*.json"))) > 1
        if record.exists() and not used and json.loads(record.read_text())["inputs"] != inputs:
            # After a look at the data (`wmss inspect`) they and the tokenizer may still change.
            shutil.rmtree(directory, ignore_errors=True)
            record.unlink()

    processes.by_first(forget_unused)
    stages.run(record, inputs, lambda: processes.by_first(make) or {}, directory)
    return tokenizer.load(directory)


def _begun(settings: Mapping[str, Any], made: Any) -> dict[str, Any]:
    """Return the config of a model that starts without weights: its special tokens are those of its tokenizer.

    Left out, they would be what transformers takes for the family's, which need not even be among the rows.
    """
    ids = {key: getattr(made, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return multimodal.text_config(settings) | ids


def _tokenizer_inputs(recipe: config.RunConfig, found: Path) -> dict[str, Any]:
    """Return what tells one tokenizer from another: its files, or what it is trained on."""
    wanted = recipe.model.tokenizer
    crc = lambda content: f"{zlib.crc32(content):08x}"
    if not isinstance(wanted, training_config.TokenizerConfig):
        if not any((found / name).exists() for name in tokenizer.FILES):
            raise ValueError(f"{found}: holds no tokenizer (tokenizer.json); say in model.tokenizer which to use")
        return {name: crc((found / name).read_bytes()) for name in hf.CARRIED if (found / name).exists()}
    texts = [
        (examples.digest(source, recipe.data), source.model_copy(update={"path": ""})) for source in _sources(recipe)
    ]
    return {
        "vocab_size": wanted.vocab_size,
        "texts": crc(repr(texts).encode()),
        "chat_template": recipe.dataset.chat_template,
    }


def _sources(recipe: config.RunConfig) -> tuple[SourceConfig, ...]:
    return (*recipe.dataset.train, *(recipe.pretrain.train if recipe.pretrain else ()))


def _examples(recipe: config.RunConfig) -> Iterator[examples.Example]:
    for source in _sources(recipe):
        yield from examples.read(source, recipe.data)


def _in_chats(recipe: config.RunConfig) -> bool:
    """Return whether any training example goes through the chat template."""
    return recipe.dataset.chat_template or any(example.messages is not None for example in _examples(recipe))


def _texts(recipe: config.RunConfig) -> Iterator[str]:
    """Give every text of the training examples, for a tokenizer to be trained on."""
    for example in _examples(recipe):
        yield from (message["content"] for message in example.messages or ())
        yield from (text for text in (example.prompt, example.completion, example.text) if text is not None)
