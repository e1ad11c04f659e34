"""programs.py: the steps that are planned are those that training takes, and the partitioner handles them well."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import plans
import pytest
import recipes

from wmss_jax import pipeline, programs, scoring, sharding, step

MESH = ("mesh.fsdp=4", "mesh.tensor=2")
# The model is trained from random parameters, which are stored as they are trained; config.json says so.
SETTINGS = (*MESH, "dataset.batch_size=8", "train.micro_batches=2", "model.compute_dtype=bfloat16", "pretrain=",
            "sft.steps=1", "joint.steps=1", "eval.tasks={}", "eval.data=[]", "controls={}")  # fmt: skip
VARIANTS = {
    "resident": (),
    "cached": ("joint.weak.placement=cached",),
    "both trained": ("joint.weak.trainable=true",),
    "lora": ("lora.rank=4",),
    "lora and cached": ("lora.rank=4", "joint.weak.placement=cached"),
    "averaged": ("optimizer.ema_decay=0.9",),
    "an average as weak agent": ("joint.weak.source={name: ema, decay: 0.9}", "joint.neftune={}"),
    "an early exit": ("joint.weak.source={name: early_exit, layer: 1}", "joint.weak.control=shuffled_tokens"),
    "a reference": ("joint.objective={name: asft}",),
    "lora and a reference": ("lora.rank=4", "joint.objective={name: gift}"),
    "lora and a step of the SFT": ("lora.rank=4", "joint.weak.source={name: sft_step, step: 1}"),
}


class Taken(NamedTuple):
    """What a step was made with and given."""

    made_with: dict
    call: tuple


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = recipes.write(tmp_path_factory.mktemp("recipe"))
    (root / "config.json").write_text(json.dumps({**recipes.CONFIG, "dtype": "float32"}))
    return root


def settings_of(models, objective, tx, **others) -> dict:
    return {"models": models, "objective": objective, **others}


def trained(recipe) -> dict[str, Taken]:
    """Return what the stages of a real run make their steps with and give them; the steps do nothing."""
    taken = {}

    def make_train_step(*arguments, **others):
        def take(state, frozen, batch):
            taken["joint" if taken else "sft"] = Taken(settings_of(*arguments, **others), (state, frozen, batch))
            return state._replace(step=state.step + 1), dict.fromkeys(
                ("loss", "grad_norm", "loss_tokens"), jnp.ones(())
            )

        return take

    score = scoring._score_batch

    def take_score(model, params, batch, *, mesh, chunk_tokens, with_hidden):
        if not with_hidden:
            made_with = {"model": model, "mesh": mesh, "chunk_tokens": chunk_tokens}
            taken["score"] = Taken(made_with, (params, batch))
        return score(model, params, batch, mesh=mesh, chunk_tokens=chunk_tokens, with_hidden=with_hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_train_step", make_train_step)
        patch.setattr(scoring, "_score_batch", take_score)
        pipeline.run(recipe, until="joint", say=lambda line: None)
    return taken


def planned(recipe, name: programs.Step) -> Taken:
    made_with = {}
    real = step.make_train_step

    def make_train_step(*arguments, **others):
        made_with.update(settings_of(*arguments, **others))
        return real(*arguments, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_train_step", make_train_step)
        program = programs.of(recipe, name, sharding.make_mesh(1, 4, 2))
    if name == "score":
        made_with = {"model": program.function.__wrapped__.args[0], **program.function.__wrapped__.keywords}
    return Taken(made_with, program.call)


def described(tree) -> dict:
    """Return {path: (shape, dtype, sharding)}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (x.shape, x.dtype, x.sharding) for path, x in leaves}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_planned_step_is_the_one_that_training_takes(root, variant, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    resample = f"joint.resample={'true' if variant == 'resident' else 'false'}"  # whose scores are the third step
    recipe = recipes.load(*SETTINGS, *VARIANTS[variant], resample, f"work_dir={tmp_path / 'run'}")
    real = trained(recipe)
    assert set(real) == ({"sft", "joint", "score"} if variant == "resident" else {"sft", "joint"})
    for name, taken in real.items():
        made = planned(recipe, name)
        assert made.made_with == taken.made_with, name
        assert jax.tree.structure(made.call) == jax.tree.structure(taken.call), name
        assert described(made.call) == described(taken.call), name


# -- the partitioner's warnings -----------------------------------------------------------------------------------

WARNING = "Involuntary full rematerialization"
EMBEDDING = """
rows, table = P(("data", "fsdp")), P("tensor", "fsdp")
hold = lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
shape = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
loss = lambda table, tokens: jnp.sum(jnp.sin(hold(table[tokens], rows)))
step = jax.jit(lambda t, tokens: hold(jax.grad(loss)(t, tokens), table))
step.lower(shape((512, 64), jnp.float32, table), shape((8, 32), jnp.int32, rows)).compile()
"""
TRAIN_STEP = """
overrides = ["dataset.seq_len=32", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}"]
program = programs.of(plan.recipe(config, jax.devices(), overrides), "joint", mesh)
program.function.lower(*program.call).compile()
"""


def warnings_of(source: str, config, fsdp: int, tensor: int) -> str:
    """Return what a process writes to stderr that compiles this for eight simulated devices."""
    program = f"""
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from wmss_jax import plan, programs, sharding
jax.config.update("jax_num_cpu_devices", 8)
config, fsdp, tensor = {str(config)!r}, {fsdp}, {tensor}
mesh = sharding.make_mesh(1, fsdp, tensor)
{source}
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_partitioner_warns_of_what_it_cannot_do_well(tmp_path):
    assert WARNING in warnings_of(EMBEDDING, "", 4, 2), "or the next test could not fail"


@pytest.mark.slow
@pytest.mark.parametrize("fsdp, tensor", [(8, 1), (4, 2)])
def test_train_steps_give_it_no_reason_to(tmp_path, fsdp, tensor):
    assert WARNING not in warnings_of(TRAIN_STEP, plans.write(tmp_path, num_hidden_layers=2), fsdp, tensor)
