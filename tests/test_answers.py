"""`wmss generate`, and where answers end."""

import json
import sys
from types import SimpleNamespace

import chats
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import wmss_jax as wmss
from wmss_jax import answers, cli, endings, sampling
from wmss_jax.answers import Answerer, Settings
from wmss_jax.endings import StopTexts


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model that was never trained, with a real tokenizer."""
    out = tmp_path_factory.mktemp("answers") / "model"
    model = tiny.model(vocab_size=360)
    wmss.save(model, tiny.params(model), out, tokenizer_from=chats.directory())
    return out


@pytest.fixture(scope="module")
def whole(directory):
    """An answer of 24 tokens."""
    answerer = Answerer(str(directory), Settings(max_new_tokens=24))
    (completion,) = answerer.stream(["2 + 3?"])
    return completion.tokens, answerer.text(completion)


# -- what ends an answer ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "more"),
    [
        ("", []), ("{}", []), ('{"eos_token_id": 7}', [7]), ('{"eos_token_id": [7, 9]}', [7, 9]),
        ('{"eos_token_id": null}', []),
    ],
)  # fmt: skip
def test_the_end_tokens_are_those_of_training_and_of_the_generation_config(tmp_path, said, more):
    if said:
        (tmp_path / "generation_config.json").write_text(said)
    tokenizer = chats.plain()
    assert endings.end_ids(tokenizer, tmp_path) == {tokenizer.eos_token_id, *more}


@pytest.mark.parametrize(
    ("said", "message"),
    [("[", "not a JSON object"), ("[1]", "not a JSON object"), ('{"eos_token_id": ["a"]}', "'a' is no token id")],
)
def test_a_damaged_generation_config_is_named(tmp_path, said, message):
    (tmp_path / "generation_config.json").write_text(said)
    with pytest.raises(ValueError, match=f"generation_config.json: .*{message}"):
        endings.end_ids(chats.plain(), tmp_path)


ONE_A_LETTER = SimpleNamespace(decode=lambda tokens, skip_special_tokens: "".join(map(chr, tokens)))


@given(st.text("ab#", max_size=20), st.lists(st.text("ab#", min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_is_shown_of_an_unfinished_answer_stays(text, stops):
    """For every way to go on: what was sure is a beginning of the answer, and no stop text is in that."""
    ends = StopTexts(ONE_A_LETTER, tuple(stops))
    end = next((n for n in range(1, len(text) + 1) if ends([ord(c) for c in text[:n]])), len(text))
    answer = ends.cut(text[:end])
    assert not any(stop in answer for stop in stops)
    assert answer == text[:end] or any(text[len(answer) : end].startswith(stop) for stop in stops)
    for n in range(end):
        assert answer.startswith(ends.sure(text[:n]))


def test_half_a_character_is_not_shown():
    assert StopTexts(chats.plain(), ()).sure("a\ufffd") == "a"


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="would end every answer at once"):
        StopTexts(chats.plain(), ("",))


# -- answers ---------------------------------------------------------------------------------------


def test_pieces_add_up_to_the_answer(directory, whole):
    pieces = []
    answers.print_while_made(Answerer(str(directory), Settings(max_new_tokens=24)), "2 + 3?", pieces.append)
    assert len(pieces) > 4 and "".join(pieces) == whole[1] + "\n"


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(directory, whole):
    stop = whole[1][5:7]
    answerer = Answerer(str(directory), Settings(max_new_tokens=24, stop=(stop,)))
    pieces = []
    answers.print_while_made(answerer, "2 + 3?", pieces.append)
    assert "".join(pieces) == whole[1][: whole[1].find(stop)] + "\n"
    (line,) = answers.json_lines(answerer, ["2 + 3?"])
    record = json.loads(line)
    assert record["finish"] == "text" and record["tokens"] < 24
    assert stop in answerer.tokenizer.decode(whole[0][: record["tokens"]])
    assert stop not in answerer.tokenizer.decode(whole[0][: record["tokens"] - 1])


def test_samples_differ_and_a_seed_repeats_them(directory):
    def made(seed):
        how = sampling.Sampling(temperature=1.0, samples=3)
        answerer = Answerer(str(directory), Settings(how, max_new_tokens=24, seed=seed))
        records = [json.loads(line) for line in answers.json_lines(answerer, ["2 + 3?", "4 + 5?"])]
        return {(record["prompt"], record["sample"]): record["text"] for record in records}

    first = made(0)
    assert sorted(first) == [(p, s) for p in range(2) for s in range(3)] and len(set(first.values())) == 6
    assert made(0) == first and not set(made(100).values()) & set(first.values())


def test_prompts_are_read_with_their_chat_template_unless_told_otherwise(directory, monkeypatch):
    seen = []
    monkeypatch.setattr(answers, "stream", lambda model, params, prompts, **rest: seen.append(prompts) or [])
    for chat, system in [(None, None), (True, "Be brief."), (False, None)]:
        settings = Settings(chat_template=chat, system_prompt=system)
        list(Answerer(str(directory), settings).stream(["2 + 3?"]))
    texts = [chats.plain().decode(prompts[0]) for prompts in seen]
    assert texts == ["<|user|>2 + 3?<|assistant|>", "<|system|>Be brief.<|user|>2 + 3?<|assistant|>", "2 + 3?"]


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model = tiny.model(vocab_size=200)
    wmss.save(model, tiny.params(model), tmp_path / "m", tokenizer_from=chats.directory())
    with pytest.raises(ValueError, match="knows 200 tokens, its tokenizer has 3"):
        Answerer(str(tmp_path / "m"), Settings())


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def command(directory, monkeypatch):
    """Calls `wmss generate` in this process and returns its exit code."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["wmss", "generate", str(directory), "--max-new-tokens", "24", *arguments])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer replaces it
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code

    return call


def test_the_command_prints_what_the_library_makes(command, tmp_path, whole, capsys):
    assert command("--prompt", "2 + 3?") == 0
    assert capsys.readouterr().out == whole[1] + "\n"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "2 + 3?"}\n{"q": "1?"}\n')
    assert command("--file", str(rows), "--template", "{q}") == 0
    records = sorted(map(json.loads, capsys.readouterr().out.splitlines()), key=lambda record: record["prompt"])
    assert [record["prompt"] for record in records] == [0, 1] and records[0]["text"] == whole[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --prompt and --file"),
        (["--prompt", "x", "--file", "y"], "give one of --prompt and --file"),
        (["--prompt", "x", "--top-k", "3"], "top_k and top_p have no effect at temperature 0"),
        (["--file", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_end_with_exit_code_2(command, arguments, message, capsys):
    assert command(*arguments) == 2 and message in capsys.readouterr().err


def test_a_row_without_the_column_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: .*prompt"):
        answers.read_prompts(file, "{prompt}")
