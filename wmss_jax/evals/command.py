"""`wmss eval`: any model on tasks by name; `wmss eval-compare`: two models' answers to the same questions."""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from wmss_jax import encoding, sharding, stages, tokenizer
from wmss_jax.endings import end_ids
from wmss_jax.evals import grading, questions, run, statistics
from wmss_jax.evals.catalog import Protocol, Task
from wmss_jax.evals.run import Decoding, Item
from wmss_jax.stages import ModelRef


@dataclasses.dataclass(frozen=True)
class Request:
    """What `wmss eval` was asked for.

    Attributes:
        out: directory for a file of answers and a record of figures for each task.
        chat: whether questions go through the chat template; None: if the tokenizer has one.
        max_new_tokens: None: the protocol's, else the task's.
        grader: instead of the tasks' own.
    """

    model: str
    tasks: tuple[str, ...]
    out: Path
    protocol: Protocol
    data: Path | None = None
    limit: int | None = None
    batch_size: int = 64
    max_new_tokens: int | None = None
    grader: str | None = None
    chat: bool | None = None
    unsafe_no_sandbox: bool = False


def evaluate(request: Request, say: Callable[[str], None] = print) -> dict[str, dict[str, Any]]:
    """Return {task: figures}; the answers lie in `out`/TASK.jsonl. The same call goes on after an interruption.

    Raises:
        ValueError: a task or data set is not usable, or `out` holds the answers of another model or protocol.
    """
    tasks = [_graded_by(request, questions.task_named(name, request.grader)) for name in request.tasks]
    found = {task.name: questions.read(task, request.data, request.limit, request.protocol.seed) for task in tasks}
    if len(found) < len(tasks):
        raise ValueError(f"two tasks have the same name: {', '.join(task.name for task in tasks)}")
    for task in tasks:
        if task.items not in (None, len(found[task.name])):
            say(f"{task.name}: {len(found[task.name])} questions, where the paper has {task.items}")
    with grading.opened({task.grader for task in tasks}, unsafe_no_sandbox=request.unsafe_no_sandbox) as judges:
        ref = ModelRef.named(request.model)
        texts = tokenizer.load(ref.assets)
        chat = request.chat if request.chat is not None else texts.chat_template is not None
        mesh = sharding.make_mesh()
        load = functools.cache(lambda: ref.load(mesh if mesh.size > 1 else None))
        return {
            task.name: _answered(request, ref, load, texts, chat, mesh, task, found[task.name], judges, say)
            for task in tasks
        }


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line a task: percent right with its 95 % interval, and what else several samples tell."""
    lines = []
    for name, row in figures.items():
        more = [f"{key} {100 * value:.1f}" for key, value in row.items() if "@" in key and key != "pass@1"]
        more += [f"{row['hung']} judgements hung"] if row["hung"] else []
        interval = f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        mean = f"mean@{row['samples']} " if "samples" in row else ""
        right = f"{mean}{100 * row['accuracy']:.1f} %"
        lines.append(f"{name}: {right} {interval} of {row['n']}" + "".join(f"; {x}" for x in more))
    return "\n".join(lines)


def compare(a: Path, b: Path) -> dict[str, dict[str, float]]:
    """Return {task: `statistics.difference`} of two directories of `wmss eval`, over the tasks of both.

    Raises:
        ValueError: they have no task in common, or not the same questions.
    """
    common = sorted({path.name for path in a.glob("*.jsonl")} & {path.name for path in b.glob("*.jsonl")})
    if not common:
        raise ValueError(f"{a} and {b}: no finished task in common")
    return {name.removesuffix(".jsonl"): _compared(a / name, b / name) for name in common}


def difference_table(differences: Mapping[str, Mapping[str, float]]) -> str:
    """Return a line a task: both models, the difference with its 95 % interval, McNemar's p-value."""
    lines = []
    for name, d in differences.items():
        ends = f"[{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
        lines.append(
            f"{name}: {100 * d['a']:.1f} % -> {100 * d['b']:.1f} %, {100 * d['difference']:+.1f} {ends}, "
            f"p = {d['p']:.3g} ({d['only_a']} right in the first alone, {d['only_b']} in the second, of {d['n']})"
        )
    return "\n".join(lines)


def _graded_by(request: Request, task: Task) -> Task:
    if task.grader == "numeric" and task.items is not None and request.grader is None:
        return dataclasses.replace(task, grader=request.protocol.numbers_by)
    return task


def _answered(
    request: Request, ref: ModelRef, load: Callable[[], Any], texts: Any, chat: bool, mesh: Mesh, task: Task,
    found: Sequence[questions.Question], judges: Mapping[str, grading.Judge], say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    protocol = request.protocol
    system = protocol.system_prompt if chat else None  # a prompt without roles has no place for it
    render = functools.partial(encoding.prompt_tokens, tokenizer=texts, chat_template=chat, system_prompt=system)
    items = [Item(render(question.prompt).tolist(), question) for question in found]
    tokens = request.max_new_tokens or protocol.max_new_tokens or task.max_new_tokens
    inputs = {
        "model": ref.digest, "task": dataclasses.asdict(task), "protocol": dataclasses.asdict(protocol),
        "max_new_tokens": tokens, "items": f"{zlib.crc32(repr(items).encode()):08x}",
    }  # fmt: skip
    stop_ids = end_ids(texts, ref.assets, chat_template=chat)
    decoding = Decoding(tokens, protocol, stop_ids, request.batch_size, mesh if mesh.size > 1 else None)

    def work() -> dict[str, Any]:
        model, params = load()
        key = f"{zlib.crc32(json.dumps(inputs).encode()):08x}"
        path = request.out / f"{task.name}.jsonl"
        return run.evaluate(model, params, texts, items, judges[task.grader], task.extraction, decoding, path, key)

    say(f"{task.name}: {len(items)} questions x {protocol.samples}, at most {tokens} tokens each")
    return stages.run(request.out / f"{task.name}.json", inputs, work)


def _compared(a: Path, b: Path) -> dict[str, float]:
    rows_a, rows_b = run.read(a), run.read(b)
    prompts = [{record.item: record.prompt for record in rows} for rows in (rows_a, rows_b)]
    if prompts[0] != prompts[1]:
        raise ValueError(f"{a} and {b}: are not of the same questions")
    return statistics.difference(_shares(rows_a), _shares(rows_b))


def _shares(records: Sequence[run.Record]) -> list[float]:
    """Return the share of right samples of every item."""
    verdicts: dict[int, list[bool]] = {}
    for record in records:
        verdicts.setdefault(record.item, []).append(record.verdict)
    return [sum(row) / len(row) for _, row in sorted(verdicts.items())]
