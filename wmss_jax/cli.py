"""The command line: `wmss COMMAND`. Every command parses, calls and prints; the work is elsewhere.

Modules are imported inside the commands, so that `wmss --help` needs neither jax nor pydantic.
Exit codes: 0 done; 1 a crash, with a traceback; 2 the user's mistake; 75 saved, start me again.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

# Plain text, because help and errors are also read in the logs of a pod; rich costs start-up time.
_PLAIN = {"rich_markup_mode": None, "no_args_is_help": True}
app = typer.Typer(
    **_PLAIN,
    help="Weak-driven learning (WMSS) for language models.",
    add_completion=False,
    pretty_exceptions_enable=False,  # typer would print its own traceback before `main` sees it
)
convert_app = typer.Typer(**_PLAIN, help="Checkpoints from and to the Hugging Face format.")
app.add_typer(convert_app, name="convert")
data_app = typer.Typer(**_PLAIN, help="Training data.")
app.add_typer(data_app, name="data")


def _print_version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"wmss-jax {version('wmss-jax')}")
        raise typer.Exit()
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    del version  # its callback has run


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for an editor to complete and check it."""
    from wmss_jax.config import json_schema
    from wmss_jax.objectives import OBJECTIVES

    typer.echo(json.dumps(json_schema({"objective": OBJECTIVES}), indent=2))


def _join(end: str = "\n") -> Callable[[str], None]:
    """Join the other processes of this run, if it has several; return what prints a line, on the first of them."""
    from wmss_jax import processes

    processes.start()
    return (lambda line: print(line, end=end, flush=True)) if processes.first() else lambda line: None


Recipe = Annotated[Path, typer.Argument(help="Recipe, a YAML file (see `wmss schema`).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value, the value in YAML.", metavar="KEY=VALUE")]


@app.command()
def run(recipe: Recipe, overrides: Overrides = None) -> None:
    """Carry a recipe out: (pre-training,) SFT, scores, curriculum, joint training, export, evaluation."""
    from wmss_jax import config, pipeline

    loaded = config.load(recipe, overrides or ())
    say = _join()
    say(pipeline.table(pipeline.run(loaded, say=say)))


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    stage: Annotated[str, typer.Option(help="pretrain, sft, joint, or the name of a control.")] = "sft",
) -> None:
    """Carry a recipe out up to one training stage, and print where its checkpoint lies."""
    from wmss_jax import config, pipeline

    loaded = config.load(recipe, overrides or ())
    say = _join()
    summary = pipeline.run(loaded, until=stage, say=say)
    say(list(summary["models"].values())[-1])


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, hub id, or checkpoint.")],
    recipe: Recipe,
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    overrides: Overrides = None,
    cache_hidden: Annotated[
        Path | None, typer.Option(help="Write the model's final hidden states here, for joint.weak.cache.")
    ] = None,
) -> None:
    """Score the recipe's training examples under any model: entropy, nll, margin and token count of each."""
    from wmss_jax import config, pipeline

    loaded = config.load(recipe, overrides or ())
    say = _join()
    pipeline.score_model(loaded, model, out, cache_hidden, say=say)
    say(f"wrote {out}")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, hub id, or checkpoint.")],
    prompt: Annotated[str | None, typer.Option(help="Text to answer; the answer is printed as it is made.")] = None,
    file: Annotated[Path | None, typer.Option(help="JSONL of prompts; answers are printed as JSONL.")] = None,
    template: Annotated[str, typer.Option(help="What of a row of the file is its prompt.")] = "{prompt}",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest, up to this probability.")] = None,
    samples: Annotated[int, typer.Option(help="Answers to each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the draws; each prompt's number is added.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="First message of the chat.")] = None,
    chat_template: Annotated[bool | None, typer.Option(help="Default: if the tokenizer has one.")] = None,
    batch_size: Annotated[int, typer.Option(help="Answers at once.")] = 64,
) -> None:
    """Print a model's answers to a prompt or to those of a file."""
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give one of --prompt and --file")
    from wmss_jax import answers, sampling

    say = _join(end="")
    how = sampling.Sampling(temperature, top_k, top_p, samples)
    settings = answers.Settings(
        how, max_new_tokens, seed, tuple(stop or ()), chat_template, system_prompt, batch_size
    )  # fmt: skip
    if file is None:
        answers.print_while_made(answers.Answerer(model, settings), prompt or "", say)
        return
    prompts = answers.read_prompts(file, template)
    for line in answers.json_lines(answers.Answerer(model, settings), prompts):
        say(f"{line}\n")


@app.command()
def inspect(
    recipe: Recipe,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(help="Examples to print.")] = 3,
) -> None:
    """Show what a recipe trains on: examples with their trained tokens, lengths, duplicates, the curriculum."""
    from wmss_jax import config, pipeline

    pipeline.inspect(config.load(recipe, overrides or ()), show)


@app.command("eval")
def eval_(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, hub id, or checkpoint.")],
    task: Annotated[
        list[str], typer.Option(help="gsm8k, humaneval, ..., reasoning_gym:NAME or FILE.jsonl; repeat it.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for answers and figures; the same command goes on there.")],
    data: Annotated[Path | None, typer.Option(help="Directory with local copies of the data sets.")] = None,
    protocol: Annotated[Literal["plain", "paper_v2", "paper_v1"], typer.Option(help="How to ask.")] = "plain",
    samples: Annotated[int | None, typer.Option(help="Answers to each question.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the most likely token each time.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most likely tokens of this share.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of draws, and of procedural problems.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions from the start.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Instead of the protocol's or the task's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions side by side.")] = 64,
    grader: Annotated[str | None, typer.Option(help="exact, numeric, equation, letter or math.")] = None,
    chat: Annotated[bool | None, typer.Option(help="Ask through the chat template. Default: if there is one.")] = None,
    unsafe_no_sandbox: Annotated[bool, typer.Option(help="Run generated programs as yourself.")] = False,
) -> None:
    """Ask a model the questions of benchmarks and grade its answers."""
    from wmss_jax.evals import catalog, command

    given = {"samples": samples, "temperature": temperature, "top_p": top_p, "seed": seed}
    asking = catalog.protocol(protocol, **given)
    request = command.Request(
        model, tuple(task), out, asking, data, limit, batch_size, max_new_tokens, grader, chat, unsafe_no_sandbox
    )
    say = _join()
    say(command.table(command.evaluate(request, say)))


@app.command("eval-compare")
def eval_compare(
    a: Annotated[Path, typer.Argument(help="Directory that `wmss eval` wrote.")],
    b: Annotated[Path, typer.Argument(help="That of another model.")],
) -> None:
    """Compare two models on the same questions: the difference, its interval, and McNemar's test."""
    from wmss_jax.evals import command

    typer.echo(command.difference_table(command.compare(a, b)))


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="Recipe, or a model's config.json or directory.", metavar="CONFIG")],
    overrides: Overrides = None,
    topology: Annotated[
        str, typer.Option(help="v5p:4x4x4 (v5e, v6e, tpu7x) or h100:1x4x8 (a100-80, h200, b200).")
    ] = ...,  # pyright: ignore[reportArgumentType]  (required)
    step: Annotated[Literal["sft", "joint", "score"], typer.Option(help="Which of the recipe's steps.")] = "joint",
    search: Annotated[
        bool, typer.Option("--search", help="Try other meshes, remat policies and micro-batches; rank what fits.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a plan.")] = False,
) -> None:
    """Compile a step for accelerators that are not there: does it fit, what does it send, how fast can it be?

    Exit code 1 if it does not fit.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # an accelerator of this host may be in use, and is not needed
    from wmss_jax import plan as planning
    from wmss_jax import plan_search, topologies

    devices = topologies.devices(topology)
    recipe = planning.recipe(model, devices, overrides or ())
    if search:
        plans = plan_search.search(recipe, step, topology, devices, say=lambda line: typer.echo(line, err=True))
        typer.echo("\n".join(json.dumps(p.as_json()) for p in plans) if as_json else plan_search.table(plans))
        fits = bool(plans)
    else:
        try:
            found = planning.measure(recipe, step, topology, devices)
        except planning.OutOfMemory as error:
            said = {"topology": topology, "step": step, "fits": False, "reason": str(error)}
            typer.echo(json.dumps(said) if as_json else f"{step} step on {topology}: {error}")
            raise typer.Exit(1) from None
        typer.echo(json.dumps(found.as_json()) if as_json else found.text())
        fits = found.fits
    raise typer.Exit(0 if fits else 1)


@app.command()
def demo(work_dir: Annotated[Path, typer.Argument(help="Where it writes.")] = Path("runs/demo")) -> None:
    """Train, score, mix, export and evaluate a tiny model on additions, in about five minutes on two cores."""
    from wmss_jax import demo

    raise typer.Exit(demo.main(work_dir))


@app.command()
def lab(
    study: Annotated[Path, typer.Argument(help="Study, a YAML file (see configs/lab).")],
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
) -> None:
    """Compare arms over paired seeds at equal steps, each at its best learning rate, with intervals.

    Exit code 1 if a run failed. The same command goes on where it was stopped.
    """
    from wmss_jax.lab import run
    from wmss_jax.lab import study as studies

    raise typer.Exit(run.main(studies.load(study, overrides or ()), workers, say=typer.echo))


@data_app.callback()
def _data() -> None:
    """Training data."""


@data_app.command()
def prepare(
    pool: Annotated[Literal["am-math", "am-code", "logic"], typer.Argument(help="Which of the paper's pools.")],
    out: Annotated[Path, typer.Argument(help="JSONL file to write.")],
    source: Annotated[list[str], typer.Option(help="File or hub id of the corpus; repeat it.")],
    held_out: Annotated[list[str] | None, typer.Option(help="Questions that must not be in it (logic).")] = None,
    split: Annotated[str | None, typer.Option(help="Of hub data sets.")] = None,
    subset: Annotated[str | None, typer.Option(help="Of hub data sets that have several.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows from the start of each source.")] = None,
    unsafe_no_sandbox: Annotated[bool, typer.Option(help="Run its programs as yourself (am-code).")] = False,
) -> None:
    """Rebuild a training pool of the paper by its filters; tells what was dropped and why."""
    from wmss_jax import pools
    from wmss_jax.sources import SourceConfig

    sources = [SourceConfig(path=path, split=split, subset=subset, limit=limit) for path in source]
    apart = [SourceConfig(path=path) for path in held_out or ()]
    typer.echo(pools.table(pools.prepare(pool, sources, out, held_out=apart, unsafe_no_sandbox=unsafe_no_sandbox)))


@convert_app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="Hugging Face directory or hub id.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint directory to write.")],
    dtype: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="Default: the source's own.")] = None,
) -> None:
    """Turn a Hugging Face model into a checkpoint."""
    from wmss_jax import convert

    say = _join()
    convert.import_(source, out, dtype=dtype)
    say(f"wrote {out}")


@convert_app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory, here or gs://BUCKET/NAME.")],
    out: Annotated[Path, typer.Argument(help="Hugging Face directory to write.")],
    role: Annotated[str, typer.Option(help="Which of the checkpoint's models.")] = "strong",
) -> None:
    """Turn one role of a checkpoint into a Hugging Face model."""
    from wmss_jax import convert

    say = _join()
    convert.export(checkpoint, out, role=role)
    say(f"wrote {out}")


@convert_app.command()
def check(
    directory: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
) -> None:
    """Print one verdict a line on a converted model; exit 2 if any is bad."""
    from wmss_jax import convert

    failed = False
    for verdict, ok in convert.check(directory):
        typer.echo(verdict)
        failed |= not ok
    if failed:
        raise typer.Exit(2)


def main() -> None:
    """Runs the command line and ends the process with its exit code.

    WMSS_DEBUG=1 shows the traceback of the user's mistakes, too.
    """
    try:
        app(prog_name="wmss")
    except SystemExit as exit_:
        if message := getattr(exit_, "message", None):  # preemption.Preempted, which is not imported here
            print(f"wmss: {message}", file=sys.stderr)
        raise
    except Exception as error:
        if not _is_mistake(error):
            raise
        if os.environ.get("WMSS_DEBUG") == "1":
            traceback.print_exc()
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename is not None:
            message = f"{error.filename}: {error.strerror}"  # without "[Errno 2]"
        for line in message.splitlines():
            print(f"wmss: error: {line}", file=sys.stderr)
        sys.exit(2)


def _is_mistake(error: Exception) -> bool:
    """Whether the user can mend it, which its message then says; all else is a crash.

    That is a path that is missing, taken, of the wrong kind or closed to us, wherever it was met;
    and a ValueError that this package itself raised, told by the innermost frame: one out of jax
    or numpy is a bug of ours. A TypeError is a wrong call, hence always a bug. A full disk or a
    broken network (other OSErrors) is no mistake.
    """
    paths = FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError
    if isinstance(error, paths | PermissionError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    raised_in = frame.f_globals.get("__name__", "")
    return isinstance(error, ValueError) and raised_in.partition(".")[0] == "wmss_jax"
