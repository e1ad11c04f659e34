"""One model on one set of questions: generate, grade, count; gone on with where it was interrupted."""

import dataclasses
import json
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from wmss_jax import durable, processes
from wmss_jax.evals import statistics
from wmss_jax.evals.catalog import Protocol as Asking
from wmss_jax.evals.grading import Judge
from wmss_jax.evals.questions import Question
from wmss_jax.generate import generate
from wmss_jax.models import CausalLM
from wmss_jax.sampling import Sampling

PLAIN = Asking()


@runtime_checkable
class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    eos_token_id: int | None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


@dataclasses.dataclass(frozen=True)
class Item:
    """A question as the model reads it: token ids of the whole prompt, chat template and all."""

    prompt_ids: Sequence[int]
    question: Question


@dataclasses.dataclass(frozen=True)
class Record:
    """A line of the results: what the model made of an item, what that was taken to say, and whether it is right.

    Attributes:
        problem: what the judge had difficulties with, such as a hang (`hung`), or the test that failed.
    """

    item: int
    sample: int
    location: str
    prompt: str
    generation: str
    extraction: str
    gold: str
    verdict: bool
    problem: str = ""
    hung: bool = False


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are made of a model's tokens.

    Attributes:
        asking: sampling; its token budget and system prompt are the caller's.
        max_new_tokens: after which an answer is cut off.
        stop_ids: that end an answer besides the tokenizer's EOS, such as generation_config.json's.
        batch_size: questions side by side. Also what is lost at most by an interruption.
    """

    max_new_tokens: int
    asking: Asking = PLAIN
    stop_ids: Collection[int] = ()
    batch_size: int = 64
    mesh: Mesh | None = None


def evaluate(
    model: CausalLM,
    params: PyTree[Array],
    tokenizer: Tokenizer,
    items: Sequence[Item],
    judge: Judge,
    extraction: str,
    decoding: Decoding,
    out: Path,
    key: str = "",
) -> dict[str, Any]:
    """Return a task's figures, and write a `Record` for each item and sample to `out`.

    Records of finished batches lie beside `out` until all are there; the same call goes on from these, and ends with
    the same file: an interrupted batch is generated again as it was, with what it was batched with.

    Args:
        key: differs where anything differs that the answers depend on and that is not seen from the questions.

    Raises:
        ValueError: there are no items, `generate` refuses a prompt, or the partial file is of other questions.
    """
    if not items:
        raise ValueError("there are no items to evaluate")
    partial = out.with_name(f"{out.name}.{key}.partial" if key else f"{out.name}.partial")
    known = processes.agreed(lambda: _begun(partial, items, decoding.asking.samples))
    for batch in _batches(items, decoding.batch_size):
        missing = [i for i in batch if i not in known]
        if missing:
            texts = _texts(model, params, tokenizer, [(i, items[i]) for i in batch], decoding)
            if processes.first():
                wanted = {(i, s): text for (i, s), text in texts.items() if i in missing}
                _append(partial, _graded(wanted, items, judge, extraction))
    return processes.agreed(lambda: _finish(partial, out))


def records(
    model: CausalLM,
    params: PyTree[Array],
    tokenizer: Tokenizer,
    items: Sequence[Item],
    judge: Judge,
    extraction: str,
    decoding: Decoding,
) -> list[Record]:
    """Return what `evaluate` writes, in its order."""
    found: list[Record] = []
    for batch in _batches(items, decoding.batch_size):
        texts = _texts(model, params, tokenizer, [(i, items[i]) for i in batch], decoding)
        found += _graded(texts, items, judge, extraction)
    return sorted(found, key=_place)


def figures(records: Sequence[Record]) -> dict[str, Any]:
    """Return what records in the order of items and samples say; see `statistics.figures`."""
    samples = 1 + max(record.sample for record in records)
    rows = [records[start : start + samples] for start in range(0, len(records), samples)]
    found: dict[str, Any] = statistics.figures(
        [[r.verdict for r in row] for row in rows], [[r.extraction for r in row] for row in rows]
    )
    return found | {"hung": sum(record.hung for record in records)}


def read(path: Path) -> list[Record]:
    """Return the records of a results file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: is no file of graded answers: {error}") from error


def _batches(items: Sequence[Item], size: int) -> Iterator[list[int]]:
    """Yield indices, longest prompts first: always the same batches, and what does not fit in memory fails at once."""
    order = sorted(range(len(items)), key=lambda index: -len(items[index].prompt_ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _texts(
    model: CausalLM, params: PyTree[Array], tokenizer: Tokenizer, batch: Sequence[tuple[int, Item]], d: Decoding
) -> dict[tuple[int, int], str]:
    """Return {(item, sample): answer}."""
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    extra: dict[str, Any] = {}
    if d.asking.temperature > 0:
        extra["sampling"] = Sampling(d.asking.temperature, top_p=d.asking.top_p, samples=d.asking.samples)
        extra["seeds"] = [zlib.crc32(f"{d.asking.seed} {index}".encode()) for index, _ in batch]
    answers = generate(
        model, params, [item.prompt_ids for _, item in batch], max_new_tokens=d.max_new_tokens,
        stop_ids={*d.stop_ids, *eos}, mesh=d.mesh, batch_size=d.batch_size, **extra,
    )  # fmt: skip
    keys = [(index, sample) for index, _ in batch for sample in range(d.asking.samples)]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return dict(zip(keys, texts, strict=True))


def _graded(texts: dict[tuple[int, int], str], items: Sequence[Item], judge: Judge, extraction: str) -> list[Record]:
    def graded(key: tuple[int, int]) -> Record:
        question = items[key[0]].question
        verdict = judge(texts[key], question, extraction)
        return Record(
            *key, question.location, question.prompt, texts[key], verdict.extraction, question.gold, verdict.right,
            verdict.problem, verdict.hung,
        )  # fmt: skip

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(threads.map(graded, texts))


# -- the file ---------------------------------------------------------------------------------------------------------


def _place(record: Record) -> tuple[int, int]:
    return record.item, record.sample


def _line(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n"


def _append(path: Path, records: Sequence[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, records))
        file.flush()
        os.fsync(file.fileno())


def _begun(partial: Path, items: Sequence[Item], samples: int) -> list[int]:
    """Return the items whose records an earlier run has written, having cut off a line that it did not finish."""
    if not partial.exists():
        return []
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(partial, len(whole))
    counts: dict[int, int] = {}
    for record in read(partial):
        if record.item >= len(items) or items[record.item].question.prompt != record.prompt:
            raise ValueError(f"{partial}: holds answers to other questions; remove it, or choose another directory")
        counts[record.item] = counts.get(record.item, 0) + 1
    done = [item for item, count in counts.items() if count == samples]
    if len(done) < len(counts):  # an item of which not all samples are written is asked again
        _rewrite(partial, [record for record in read(partial) if record.item in done])
    return done


def _finish(partial: Path, out: Path) -> dict[str, Any]:
    records = sorted(read(partial), key=_place)
    _rewrite(partial, records)
    partial.rename(out)
    durable.sync(out.parent)
    return figures(records)


def _rewrite(path: Path, records: Sequence[Record]) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(map(_line, records)), encoding="utf-8")
    durable.sync(new)
    new.replace(path)
