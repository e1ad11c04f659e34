"""plan.py, plan_search.py and `wmss plan` on simulated devices, where no compiler but the CPU's is needed."""

import functools
import json
import sys

import jax
import plans
import pytest
import recipes

from wmss_jax import cli, hardware, plan, plan_search, programs, topologies
from wmss_jax.models import ARCHS

MESH = ("mesh.fsdp=4", "mesh.tensor=2")


# -- plans on simulated devices -----------------------------------------------------------------------------------


@pytest.fixture
def cpus(monkeypatch):
    """Eight CPU devices as the devices of every topology, with memory and speed for a plan to work with."""
    row = lambda **facts: hardware.Accelerator(**{
        "kind": "cpu", "bf16_flops": 1e12, "memory": 16e9, "bandwidth": 1e11, "link": 1e10, **facts
    })  # fmt: skip
    monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices())
    monkeypatch.setattr(hardware, "facts", lambda kind: row())
    return lambda **facts: monkeypatch.setattr(hardware, "facts", lambda kind: row(**facts))


@pytest.fixture
def wmss(monkeypatch, capfd, tmp_path):
    """Runs `wmss plan MODEL ARGUMENTS` in this process: (exit code, output, errors)."""

    def call(*arguments, **changes):
        model = plans.write(tmp_path, num_hidden_layers=1, **changes)
        monkeypatch.setattr(sys, "argv", ["wmss", "plan", str(model), *arguments])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer replaces it
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capfd.readouterr()

    return call


SMALL = ("--topology", "v5e:2x4", "dataset.seq_len=32", *MESH)


@pytest.mark.parametrize("step_name", ["sft", "joint", "score"])
def test_a_plan_is_a_text_and_json(cpus, wmss, step_name):
    code, text, err = wmss(*SMALL, "--step", step_name)
    assert (code, err) == (0, "")
    head, rest = text.split("\n", 1)
    assert head == f"{step_name} step on v5e:2x4: 8 × cpu, mesh data 1 × fsdp 4 × tensor 2"
    assert "4 rows of 32 tokens in 1 micro-batches; remat full, attention blockwise" in rest
    assert "of 16.0: fits" in rest and "largest arrays" not in rest
    code, text, err = wmss(*SMALL, "--step", step_name, "--json")
    said = json.loads(text)
    assert (code, err, said["step"], said["fits"]) == (0, "", step_name, True)
    assert said["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert said["total"] == sum(said["memory"].values()) and said["tokens_per_s"] > 0
    assert said["memory"]["parameters"] > 0 and ("optimizer" in said["memory"]) == (step_name != "score")
    assert sum(said["collectives"]["all-gather"].values()) > 0


def test_as_json_loses_nothing(cpus, tmp_path):
    devices = jax.devices()
    recipe = plan.recipe(plans.write(tmp_path, num_hidden_layers=1), devices, ["dataset.seq_len=32"])
    made = plan.measure(recipe, "score", "v5e:2x4", devices)
    said = json.loads(json.dumps(made.as_json()))
    fields = {name: said[name] for name in plan.Plan._fields}
    again = plan.Plan(**{**fields, "largest": [plan.hlo.Buffer(**buffer) for buffer in fields["largest"]]})
    assert again == made and again.text() == made.text()


def test_what_does_not_fit_is_exit_1_and_names_the_largest_arrays(cpus, wmss):
    cpus(memory=1e6)
    code, text, err = wmss(*SMALL, "--step", "score")
    assert (code, err) == (1, "") and "of 0.0: DOES NOT FIT" in text
    assert text.split("largest arrays, GB\n")[1].splitlines()[0].split()[1] == "f32[256,2048]", "the whole head"
    assert json.loads(wmss(*SMALL, "--step", "score", "--json")[1])["fits"] is False


TPU_SAID = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.38G of
15.75G hbm. Exceeded hbm capacity by 4.63G.

  Largest program allocations in hbm:

  1. Size: 4.77G
     Operator: op_name="jit(train_step)/while" source_file="x.py" source_line=1
     Shape: f32[16,4096,19531]{2,1,0:T(8,128)}
     Unpadded size: 4.77G
     ==========================

  2. Size: 512.50M
     Shape: bf16[64,4096]{1,0}
"""


@pytest.mark.parametrize(
    "said, lines",
    [
        (TPU_SAID, ["does not fit: Ran out of memory in memory space hbm",
                    "largest arrays, GB",
                    "      5.122 f32[16,4096,19531]  jit(train_step)/while",
                    "      0.537 bf16[64,4096]  "]),
        ("RESOURCE_EXHAUSTED: E1: Ran out of memory on HBM, temporaries (32.5G) exceed 15.75G. HLO module: jit_s.\nSee",
         ["does not fit: Ran out of memory on HBM, temporaries (32.5G) exceed 15.75G",
          "largest arrays, GB",
          "      0.000 bfloat16[2048, 64]  parameters.embed"]),
    ],
    ids=["named", "not named"],
)  # fmt: skip
def test_a_compiler_that_runs_out_of_memory_is_cut_short(cpus, wmss, monkeypatch, said, lines):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(said)

    real = programs.of
    function = type("Function", (), {"lower": lambda self, *call: Lowered()})()
    monkeypatch.setattr(programs, "of", lambda *arguments: real(*arguments)._replace(function=function))
    code, text, err = wmss(*SMALL, "--step", "score")
    assert (code, err) == (1, "")
    first, *rest = text.splitlines()
    assert [first.removeprefix("score step on v5e:2x4: "), *rest][: len(lines)] == lines and len(rest) <= 6
    code, text, _ = wmss(*SMALL, "--step", "score", "--json")
    assert code == 1 and json.loads(text)["fits"] is False


# -- mistakes -----------------------------------------------------------------------------------------------------

MISTAKES = {
    "devices": (
        ["mesh.fsdp=3"], {},
        "mesh data=1 × fsdp=3 × tensor=1 does not cover 8 devices; the axes must multiply to 8",
    ),
    "batch": (
        ["dataset.batch_size=12"], {},
        "dataset.batch_size: 12 rows do not split over 8 = train.micro_batches × mesh.data × mesh.fsdp; make it a "
        "multiple",
    ),
    "scored batch": (
        ["score.batch_size=12", "--step=score"], {},
        "score.batch_size: 12 rows do not split over 8 = train.micro_batches × mesh.data × mesh.fsdp; make it a "
        "multiple",
    ),
    "heads": (
        ["mesh.tensor=8"], {},
        "mesh.tensor=8 does not divide the number of kv heads (K=4); choose tensor among the divisors of 4",
    ),
    "vocabulary": (
        ["mesh.tensor=4"], {"vocab_size": 4098},
        "mesh.tensor=4 does not divide the vocabulary (V=4098); choose tensor among the divisors of 4098",
    ),
    "width": (
        [], {"hidden_size": 260},
        "mesh.fsdp=8 does not divide the model width (D=260); choose fsdp among the divisors of 260",
    ),
    "attention": (
        ["model.attention=triton"], {},
        "attention: triton cannot run on cpu (cpu); leave it out there, or choose blockwise",
    ),
    "family": (
        [], {"model_type": "mamba"},
        f"config.json: model_type 'mamba' is not implemented; implemented: {', '.join([*ARCHS, 'gemma3'])}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(cpus, wmss, name):
    arguments, changes, message = MISTAKES[name]
    code, out, err = wmss("--topology", "v5e:2x4", "dataset.seq_len=32", *arguments, **changes)
    assert (code, out, err) == (2, "", f"wmss: error: {message}\n")


def test_a_topology_that_is_none_and_a_compiler_that_is_missing(wmss, monkeypatch):
    assert wmss("--topology", "v9:2x2")[::2] == (
        2, "wmss: error: --topology: 'v9' is not known; known: v5e:8x8, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, "
        "a100-80:1x1x8, h100:1x1x8, h200:1x1x8, b200:1x1x8\n",
    )  # fmt: skip
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    assert wmss("--topology", "v5e:2x2") == (
        2, "", "wmss: error: planning for v5e:2x2 needs libtpu: pip install 'wmss-jax[plan-tpu]'\n"
    )  # fmt: skip


def test_a_config_that_is_not_there(cpus, wmss, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "write", lambda directory, **changes: directory / "none.json")
    assert wmss("--topology", "v5e:2x4") == (2, "", f"wmss: error: {tmp_path / 'none.json'}: no such file\n")


# -- recipes, and the search among them ---------------------------------------------------------------------------


def test_a_bare_model_has_one_row_a_micro_batch_and_group(tmp_path):
    file, devices = plans.write(tmp_path), jax.devices()
    rows = lambda *overrides, source=file: plan.recipe(source, devices, overrides).dataset.batch_size
    assert rows() == 8 and rows("mesh.tensor=2") == 4 and rows("mesh.tensor=2", "train.micro_batches=3") == 12
    assert rows("dataset.batch_size=64") == 64
    assert rows(source=tmp_path) == 8, "a directory with a config.json"


def test_a_recipe_is_planned_as_it_is(tmp_path):
    made = plan.recipe(recipes.write(tmp_path) / "recipe.yaml", jax.devices(), ["dataset.batch_size=32"])
    assert (made.dataset.batch_size, made.dataset.seq_len, made.optimizer.peak_lr) == (32, 32, 3e-3)


def invented(tokens_per_s, fits):
    """Return a `measure` that compiles nothing: both arguments are functions of the recipe."""

    def measure(recipe, name, topology, devices):
        mesh, d = plan.mesh_of(recipe, devices), recipe.dataset
        if plans.CONFIG["num_key_value_heads"] % mesh.shape["tensor"]:
            raise ValueError("mesh.tensor=8 does not divide K=4")
        if (size := fits(recipe)) is None:
            raise plan.OutOfMemory("much too large")
        seconds = {"compute": d.batch_size * d.seq_len / tokens_per_s(recipe), "network": 0.0}
        return plan.Plan(
            topology, name, "TPU v5", len(devices), dict(mesh.shape), d.batch_size, recipe.train.micro_batches,
            d.seq_len, recipe.model.remat, "splash", {"temporaries": size}, 100, 1.0, seconds, {}, [], 0.0,
        )  # fmt: skip

    return measure


def searched(tmp_path, monkeypatch, tokens_per_s, fits, *overrides, name="sft"):
    said, devices = [], jax.devices()
    monkeypatch.setattr(plan, "measure", invented(tokens_per_s, fits))
    recipe = plan.recipe(plans.write(tmp_path), devices, ["dataset.batch_size=48", *overrides])
    return plan_search.search(recipe, name, "v5p:2x2x2", devices, said.append), said


def test_the_search_doubles_rows_and_recomputes_more_where_they_do_not_fit(tmp_path, monkeypatch):
    shards = lambda recipe: recipe.mesh.data * recipe.mesh.fsdp
    rows = lambda recipe: recipe.dataset.batch_size // (shards(recipe) * recipe.train.micro_batches)
    cost = {"none": 60, "dots": 40, "full": 20}
    found, said = searched(
        tmp_path, monkeypatch, lambda recipe: 100 * rows(recipe) + recipe.mesh.tensor,
        lambda recipe: cost[recipe.model.remat] * rows(recipe),
    )  # fmt: skip
    of_first_mesh = [line for line in said if line.startswith("mesh 1 x 8 x 1,")]
    assert [line.split(": ")[0].split(", ", 1)[1] + f": {'GB, ' in line}" for line in of_first_mesh] == [
        "remat none, 1 rows: True", "remat none, 2 rows: False", "remat dots, 2 rows: True",
        "remat dots, 4 rows: False", "remat full, 4 rows: True", "remat full, 8 rows: False",
    ]  # fmt: skip
    assert {line.split(",")[0].split(":")[0] for line in said} == {
        f"mesh {mesh}" for mesh in ("1 x 8 x 1", "2 x 4 x 1", "4 x 2 x 1", "1 x 4 x 2", "2 x 2 x 2", "4 x 1 x 2",
                                    "1 x 2 x 4", "2 x 1 x 4", "1 x 1 x 8")
    }  # fmt: skip
    assert found == sorted(found, key=lambda each: -each.tokens_per_s) and len(found) == 3 * 8
    split = lambda each: each.mesh["data"] * each.mesh["fsdp"] * each.micro_batches
    assert all(each.rows >= 48 and each.rows % split(each) == 0 for each in found)
    lines = plan_search.table(found).splitlines()
    assert len(lines) == 25 and lines[1].split() == ["1", "2", "4", "full", "4", "x", "6", "0.0", "404", "compute"]


def test_a_search_without_a_fit(tmp_path, monkeypatch):
    found, said = searched(tmp_path, monkeypatch, lambda recipe: 1, lambda recipe: None, name="score")
    assert found == [] and plan_search.table(found).startswith("nothing fits: ")
    assert "mesh 1 x 8 x 1, remat full, 1 rows: does not fit" in said
    assert said[-1] == "mesh 1 x 1 x 8: mesh.tensor=8 does not divide K=4", "once, not for every policy"


def test_a_search_in_which_every_mesh_is_refused_is_a_mistake(cpus, wmss):
    code, out, err = wmss("--topology", "v5e:2x4", "--search", "model.attention=splash")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == (
        "wmss: error: attention: splash cannot run on cpu (cpu); leave it out there, or choose blockwise"
    )


def test_the_search_of_the_command_line(cpus, wmss, tmp_path, monkeypatch):
    fits = lambda recipe: 10 if recipe.mesh.fsdp == 4 and recipe.model.remat == "full" else None
    monkeypatch.setattr(plan, "measure", invented(lambda recipe: recipe.dataset.batch_size, fits))
    call = functools.partial(wmss, "--topology", "v5e:2x4", "--search", "--step=score")
    code, out, err = call()
    assert code == 0 and len(out.splitlines()) == 11 and "mesh 1 x 4 x 2, remat full, 16 rows: " in err
    code, out, _ = call("--json")
    best, *others = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(others) == 9 and all(best["tokens_per_s"] >= other["tokens_per_s"] for other in others)
    monkeypatch.setattr(plan, "measure", invented(lambda recipe: 1, lambda recipe: None))
    assert call()[:2] == (1, "nothing fits: take more or larger devices, a shorter dataset.seq_len, or lora\n")
