"""Every kind of accelerator with every attention that it can run, compiled by its own compiler; `wmss plan` as called.

Without the compilers (extras plan-tpu, plan-cuda) these tests are skipped.
"""

import json
import subprocess
import sys

import plans
import pytest

from wmss_jax import cli, plan_search
from wmss_jax import plan as planning

pytestmark = pytest.mark.filterwarnings(plans.TRITON_IS_DEPRECATED)

CALLS = {"splash": 'custom_call_target="tpu_custom_call"', "triton": 'custom_call_target="__gpu$xla.gpu.triton"'}
# The triton kernels in an H100's train step: test_plan_quality.py.
TARGETS = [
    ("v5e:2x2", "sft", "splash"), ("v5e:2x2", "sft", "blockwise"), ("v5p:2x2x1", "sft", "splash"),
    ("v6e:2x2", "sft", "splash"), ("tpu7x:2x2x1", "sft", "splash"), ("a100-80:1x1x2", "sft", "triton"),
    ("h100:1x1x2", "sft", "blockwise"), ("h200:1x1x2", "score", "triton"), ("b200:1x1x2", "sft", "triton"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("topology, step, attention", TARGETS)
def test_steps_compile_with_every_attention(topology, step, attention):
    wanted = () if attention != "blockwise" else ("model.attention=blockwise",)
    compiled, plan = plans.planned(topology, step, *plans.FEW_TOKENS, *wanted)
    assert (plan.attention, plan.fits) == (attention, True)
    assert {name: call in compiled.text for name, call in CALLS.items()} == {name: name == attention for name in CALLS}
    assert plan.seconds["network"] > 0 and plan.memory["temporaries"] > 0


@pytest.fixture
def wmss(monkeypatch, capfd, tmp_path):
    """Runs `wmss plan MODEL ARGUMENTS` in this process: (exit code, output, errors)."""

    def call(*arguments, **changes):
        plans.need_compiler(arguments[1])
        model = plans.write(tmp_path, **changes)
        monkeypatch.setattr(sys, "argv", ["wmss", "plan", str(model), *arguments])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer replaces it
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capfd.readouterr()

    return call


@pytest.mark.slow
def test_the_search_ranks_what_it_compiled(wmss, monkeypatch):
    made, measure = {}, planning.measure

    def once(recipe, *others):  # for both of the calls below
        key = (recipe.mesh, recipe.dataset.batch_size)
        made[key] = made.get(key) or measure(recipe, *others)
        return made[key]

    monkeypatch.setattr(planning, "measure", once)
    monkeypatch.setattr(plan_search, "MOST_ROWS", 1)
    arguments = ("--topology", "h100:1x1x2", "--step=score", "--search", "dataset.seq_len=128")
    code, lines, said = wmss(*arguments, "--json")
    found = [json.loads(line) for line in lines.splitlines()]
    assert code == 0 and said.count("tokens/s at most") == 3
    assert sorted(tuple(each["mesh"].values()) for each in found) == [(1, 1, 2), (1, 2, 1), (2, 1, 1)]
    speeds = [each["tokens_per_s"] for each in found]
    assert speeds == sorted(speeds, reverse=True)
    code, table, _ = wmss(*arguments)
    assert code == 0 and [line.split()[:3] for line in table.splitlines()[1:]] == [
        [str(size) for size in each["mesh"].values()] for each in found
    ]


@pytest.mark.slow
def test_plans_at_the_same_time_do_not_collide(tmp_path):
    plans.need_compiler("v5e:2x2")
    model = plans.write(tmp_path)
    command = [sys.executable, "-m", "wmss_jax", "plan", str(model), "--topology", "v5e:2x2", "--step", "score",
               "dataset.seq_len=128"]  # fmt: skip
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.startswith("score step on v5e:2x2: 4 × TPU v5 lite") and "fits" in out


def test_what_a_tpu_cannot_hold_is_exit_1_and_a_few_lines(wmss):
    code, out, err = wmss(
        "--topology", "v5e:1x1", "--step=score", "dataset.seq_len=128", vocab_size=2_000_000, hidden_size=4096
    )
    first, head, *arrays = out.splitlines()
    assert (code, err, head, len(arrays)) == (1, "", "largest arrays, GB", 5)
    assert first.startswith("score step on v5e:1x1: does not fit: Ran out of memory") and "(15.75G)" in first
    assert [line.split()[0] for line in arrays[:2]] == ["16.384", "16.384"]
    assert {line.split()[-1] for line in arrays[:2]} == {"parameters.embed", "parameters.unembed"}


MISTAKES = {
    "v5p:2x2x1": ("triton", "triton cannot run on TPU v5 (tpu); leave it out there, or choose splash or blockwise"),
    "h100:1x1x8": (
        "splash",
        "splash cannot run on NVIDIA H100 80GB HBM3 (gpu); leave it out there, or choose triton or blockwise",
    ),
}


@pytest.mark.parametrize("topology", MISTAKES)
def test_attention_that_the_devices_do_not_have(wmss, topology):
    backend, message = MISTAKES[topology]
    found = wmss("--topology", topology, f"model.attention={backend}")
    assert found == (2, "", f"wmss: error: attention: {message}\n")
