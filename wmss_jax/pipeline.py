"""A recipe, stage by stage: (pretrain →) sft → score → curriculum → joint and its controls → export → eval.

Stages talk through files in the work directory, so each can be inspected, skipped when it is finished, and gone on
with when it was interrupted:

    stages/*.json         what every stage was made from, and its output
    assets/  cache/       tokenizer and config files; tokenised examples
    <stage>/              checkpoints and metrics.jsonl of a training stage
    scores/*.parquet      entropy, nll, margin of every example under M0, M1, ...
    curriculum/           sampling probabilities and their report
    export/               the shipped model, a Hugging Face directory
    eval/*.jsonl          every prompt, answer and verdict
    summary.json          the figures of the table
"""

import dataclasses
import functools
import itertools
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from rich.console import Console

from wmss_jax import (
    checkpoint,
    config,
    curriculum,
    data,
    encoding,
    examples,
    hf,
    inspection,
    objectives,
    scoring,
    sharding,
    stages,
    tokenizer,
    train,
)
from wmss_jax.evals.graders import GRADERS
from wmss_jax.evals.run import Item, evaluate
from wmss_jax.models import CausalLM
from wmss_jax.stages import ModelRef


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

    def stage(self, name: str, inputs: Mapping[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a stage's output, from its record or by doing it."""
        self.say(f"{name} ...")
        return stages.run(self.work / "stages" / f"{name}.json", inputs, work)


def run(recipe: config.RunConfig, until: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Carry out a recipe and return its summary: {"models", "eval", "scores", "curriculum", "export"}.

    The same call goes on where an earlier one was interrupted, and does nothing where it was finished.

    Args:
        until: name of the training stage after which to stop: "pretrain", "sft", "joint", or one of the controls.
        say: is told, in a line each, what is being done.

    Raises:
        ValueError: the recipe cannot be carried out, or the work directory holds another one.
        train.Preempted: SIGTERM came during training; everything is saved.
    """
    arms = {name: _objective(arm, name) for name, arm in recipe.arms().items()}
    names = ["pretrain", "sft", *arms]
    if until is not None and until not in names:
        raise ValueError(f"no stage {until!r} to stop after; there are {', '.join(names)}")
    run = prepare(recipe, say)
    base = _base(run)
    if until == "pretrain":
        return {"models": {"M0": str(base.directory)}}
    lineage = [base, _sft(run, base)]
    finals = {"M0": lineage[0], "M1": lineage[1]}
    summary: dict[str, Any] = {"curriculum": {}}
    for number in range(1, recipe.rounds + 1) if until != "sft" else ():
        weak, strong = lineage[-2:]
        probs, report = _curriculum(run, number, weak, strong)
        summary["curriculum"][f"round {number}"] = report
        for name, objective in arms.items():
            if name != "joint" and number > 1:
                continue  # the controls are compared with the first round
            if until in ("joint", name) or until is None or name == "joint":
                finals[_nth(name, number)] = _arm(run, number, name, objective, weak, strong, probs)
        lineage.append(finals[_nth("joint", number)])
    summary["models"] = {name: str(ref.directory) for name, ref in finals.items()}
    if until is None:
        summary["export"] = _export(run, lineage[-1], arms["joint"])
        summary["eval"] = _evaluate(run, finals)
        (run.work / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def prepare(recipe: config.RunConfig, say: Callable[[str], None] = print) -> Run:
    """Return a recipe's tokenizer, examples and mesh, made or found in its work directory."""
    work = Path(recipe.work_dir)
    mesh = sharding.make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    rows, shards = recipe.dataset.batch_size, sharding.batch_shards(mesh) * recipe.train.micro_batches
    if rows % shards:
        raise ValueError(
            f"dataset.batch_size: {rows} rows do not split over {shards} = train.micro_batches × mesh.data × mesh.fsdp"
        )
    made = _assets(recipe, work)
    encoded = functools.partial(_encoded, recipe, made)
    dataset = encoded(recipe.dataset.train)
    r = dataset.report
    say(
        f"{r.examples:,} examples, {r.tokens:,} tokens; {r.dropped:,} dropped and {r.truncated:,} truncated as too long"
    )
    held_out = encoded(recipe.eval.data) if recipe.eval.data else None
    return Run(recipe, work, None if mesh.size == 1 else mesh, made, dataset, held_out, say)


def _encoded(recipe: config.RunConfig, made: Any, sources: Sequence[config.SourceConfig]) -> data.Dataset:
    d = recipe.dataset
    return data.prepare(
        sources, made, root=recipe.data, seq_len=d.seq_len, too_long=d.too_long, chat_template=d.chat_template,
        system_prompt=d.system_prompt, cache_dir=Path(recipe.work_dir) / "cache",
    )  # fmt: skip


def _assets(recipe: config.RunConfig, work: Path) -> Any:
    """Return the tokenizer, having put its files and the model's config.json into `assets/`."""
    directory, m = work / "assets", recipe.model
    source = Path(m.config) if m.config is not None else hf.resolve(str(m.path))
    model_dir = source if source.suffix != ".json" else source.parent
    settings = hf.read_config(source)
    if not (directory / "config.json").exists():
        with hf.new_directory(directory) as new:
            if isinstance(m.tokenizer, config.TokenizerConfig):
                tokenizer.train(_texts(recipe), m.tokenizer.vocab_size, new)
            else:
                found = model_dir if m.tokenizer is None else hf.resolve(m.tokenizer)
                for name in hf.CARRIED:
                    if (found / name).exists():
                        shutil.copyfile(found / name, new / name)
            tokenizer.load(new)  # so that nothing is left behind that does not load
            (new / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    made = tokenizer.load(directory)
    if len(made) > settings.get("vocab_size", 0):
        raise ValueError(
            f"the tokenizer has {len(made)} tokens, the model's vocabulary {settings.get('vocab_size')}: "
            f"raise vocab_size in config.json or lower model.tokenizer.vocab_size"
        )
    return made


def _texts(recipe: config.RunConfig) -> Iterator[str]:
    """Give every text of the training examples, for a tokenizer to be trained on."""
    for source in (*recipe.dataset.train, *(recipe.pretrain.train if recipe.pretrain else ())):
        for example in examples.read(source, recipe.data):
            yield from (message["content"] for message in example.messages or ())
            yield from (text for text in (example.prompt, example.completion, example.text) if text is not None)


# -- training stages ------------------------------------------------------------------------------------------------


def _base(run: Run) -> ModelRef:
    """Return M0: the model of the recipe, pre-trained here if it starts from random parameters."""
    m, stage = run.recipe.model, run.recipe.pretrain
    settings = _settings(run.recipe)
    if m.path is not None:
        return ModelRef(hf.resolve(m.path), None, settings)
    model = dataclasses.replace(hf.from_config(hf.read_config(run.work / "assets")), **dict(settings))
    directory = run.work / "init"

    def init() -> dict[str, Any]:
        if not directory.exists():
            params = model.init(jax.random.key(run.recipe.seed), m.param_dtype, run.mesh)
            checkpoint.save_roles(directory, {"strong": (model, params)}, {}, run.work / "assets")
        return {}

    run.stage("init", {"config": str(model.config), "seed": run.recipe.seed, "dtype": m.param_dtype}, init)
    start = ModelRef(directory, "strong", settings)
    if stage is None:
        return start
    if stage.train:
        run = dataclasses.replace(run, dataset=_encoded(run.recipe, run.tokenizer, stage.train))
    return _train(
        run, "pretrain", stage, objectives.Sft(), {"strong": start}, ("strong",), _plan(run, "pretrain", stage)
    )


def _settings(recipe: config.RunConfig) -> tuple[tuple[str, str], ...]:
    return ("compute_dtype", recipe.model.compute_dtype), ("remat", recipe.model.remat)


def _sft(run: Run, base: ModelRef) -> ModelRef:
    """Return M1: M0 fine-tuned on every example once an epoch."""
    stage = run.recipe.sft
    return _train(run, "sft", stage, objectives.Sft(), {"strong": base}, ("strong",), _plan(run, "sft", stage))


def _arm(
    run: Run,
    number: int,
    name: str,
    objective: objectives.Objective,
    weak: ModelRef,
    strong: ModelRef,
    probs: np.ndarray,
) -> ModelRef:
    """Return what the joint stage, or one of its controls, makes of M_t with the weak agent M_{t-1}."""
    arm, joint = run.recipe.arms()[name], run.recipe.joint
    seed_name = _nth("joint", number)  # the same draws for all arms: they are compared in pairs
    steps = _plan(run, seed_name, joint, probs if joint.resample else None).total_steps
    plan = _plan(run, seed_name, arm.model_copy(update={"steps": steps}), probs if arm.resample else None)
    refs = {"strong": strong, "weak": weak}
    refs = {role: refs[role] for role in objective.roles}
    trained = tuple(role for role in refs if role == "strong" or arm.weak.trainable)
    extra = {"probs": f"{zlib.crc32(probs.tobytes()):08x}" if arm.resample else None, "steps": steps}
    return _train(run, _nth(name, number), arm, objective, refs, trained, plan, extra)


def _train(
    run: Run, name: str, stage: config.StageConfig, objective: objectives.Objective,
    refs: Mapping[str, ModelRef], trained: tuple[str, ...], plan: data.Plan, extra: Mapping[str, Any] = {},
) -> ModelRef:  # fmt: skip
    """Carry out one training stage and return the strong role it ends with."""
    recipe, m = run.recipe, run.recipe.model
    lineage = {role: ref.digest for role, ref in refs.items()}
    inputs = {
        "stage": stage.model_dump(include={"epochs", "steps"}),
        "optimizer": (stage.optimizer or recipe.optimizer).model_dump(),
        "objective": repr(objective),
        "trained": list(trained),
        "roles": lineage,
        "data": run.dataset.fingerprint,
        "loss_on": stage.loss_on or recipe.dataset.loss_on,
        "batch": [recipe.dataset.batch_size, recipe.dataset.seq_len, recipe.train.micro_batches],
        "dtypes": [m.param_dtype, m.compute_dtype],
        "seed": recipe.seed,
        "keep_best": recipe.eval.keep_best,
        **extra,
    }
    job = train.Job(
        directory=run.work / name,
        models={role: ref.model for role, ref in refs.items()},
        trained=lambda: {role: refs[role].load(run.mesh, m.param_dtype)[1] for role in trained},
        frozen=lambda: {role: ref.load(run.mesh)[1] for role, ref in refs.items() if role not in trained},
        trained_roles=trained,
        param_dtype=m.param_dtype,
        objective=objective,
        optimizer=stage.optimizer or recipe.optimizer,
        dataset=run.dataset,
        plan=plan,
        loss_on=stage.loss_on or recipe.dataset.loss_on,
        loop=recipe.train,
        seed=recipe.seed,
        mesh=run.mesh,
        meta={
            "recipe": recipe.model_dump(mode="json"),
            "stage": name,
            "lineage": {**lineage, **extra, "objective": repr(objective)},
        },
        assets=run.work / "assets",
        held_out=_held_out(run, stage, plan),
    )
    output = run.stage(name, inputs, lambda: {"checkpoint": train.train(job).relative_to(run.work).as_posix()})
    settings = next(iter(refs.values())).settings
    return ModelRef(run.work / output["checkpoint"], "strong", settings)


def _plan(run: Run, name: str, stage: config.StageConfig, probs: np.ndarray | None = None) -> data.Plan:
    c, d = run.recipe.curriculum, run.recipe.dataset
    return data.plan(
        run.dataset.lengths, seq_len=d.seq_len, batch_size=d.batch_size,
        seed=zlib.crc32(f"{run.recipe.seed} {name}".encode()), epochs=stage.epochs, steps=stage.steps,
        probs=probs, dedup=c.dedup, multiplier=c.multiplier,
    )  # fmt: skip


def _held_out(run: Run, stage: config.StageConfig, plan: data.Plan) -> train.HeldOut | None:
    if run.held_out is None:
        return None
    d, evaluation = run.recipe.dataset, run.recipe.eval
    rows = data.plan(run.held_out.lengths, seq_len=d.seq_len, batch_size=d.batch_size, seed=0, epochs=1)
    every = stage.eval_every_steps or evaluation.every_steps or plan.total_steps
    return train.HeldOut(run.held_out, rows, every, evaluation.keep_best)


def _objective(arm: config.JointConfig, name: str) -> objectives.Objective:
    where = "joint.objective" if name == "joint" else f"controls.{name}.objective"
    return config.build(objectives.OBJECTIVES, arm.objective.model_dump(), where)


def _nth(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


# -- scores and curriculum ------------------------------------------------------------------------------------------


def scores(run: Run, ref: ModelRef) -> scoring.Scores:
    """Return the scores of all examples under a model; made once per model."""
    recipe, digest = run.recipe, ref.digest
    path = run.work / "scores" / f"{digest}.parquet"

    def work() -> dict[str, Any]:
        scoring.write(path, _score(run, ref), run.dataset, digest, recipe.score.shifted)
        return {"scores": path.relative_to(run.work).as_posix(), "model": str(ref.directory)}

    inputs = {"model": digest, "data": run.dataset.fingerprint, "shifted": recipe.score.shifted}
    return scoring.read(run.work / run.stage(f"score-{digest}", inputs, work)["scores"], run.dataset)


def _score(run: Run, ref: ModelRef) -> scoring.Scores:
    model, params = ref.load(run.mesh)
    recipe, d = run.recipe, run.recipe.dataset
    rows = recipe.score.batch_size or d.batch_size // recipe.train.micro_batches
    return scoring.score(
        model, params, run.dataset, seq_len=d.seq_len, batch_size=rows, shifted=recipe.score.shifted,
        mesh=run.mesh, chunk_tokens=recipe.train.head_chunk_tokens,
    )  # fmt: skip


def _curriculum(run: Run, number: int, weak: ModelRef, strong: ModelRef) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the sampling probabilities of a round, and their report; stop where they would leave a handful."""
    c = run.recipe.curriculum
    found = {"weak": scores(run, weak), "strong": scores(run, strong)}
    parts = curriculum.terms(
        found["weak"].entropy, found["strong"].entropy, c.alpha, c.beta, c.gamma, c.variant, c.normalize_terms,
        c.uniform_share,
    )  # fmt: skip
    probs = np.sum(list(parts.values()), axis=0)
    share = curriculum.effective_share(probs)
    report = {
        "effective_share": share,
        "effective_examples": share * len(probs),
        "term_shares": curriculum.term_shares(parts),
        **{f"entropy_{role}": _quantiles(s.entropy) for role, s in found.items()},
        "entropy_fell_on": float(np.mean(found["strong"].entropy < found["weak"].entropy)),
    }
    path = run.work / "curriculum" / f"round-{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    np.save(path.with_suffix(".npy"), probs)
    if share < c.min_effective_share:
        raise ValueError(
            f"the curriculum collapses: its effective sample size is {share * len(probs):.0f} of {len(probs)} examples "
            f"({share:.1%}, curriculum.min_effective_share is {c.min_effective_share:.1%}). Entropy fell on "
            f"{report['entropy_fell_on']:.1%} of the examples only, so the weight on its fall goes to a few: a weak "
            f"agent that is confidently wrong does this. Mix with uniform draws (curriculum.uniform_share=0.5), lower "
            f"curriculum.beta, or lower curriculum.min_effective_share to go on as it is. Report: {path}"
        )
    run.say(f"curriculum: effective sample size {share:.1%}, shares {_percent(report['term_shares'])}")
    return probs, report


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{q:.0%}": float(np.quantile(values, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


# -- export and evaluation ------------------------------------------------------------------------------------------


def _export(run: Run, ref: ModelRef, objective: objectives.Objective) -> str:
    """Write the shipped model as a Hugging Face directory and return where it lies."""
    calibrate, out = run.recipe.export.calibrate, run.work / "export"
    lam = getattr(objective, "lam", None)
    if calibrate == "lambda" and lam is None:
        raise ValueError(f"export.calibrate: lambda needs a joint.objective with lam; {objective} has none")

    def work() -> dict[str, Any]:
        model, params = ref.load(run.mesh)
        if calibrate == "lambda":
            last = checkpoint.read_meta(ref.directory)["step"]
            params = scale_logits(model, params, float(objectives.at(lam, np.int32(last))))
        if not out.exists():
            hf.save(model, params, out, tokenizer_from=ref.assets)
        return {"export": str(out)}

    return run.stage("export", {"model": ref.digest, "calibrate": calibrate, "lam": repr(lam)}, work)["export"]


def scale_logits(model: CausalLM, params: PyTree[Array], factor: float) -> PyTree[Array]:
    """Return parameters whose logits are `factor` times those of `params`: the factor goes into the final norm.

    A branch trained under λ-mixed logits is over-confident by 1/λ by itself; λ makes sampling at temperature 1 fit
    again, and greedy decoding stays the same. The final norm, because it is linear in its scale and is there in tied
    and untied models alike.
    """
    del model  # every family so far ends in a norm that multiplies by its scale
    final_norm = {"scale": (params["final_norm"]["scale"] * factor).astype(params["final_norm"]["scale"].dtype)}
    return {**params, "final_norm": final_norm}


def _evaluate(run: Run, refs: Mapping[str, ModelRef]) -> dict[str, dict[str, Any]]:
    """Return {model: {task: {accuracy, standard_error, n}}} of M0, M1 and what every arm ends with."""
    figures: dict[str, dict[str, Any]] = {name: {} for name in refs}
    stops = {encoding.stop_token(run.tokenizer, chat_template=run.recipe.dataset.chat_template)}
    for task_name, task in run.recipe.eval.tasks.items():
        items = _items(run, task)
        for name, ref in refs.items():
            path = run.work / "eval" / f"{name}-{task_name}.jsonl"

            def work(ref: ModelRef = ref, path: Path = path) -> dict[str, Any]:
                model, params = ref.load(run.mesh)
                result = evaluate(
                    model, params, run.tokenizer, items, GRADERS[task.grader], max_new_tokens=task.max_new_tokens,
                    stop_ids=stops, mesh=run.mesh, batch_size=task.batch_size,
                )  # fmt: skip
                path.parent.mkdir(parents=True, exist_ok=True)
                result.write_jsonl(path)
                return {"accuracy": result.accuracy, "standard_error": result.standard_error, "n": result.n}

            digest = f"{zlib.crc32(repr(items).encode()):08x}"
            inputs = {
                "model": ref.digest,
                "task": task.model_dump(mode="json", exclude={"batch_size"}),
                "items": digest,
            }
            figures[name][task_name] = run.stage(f"eval-{name}-{task_name}", inputs, work)
    return figures


def _items(run: Run, task: config.TaskConfig) -> list[Item]:
    """Return a task's questions, each rendered exactly as a training prompt would be."""
    d = run.recipe.dataset
    problems = itertools.islice(examples.problems(task.source, run.recipe.data), task.limit)
    render = functools.partial(
        encoding.prompt_tokens, tokenizer=run.tokenizer, chat_template=d.chat_template, system_prompt=d.system_prompt
    )
    return [Item(render(problem.prompt).tolist(), problem.prompt, problem.answer) for problem in problems]


# -- what the commands call -----------------------------------------------------------------------------------------


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary's accuracies as a text table, one line a model: percent ± standard error."""
    figures = summary.get("eval", {})
    tasks = list(dict.fromkeys(task for row in figures.values() for task in row))
    width = max((len(name) for name in figures), default=0)
    lines = [" " * width + "".join(f"  {task:>16}" for task in tasks)] if tasks else []
    for name, row in figures.items():
        cells = [f"{100 * row[t]['accuracy']:.1f} ± {100 * row[t]['standard_error']:.1f} %" for t in tasks]
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>16}" for cell in cells))
    return "\n".join([*lines, f"exported model: {summary['export']}"])


def score_model(recipe: config.RunConfig, model: str, out: Path) -> None:
    """Write the scores of a recipe's examples under any model to `out`.

    Raises:
        FileExistsError: `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out}: exists already; choose another file or remove it")
    run = prepare(recipe)
    scored = ref(run, model)
    scoring.write(out, _score(run, scored), run.dataset, scored.digest, recipe.score.shifted)


def ref(run: Run, model: str) -> ModelRef:
    """Return a reference to a Hugging Face directory, a hub id, or the strong role of a checkpoint."""
    is_checkpoint = (Path(model) / checkpoint.META).exists()
    return ModelRef(hf.resolve(model), "strong" if is_checkpoint else None, _settings(run.recipe))


def inspect(recipe: config.RunConfig, show: int) -> None:
    """Print examples, sizes, lengths and the plan of the joint stage; with its curriculum where that was computed."""
    run, console = prepare(recipe), Console()
    inspection.show(run.dataset, run.tokenizer, range(min(show, len(run.dataset))), recipe.dataset.loss_on, console)
    report, probs = run.work / "curriculum/round-1.json", run.work / "curriculum/round-1.npy"
    known = report.exists() and probs.exists()
    probs = np.load(probs) if known else None
    shares = json.loads(report.read_text())["term_shares"] if known else None
    plan = _plan(run, "joint", recipe.joint, probs if recipe.joint.resample else None)
    console.print(inspection.summary(run.dataset, plan, probs, shares), markup=False, highlight=False)
