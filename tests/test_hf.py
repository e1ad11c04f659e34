"""Hugging Face directories: bit-exact round trips, everything carried along, and everything wrong listed."""

import json
import shutil
import subprocess
import sys
import types

import chats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import wmss_jax as wmss
from wmss_jax import convert, hf, tensorfile

CASES = ("qwen3/tied", "qwen3/untied", "qwen3/bf16")


def same_bits(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8)), a, b
    )


@pytest.fixture
def copy(tmp_path, golden):
    """Return a writable copy of a golden directory."""
    return lambda case: shutil.copytree(golden / case, tmp_path / "model")


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("case", CASES)
def test_load_save_load_is_bit_exact_in_the_source_dtype(case, dtype, golden, tmp_path):
    """Also when bfloat16 weights were held in float32 in between, as in training."""
    model, params = wmss.load(golden / case, dtype=dtype)
    wmss.save(model, params, tmp_path / "out", tokenizer_from=golden / case)
    again, params_again = wmss.load(tmp_path / "out", dtype=dtype)
    assert again == model and again.file_dtypes == model.file_dtypes
    same_bits(params, params_again)
    theirs, ours = tensorfile.tensors(golden / case), tensorfile.tensors(tmp_path / "out")
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert theirs[name].dtype == ours[name].dtype
        np.testing.assert_array_equal(theirs[name].read().view(np.uint8), ours[name].read().view(np.uint8))


def test_sharded_parameters_export_the_same_files(golden, tmp_path):
    for name, mesh in (("one", None), ("eight", wmss.make_mesh(2, 2, 2))):
        model, params = wmss.load(golden / "qwen3/untied", mesh=mesh)
        wmss.save(model, params, tmp_path / name, max_shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sum(name.endswith(".safetensors") for name in files) > 2 and tensorfile.INDEX in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "eight" / name).read_bytes()
    assert all(path.stat().st_size < 110_000 for path in (tmp_path / "one").glob("*.safetensors"))


def test_exported_config_reads_in_both_generations_of_transformers(golden, tmp_path):
    model, params = wmss.load(golden / "qwen3/untied")
    wmss.save(model, params, tmp_path / "out", tokenizer_from=golden / "qwen3/untied")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert config["dtype"] == config["torch_dtype"] == "float32"
    source = json.loads((golden / "qwen3/untied/config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "max_position_embeddings"):
        assert config.get(key) == source.get(key)


def test_tokenizer_template_and_generation_files_are_carried_along(copy, tmp_path):
    source = copy("qwen3/tied")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(f"{{}} {name}")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    model, params = wmss.load(source)
    wmss.save(model, params, tmp_path / "out", tokenizer_from=source)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == f"{{}} {name}"
    assert not (tmp_path / "out/modeling_evil.py").exists()


# -- what is refused ----------------------------------------------------------------------------------------------


def test_missing_extra_and_misshaped_tensors_are_all_listed(copy):
    source = copy("qwen3/tied")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.7.stray"] = np.zeros(2, np.float32)
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError) as error:
        wmss.load(source)
    message = str(error.value)
    assert "missing: model.layers.0.mlp.up_proj.weight" in message
    assert "extra: model.layers.7.stray" in message
    assert "misshaped: model.norm.weight (file [31], config [32])" in message
    assert "\n" not in message


def test_a_tied_config_with_a_differing_head_is_refused_and_an_equal_one_dropped(copy, tmp_path):
    source = copy("qwen3/tied")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, source / "model.safetensors")
    model, params = wmss.load(source)
    assert "unembed" not in params
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, source / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"ties lm_head.weight to model.embed_tokens.weight, but the file holds different"
    ):
        wmss.load(source)


def test_pickles_are_refused(copy):
    source = copy("qwen3/tied")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained"):
        wmss.load(source)


@pytest.mark.parametrize("keep", [4, 40, -10])
def test_a_truncated_file_is_refused(copy, keep):
    file = copy("qwen3/tied") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors: .*truncated"):
        wmss.load(file.parent)


def test_an_index_that_names_an_absent_file_is_refused(copy):
    source = copy("qwen3/untied")
    next(source.glob("model-00001*")).unlink()
    with pytest.raises(FileNotFoundError, match="names files that are not there: model-00001"):
        wmss.load(source)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "just-a-word"])
def test_a_missing_directory_is_refused(path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        wmss.load(path)


def test_a_hub_id_that_cannot_be_had_is_refused():
    with pytest.raises(FileNotFoundError, match="nobody/nothing: no such directory, and the hub gave nothing"):
        wmss.load("nobody/nothing")


def test_an_existing_directory_is_not_overwritten_and_a_failed_save_leaves_nothing(golden, tmp_path):
    model, params = wmss.load(golden / "qwen3/tied")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        wmss.save(model, params, tmp_path / "full")
    with pytest.raises(KeyError):
        wmss.save(model, {"embed": params["embed"]}, tmp_path / "half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert (tmp_path / "full/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["flipped", "short", "more"])
def test_what_the_disk_does_not_hold_as_written_is_no_export(golden, tmp_path, monkeypatch, damage):
    model, params = wmss.load(golden / "qwen3/tied")
    write = tensorfile.save_file

    def badly(arrays, file, metadata):
        write({**arrays, "stray": np.zeros(1)} if damage == "more" else arrays, file, metadata)
        content = bytearray(file.read_bytes())
        if damage == "flipped":
            content[-5] ^= 1
        file.write_bytes(content[:-8] if damage == "short" else content)

    monkeypatch.setattr(tensorfile, "save_file", badly)
    with pytest.raises(OSError, match=r"read back|not what was written"):
        wmss.save(model, params, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- wmss convert ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two_branches(golden, tmp_path):
    """A checkpoint as the released code saves it: both branches in one file, λ in the config."""
    out = tmp_path / "released"
    out.mkdir()
    branches = {0: golden / "released_code/weak", 1: golden / "released_code/strong"}
    tensors = {
        f"sub_models.{i}.{name}": array
        for i, source in branches.items()
        for name, array in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, out / "model.safetensors")
    config = json.loads((branches[1] / "config.json").read_text())
    added = {"num_sub_models": 2, "is_llmboost": True, "sub_model_cfgs": [config, config], "fusion_lambda": 0.42}
    (out / "config.json").write_text(json.dumps({**config, **added}))
    return out


def test_two_branch_checkpoints_become_roles(two_branches, golden, tmp_path):
    model, roles, lam = hf.load_branches(two_branches)
    assert lam == 0.42 and set(roles) == {"weak", "strong"}
    for role in roles:
        same_bits(roles[role], wmss.load(golden / "released_code" / role)[1])
    with pytest.raises(ValueError, match="holds two branches"):
        wmss.load(two_branches)
    convert.import_(two_branches, tmp_path / "checkpoint")
    assert json.loads((tmp_path / "checkpoint/meta.json").read_text())["lam"] == 0.42
    for role in roles:
        convert.export(tmp_path / "checkpoint", tmp_path / role, role)
        assert "num_sub_models" not in json.loads((tmp_path / role / "config.json").read_text())
        card = (tmp_path / role / "README.md").read_text()
        assert f"# {role}\n" in card and "| λ of the two branches | 0.42 |" in card and "converted" in card
        same_bits(roles[role], wmss.load(tmp_path / role)[1])


def verdicts(directory):
    return [(text, good) for text, good in convert.check(directory)]


def test_check_lists_every_tensor_that_does_not_fit_and_writes_nothing(copy):
    source = copy("qwen3/tied")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors |= {"model.layers.7.stray": np.zeros(2, np.float32), "model.norm.weight": np.ones(31, np.float32)}
    save_file(tensors, source / "model.safetensors")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    first, *rest = verdicts(source)
    assert first == ("import: 3 tensors of the file are not those that config.json asks for", False)
    assert rest == [
        ("- model.layers.0.mlp.up_proj.weight: file none, config [48, 32]", False),
        ("+ model.layers.7.stray: file [2], config none", False),
        ("! model.norm.weight: file [31], config [32]", False),
    ]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before


def test_check_tells_an_export_that_differs(copy, monkeypatch):
    source, save = copy("qwen3/bf16"), hf.save

    def badly(model, params, out, **settings):
        scale = params["final_norm"]["scale"]
        save(model, params | {"final_norm": {"scale": scale + jnp.ones_like(scale)}}, out, **settings)

    monkeypatch.setattr(hf, "save", badly)
    assert [line for line in verdicts(source) if not line[1]] == [
        ("export and re-import: parameters DIFFER", False),
        ("files: 1 of 25 tensors DIFFER", False),
        ("! model.norm.weight: source bfloat16[32], export bfloat16[32], other bits", False),
    ]


def test_check_on_two_branches_and_on_a_tokenizer(two_branches, copy):
    found = verdicts(two_branches)
    assert all(good for _, good in found)
    assert [text.split(":")[0] for text, _ in found] == [
        f"{role} {step}" for role in ("weak", "strong")
        for step in ("import", "forward", "export and re-import", "files")
    ]  # fmt: skip
    source = copy("qwen3/untied")
    chats.of_family("qwen3").save_pretrained(source)
    assert verdicts(source)[-1] == ("tokenizer: 363 tokens in 120 rows, too few", False)


def test_check_asks_for_room(golden, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    with pytest.raises(ValueError, match=r"is checked with an export of .* GB in .*, where 0 GB are free; set TMPDIR"):
        next(convert.check(golden / "qwen3/tied"))


def test_generation_stops_where_answers_were_trained_to_end(tmp_path):
    write = lambda name, **keys: (tmp_path / name).write_text(json.dumps(keys))
    read = lambda stop: json.loads(hf.generation_config(tmp_path, stop))
    assert read(7) == {"eos_token_id": 7}
    write("config.json", eos_token_id=5, bos_token_id=1, hidden_size=3)
    assert read(5) == {"bos_token_id": 1, "eos_token_id": 5}
    assert read(7) == {"bos_token_id": 1, "eos_token_id": [5, 7]}
    write("generation_config.json", eos_token_id=[5, 6], top_k=20, bos_token_id=2)
    assert read(6) == {"bos_token_id": 2, "eos_token_id": [5, 6], "top_k": 20}
    assert read(7)["eos_token_id"] == [5, 6, 7]


def wmss_command(*args):
    return subprocess.run([sys.executable, "-m", "wmss_jax", *map(str, args)], capture_output=True, text=True)


def test_convert_on_the_command_line(golden, tmp_path):
    """import, export, check; then the mistakes: one line, exit 2, nothing written."""
    source = golden / "qwen3/bf16"
    assert wmss_command("convert", "import", source, tmp_path / "checkpoint").returncode == 0
    assert wmss_command("convert", "export", tmp_path / "checkpoint", tmp_path / "out").returncode == 0
    assert (tmp_path / "out/model.safetensors").exists()
    checked = wmss_command("convert", "check", tmp_path / "out")
    assert checked.returncode == 0, checked.stderr
    assert [line.split(":")[0] for line in checked.stdout.splitlines()] == [
        "import", "forward", "export and re-import", "files",
    ]  # fmt: skip
    (tmp_path / "out/model.safetensors").unlink()
    (tmp_path / "out/pytorch_model.bin").touch()
    before = sorted(tmp_path.rglob("*"))
    for mistake in (
        ["convert", "import", tmp_path / "out", tmp_path / "new"],
        ["convert", "import", tmp_path / "absent", tmp_path / "new"],
        ["convert", "import", source, tmp_path / "checkpoint"],
        ["convert", "export", tmp_path / "checkpoint", tmp_path / "new", "--role", "teacher"],
    ):
        run = wmss_command(*mistake)
        assert run.returncode == 2, run.stderr
        assert run.stderr.startswith("wmss: error: ") and len(run.stderr.splitlines()) == 1, run.stderr
    assert sorted(tmp_path.rglob("*")) == before
