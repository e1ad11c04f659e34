"""The roles of a checkpoint: saved with their models, read one at a time, and of one the head alone."""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import wmss_jax as wmss
from wmss_jax import checkpoint, hf, roles
from wmss_jax.models.lora import Lora

TX = optax.adamw(1e-3)


def state(mesh=None):
    """A training state."""
    model = tiny.model()
    return wmss.init_state({"strong": tiny.params(model) if mesh is None else tiny.sharded(model, 0, mesh)}, TX)


def same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, expected)


class Source(NamedTuple):
    directory: Path
    model: object
    params: dict


@pytest.fixture
def source(tmp_path):
    """A Hugging Face directory in bfloat16 with some tokenizer files, loaded in float32."""
    model = tiny.model()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params(tiny.model()))
    hf.save(model, params, tmp_path / "hf")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / "hf" / name).write_text(f"this is {name}")
    (tmp_path / "hf/README.md").write_text("not carried")
    return Source(tmp_path / "hf", *hf.load(tmp_path / "hf", dtype="float32", compute_dtype="bfloat16", remat="full"))


def test_roles_round_trip(source, tmp_path):
    other = jax.tree.map(lambda x: x + 1, source.params)
    both = {"strong": (source.model, source.params), "weak": (source.model, other)}
    roles.save(tmp_path / "c", both, {"base": "x"}, assets_from=source.directory)
    assert checkpoint.read_meta(tmp_path / "c")["base"] == "x"
    for role, (_, params) in both.items():
        model, got = roles.load(tmp_path / "c", role)
        assert model == source.model and model.file_dtypes == source.model.file_dtypes
        same(got, params)
    carried = sorted(path.name for path in (tmp_path / "c/assets").iterdir())
    assert carried == ["chat_template.jinja", "config.json", "tokenizer.json"]


def test_from_hugging_face_and_back(source, tmp_path):
    roles.save(tmp_path / "c", {"strong": (source.model, source.params)}, {}, source.directory)
    model, params = roles.load(tmp_path / "c", "strong")
    hf.save(model, params, tmp_path / "out", tokenizer_from=tmp_path / "c/assets")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source.directory / name).read_bytes()


@pytest.mark.parametrize("mesh", [None, (1, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_load_role_of_a_training_checkpoint(tmp_path, mesh, dtype):
    model, saved = tiny.model(), state(wmss.make_mesh())
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(5, saved, {"roles": roles.describe({"strong": model})})
    mesh = None if mesh is None else wmss.make_mesh(*mesh, devices=jax.devices()[: math.prod(mesh)])
    loaded, params = roles.load(tmp_path / "5", "strong", mesh=mesh, dtype=dtype)
    assert loaded == model
    same(params, jax.tree.map(lambda x: x.astype(dtype or x.dtype), saved.params["strong"]))
    if mesh is not None:
        assert jax.tree.map(lambda x: x.sharding, params) == model.shardings(mesh)


def test_load_role_reads_nothing_but_the_role(tmp_path, monkeypatch):
    saved = state()
    checkpoint.save(tmp_path / "c", saved, {"roles": roles.describe({"strong": tiny.model()})})
    read = []
    construct = checkpoint.ocp.checkpoint_utils.construct_restore_args
    monkeypatch.setattr(
        checkpoint.ocp.checkpoint_utils, "construct_restore_args", lambda tree: read.append(tree) or construct(tree)
    )
    roles.load(tmp_path / "c", "strong")
    assert jax.tree.structure(read) == jax.tree.structure([{"params": {"strong": saved.params["strong"]}}])


def test_unknown_role(source, tmp_path):
    roles.save(tmp_path / "c", {"strong": (source.model, source.params)}, {})
    with pytest.raises(ValueError, match="no role 'weak'; it has: strong"):
        roles.load(tmp_path / "c", "weak")
    checkpoint.save(tmp_path / "d", {"x": jnp.ones(3)}, {})
    with pytest.raises(ValueError, match="it has: none"):
        roles.load(tmp_path / "d", "strong")


def test_role_whose_config_asks_for_other_arrays(tmp_path):
    tied = roles.describe({"strong": tiny.model(tied=True)})
    checkpoint.save(tmp_path / "c", {"params": {"strong": tiny.params(tiny.model())}}, {"roles": tied})
    with pytest.raises(ValueError, match=r"only in the checkpoint: params.strong.unembed"):
        roles.load(tmp_path / "c", "strong")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mesh", [None, (1, 4, 2)])
def test_the_head_can_be_read_alone(tmp_path, tied, mesh, monkeypatch):
    """From a checkpoint and from a Hugging Face directory; it makes the logits that the whole parameters make."""
    mesh = None if mesh is None else wmss.make_mesh(*mesh)
    model, params = tiny.model(tied=tied), tiny.params(tiny.model(tied=tied))
    roles.save(tmp_path / "c", {"weak": (model, params)}, {})
    hf.save(model, params, tmp_path / "hf")
    read, read_tensor = [], hf.tensorfile.Tensor.read
    counted = lambda self, *rows: read.append(self.shape) or read_tensor(self, *rows)
    monkeypatch.setattr(hf.tensorfile.Tensor, "read", counted)
    for head in (roles.load(tmp_path / "c", "weak", mesh, head_only=True)[1], hf.load_head(tmp_path / "hf", mesh)):
        assert list(head) == ["embed" if tied else "unembed"]
        np.testing.assert_array_equal(model.unembed(head), model.unembed(params))
        if mesh is not None:
            assert head[next(iter(head))].sharding == model.shardings(mesh)[next(iter(head))]
    assert set(read) == {(96, 32)}, "no other tensor of the file was read"


@pytest.mark.parametrize("targets", ["all", ("q_proj", "mlp.up_proj")])
def test_an_adapter_round_trips_with_its_settings(tmp_path, targets):
    model = tiny.model(lora=Lora(4, 8.0, targets))
    adapter = model.init(jax.random.key(0))
    roles.save(tmp_path / "c", {"strong": (model, adapter)}, {})
    got_model, got = roles.load(tmp_path / "c", "strong")
    assert got_model == model and hash(got_model) == hash(model)
    same(got, adapter)
