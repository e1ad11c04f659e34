"""evaluate: from token ids to accuracy, on a model whose answers are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import wmss_jax as wmss
from wmss_jax.evals import graders, run
from wmss_jax.evals.run import Item, Record, Result, evaluate

QWEN3 = Path(__file__).parent / "golden" / "qwen3" / "untied"
MODEL, PARAMS = wmss.load(QWEN3)
GOLDEN = np.load(QWEN3 / "golden.npz")
PROMPT, GENERATED = GOLDEN["prompt"][0].tolist(), GOLDEN["generated"].tolist()


class Tokenizer:
    """Token ids as words; id 0 is special."""

    def __init__(self, eos_token_id=None):
        self.eos_token_id = eos_token_id

    def decode(self, token_ids, *, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(str(token) for token in token_ids if token)


def text(tokens):
    return Tokenizer().decode(tokens, skip_special_tokens=True)


def items(*golds):
    return [Item(PROMPT, "the prompt", gold) for gold in golds]


def test_records_hold_prompt_generation_gold_and_verdict():
    golds = items(text(GENERATED), "something else", text(GENERATED))
    result = evaluate(MODEL, PARAMS, Tokenizer(), golds, graders.exact, max_new_tokens=16)
    assert result.records == tuple(
        Record("the prompt", text(GENERATED), item.gold, verdict)
        for item, verdict in zip(golds, [True, False, True], strict=True)
    )
    assert (result.n, result.accuracy) == (3, 2 / 3)
    assert result.standard_error == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 3))


@pytest.mark.parametrize(
    ("eos", "stop_ids", "kept"),
    [
        (None, (), 16),
        (GENERATED[3], (), 3),
        (None, [GENERATED[5]], 5),
        (GENERATED[5], [GENERATED[3]], 3),
    ],
)
def test_an_answer_ends_at_eos_or_a_stop_id_of_the_caller(eos, stop_ids, kept):
    result = evaluate(
        MODEL,
        PARAMS,
        Tokenizer(eos),
        items("x"),
        graders.exact,
        max_new_tokens=16,
        stop_ids=stop_ids,
    )
    assert result.records[0].generation == text(GENERATED[:kept])


def test_a_grader_is_any_function_of_prediction_and_gold():
    last = lambda prediction, gold: prediction.endswith(gold)
    result = evaluate(MODEL, PARAMS, Tokenizer(), items(str(GENERATED[-1]), "x"), last, max_new_tokens=16)
    assert [record.verdict for record in result.records] == [True, False]


def test_jsonl_holds_a_record_a_line(tmp_path):
    records = (Record("p\nq", "½ €", "1/2", True), Record("", "", "", False))
    Result(records).write_jsonl(tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Record(**json.loads(line)) for line in lines] == list(records)
    assert "½ €" in lines[0]


def test_no_items_is_a_mistake():
    with pytest.raises(ValueError, match="no items"):
        run.evaluate(MODEL, PARAMS, Tokenizer(), [], graders.exact, max_new_tokens=4)
