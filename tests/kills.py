"""A recipe killed at chosen moments: `wmss` in forks of one process that has imported everything already."""

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import recipes

from wmss_jax import storage

SAVE, CHANGE, FIRST = "inside a save", "in a change of stages", "before the first checkpoint"


class Event(NamedTuple):
    """When a process is to send itself a signal.

    Moments: "sft step 3" (amid it), "sft save 4" (Orbax has begun to write), "sft digest 4" (Orbax has written, the
    checkpoint has no name yet), "remove sft/checkpoints/2" (an object of it, in a bucket), "sft begun" and "sft done"
    (the stage's record is about to be written), "scores", "export", "answers" (a batch is graded, not written).
    """

    moment: str
    nth: int = 1  # its n-th time in the process
    delay_s: float = 0.0
    number: int = signal.SIGKILL


class Outcome(NamedTuple):
    event: Event
    code: int
    phase: str  # in which the signal came, as the process itself saw it: FIRST, "sft inside a save", ...
    said: str


# A fork for each line of input: the event, and where what it prints and its phase are to go.
FORKS = """
import collections, json, os, signal, sys, threading
import grain, transformers
from wmss_jax import checkpoint, cli, digests, scoring, stages, storage, tensorfile, train
from wmss_jax.evals import run, tasks
import kills

def main(event, output, command):
    moment, nth, delay_s, number = event
    signal.alarm(300)  # a fork that hangs is an error, not a test that never ends
    counts, phase = collections.Counter(), ["start-up"]

    def strike():
        with open(output + ".phase", "w") as out:
            out.write(phase[0])
        os.kill(os.getpid(), number)

    def happens(name):
        counts[name] += 1
        if (name, counts[name]) == (moment, nth):
            if not delay_s:
                strike()
            else:
                threading.Timer(delay_s, strike).start()

    def around(owner, name, describe, inside=None, after=None):
        original = getattr(owner, name)
        def patched(*args, **kwargs):
            if inside is not None:
                phase[0] = inside(*args)
            happens(describe(*args))
            result = original(*args, **kwargs)
            if after is not None:
                phase[0] = after(*args)
            return result
        setattr(owner, name, patched)

    begin = checkpoint._begin
    def begun(orbax, final, *rest):
        stage = final.parent.parent.name
        phase[0] = f"{stage}: {kills.SAVE}"
        partial = begin(orbax, final, *rest)
        happens(f"{stage} save {final.name}")
        return partial
    checkpoint._begin = begun
    stage_of = lambda partial: partial.parent.parent.name
    around(checkpoint, "_finish", lambda *_: "finish", after=lambda _, partial, final: f"{stage_of(final)}: training")

    def stepping(reporter, *_):
        stage = reporter._job.directory
        if phase[0].endswith(kills.SAVE):  # written in the background while steps go on
            return phase[0]
        saved = checkpoint.steps(train.checkpoints(stage, reporter._job.loop))
        return f"{stage.name}: " + ("training" if saved else kills.FIRST)
    around(train._Reporter, "__call__", lambda self, step, *_: f"{self._job.directory.name} step {step}", stepping)
    around(digests, "write", lambda directory: f"{stage_of(directory)} digest {directory.name.split('.')[0]}")
    around(storage.GcsPath, "unlink", lambda path: "remove " + "/".join(path.key.split("/")[1:4]))
    around(stages, "_write", lambda file, content: f"{file.stem} {'begun' if content['output'] is None else 'done'}",
           lambda file, _: f"{file.stem}: {kills.CHANGE}")
    around(scoring, "write", lambda *_: "scores", lambda *_: "scoring")
    around(tensorfile, "write", lambda *_: "export", lambda *_: "exporting")
    around(run, "_append", lambda *_: "answers", lambda *_: "evaluating")

    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1), os.dup2(stream, 2)
    sys.argv = ["wmss", *command]
    cli.main()

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            main(*json.loads(line))
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        except BaseException:
            __import__("traceback").print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

NEVER = Event("never")


class Forks:
    """Runs `wmss run recipe.yaml` in `root` again and again, each time until its event or its end."""

    def __init__(self, process: subprocess.Popen, root: Path, command: Sequence[str]):
        self._process, self._output, self._command = process, root / "output", command

    def run(self, event: Event = NEVER, *overrides: str) -> Outcome:
        assert self._process.stdin and self._process.stdout
        phase = self._output.with_name("output.phase")
        phase.unlink(missing_ok=True)
        print(json.dumps([event, str(self._output), [*self._command, *overrides]]), file=self._process.stdin)
        code = int(self._process.stdout.readline())
        return Outcome(event, code, phase.read_text() if phase.exists() else "", self._output.read_text())


@contextlib.contextmanager
def forks(root: Path, environment: dict[str, str], command: Sequence[str] = ("run", "recipe.yaml")) -> Iterator[Forks]:
    tests = str(Path(__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", f"import sys; sys.path.append({tests!r})\n{FORKS}"],
        cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, bufsize=1,
    ) as process:  # fmt: skip
        yield Forks(process, root, command)


def assert_same_run(got: Path, wanted: Path, *, same_recipe: bool = True) -> None:
    """Bitwise: the exported model, every training stage's last state, its metrics; and the answers.

    Args:
        same_recipe: False where the two were told to keep, or to go on from, other checkpoints. The recipe, and the
            card, which has its digest, are then left out.
    """
    of_the_recipe = () if same_recipe else ("README.md", "wmss_recipe.yaml")
    for name in {path.name for path in (wanted / "export").iterdir()}.difference(of_the_recipe):
        mine, theirs = ((run / "export" / name).read_bytes() for run in (got, wanted))
        if name == "README.md":  # Orbax names its files at random, so two checkpoints of equal arrays differ in digest
            mine, theirs = (re.sub(rb"(checkpoint|fine-tuning) \(digest \w+\)", b"", text) for text in (mine, theirs))
        assert mine == theirs, name
    for stage, steps in recipes.STEPS.items():
        assert_same_state(got / stage / f"checkpoints/{steps}", wanted / stage / f"checkpoints/{steps}")
        assert losses(got / stage) == losses(wanted / stage)
    for file in (wanted / "eval").iterdir():
        assert (got / "eval" / file.name).read_bytes() == file.read_bytes()


def assert_same_state(got: storage.Name, wanted: Path) -> None:
    """Bitwise: all arrays of two checkpoints."""
    mine, theirs = arrays(got), arrays(wanted)
    assert mine.keys() == theirs.keys() and len(theirs) > 30
    for name, array in theirs.items():
        np.testing.assert_array_equal(mine[name], array, err_msg=f"{got} {name}")


def arrays(directory: storage.Name) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, optimizer state included, by name."""
    import orbax.checkpoint as ocp

    directory, orbax = str(storage.absolute(directory) / "state"), ocp.PyTreeCheckpointer()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), orbax.metadata(directory).item_metadata)
    tree = orbax.restore(directory, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def losses(stage: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("held_out_loss")) for line in lines]
