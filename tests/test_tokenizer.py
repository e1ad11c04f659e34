"""Loading, training and telling tokenizers apart. Run: pytest tests/test_tokenizer.py"""

import json
import shutil
import subprocess
import sys

import chats
import pytest

from wmss_jax import tokenizer


def test_trained_tokenizer_reads_everything():
    made = chats.plain()
    for text in ("", " a  b\n\n\tc ", "1234567890", "日本 héllo \x00 🙂", "<think>x</think>"):
        assert made.decode(made(text)["input_ids"]) == text
    assert made.convert_ids_to_tokens(made("12 + 345")["input_ids"]) == ["1", "2", "Ġ+", "Ġ", "3", "4", "5"]
    assert (made.pad_token_id, made.eos_token_id, len(made)) == (0, 1, 360)
    assert made("a<|eos|>")["input_ids"][-1] == 1


def test_trained_chat_template():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]
    made = chats.plain()
    answered = [*chat, {"role": "assistant", "content": "5"}]
    assert made.apply_chat_template(answered, tokenize=False) == (
        "<|system|>Be brief.<|user|>2 + 3?<|assistant|>5<|eos|>"
    )
    waiting = made.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert waiting == "<|system|>Be brief.<|user|>2 + 3?<|assistant|>"
    assert made.convert_ids_to_tokens(made(waiting)["input_ids"])[-1] == "<|assistant|>"


def test_training_is_deterministic(tmp_path):
    """In other processes, with other hash seeds, byte for byte."""
    code = "import sys; sys.path.insert(0, 'tests'); import chats; from wmss_jax import tokenizer; "
    code += "tokenizer.train(chats.TEXTS, 360, sys.argv[1])"
    for name, seed in (("a", "1"), ("b", "2")):
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        first, second = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        assert first == second == (chats.directory() / file).read_bytes()


def test_fingerprint_is_of_what_decides_the_tokens(tmp_path):
    made = chats.plain()
    before = tokenizer.fingerprint(made)
    made(["a b c", "d"], padding=True, truncation=True, max_length=2)  # leaves its settings in the backend
    made.pad_token = made.eos_token
    assert tokenizer.fingerprint(made) == before == tokenizer.fingerprint(chats.plain())
    made.save_pretrained(tmp_path / "saved")
    assert tokenizer.fingerprint(tokenizer.load(tmp_path / "saved")) == before
    made.chat_template += " "
    assert tokenizer.fingerprint(made) != before
    assert tokenizer.fingerprint(tokenizer.load(chats.directory(361))) != before
    other_eos = chats.plain()
    other_eos.eos_token = "<|user|>"
    assert tokenizer.fingerprint(other_eos) != before


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/no/such/dir", "owner/nowhere"])
def test_load_nothing(name):
    with pytest.raises(FileNotFoundError, match=f"^{name}: no such directory, and .*hub") as error:
        tokenizer.load(name)
    assert "\n" not in str(error.value)


def test_load_damaged(tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(chats.directory(), tmp_path / "cut")
    text = (tmp_path / "cut/tokenizer.json").read_text()
    (tmp_path / "cut/tokenizer.json").write_text(text[:1000])
    for name in ("empty", "cut"):
        with pytest.raises(ValueError, match=rf"{name}: holds no usable tokenizer \(tokenizer.json\)") as error:
            tokenizer.load(tmp_path / name)
        assert "\n" not in str(error.value)


def test_train_errors(tmp_path):
    with pytest.raises(ValueError, match="vocab_size = 260 is too small: 256 bytes and 5 special tokens are 261"):
        tokenizer.train(["a"], 260, tmp_path / "small")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("x")
    with pytest.raises(FileExistsError, match="taken: exists already"):
        tokenizer.train(["a"], 300, tmp_path / "taken")

    def broken():
        yield "a"
        raise RuntimeError("in the texts")

    with pytest.raises(Exception, match="in the texts"):
        tokenizer.train(broken(), 300, tmp_path / "broken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_without_chats_there_is_no_template(tmp_path):
    made = tokenizer.train(chats.TEXTS, 300, tmp_path / "plain", chats=False)
    assert made.chat_template is None
    assert made("2 + 3?")["input_ids"] == tokenizer.train(chats.TEXTS, 300, tmp_path / "chats")("2 + 3?")["input_ids"]


def test_config_is_read_by_transformers_4_too():
    config = json.loads((chats.directory() / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["chat_template"]
