"""What inspection prints. Run: pytest tests/test_inspection.py"""

import io
import json
from types import SimpleNamespace

import chats
import numpy as np
import pytest
from rich.console import Console

from wmss_jax import curriculum, data, epochs, inspection


@pytest.fixture
def dataset(tmp_path):
    rows = [
        {"question": "[bold]1 + 1?", "answer": "2\nfruits"}, {"question": "2?", "answer": "3"},
        {"question": "2?", "answer": "3"}, {"question": "2?", "answer": "3 " * 60},
    ]  # fmt: skip
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.prepare(
        [SimpleNamespace(path="qa.jsonl")], chats.plain(), root=tmp_path, seq_len=40, too_long="truncate",
        cache_dir=tmp_path / "cache",
    )  # fmt: skip


def shown(dataset, indices, loss_on="completion", **console):
    file = io.StringIO()
    inspection.show(dataset, chats.plain(), indices, loss_on, Console(file=file, width=30, **console))
    return file.getvalue()


def test_trained_tokens_are_marked_in_plain_text(dataset):
    assert shown(dataset, [0]).replace(dataset.location(0), "qa.jsonl:1") == (
        "example 0, qa.jsonl:1: 17 tokens, 5 trained\n<|user|>[bold]1 + 1?<|assistant|>⟦2\nfruits<|eos|>⟧\n\n"
    )
    assert "<|user|>⟦2?<|assistant|>3<|eos|>⟧\n" in shown(dataset, [1], "all")
    cut = shown(dataset, [3])
    assert "⟧" in cut and "<|eos|>" not in cut


def test_trained_tokens_are_coloured_on_a_terminal(dataset):
    text = shown(dataset, [1], force_terminal=True, color_system="standard")
    assert "⟦" not in text and "\x1b[30;42m3<|eos|>\x1b[0m" in text


def test_unknown_example(dataset):
    with pytest.raises(ValueError, match="example 4 is outside 0 to 3"):
        shown(dataset, [4])


def test_summary(dataset):
    probs = np.array([0.4, 0.2, 0.2, 0.2])
    plan = epochs.plan(dataset.lengths, seq_len=40, batch_size=2, seed=0, epochs=2, probs=probs, multiplier=2.0)
    text = inspection.summary(dataset, plan, probs, {"difficulty": 0.1, "consolidation": 0.9})
    lines = {line[:18].strip(): line[18:] for line in text.splitlines()}
    assert lines["examples"] == "4" and lines["truncated"] == "1" and lines["dropped"] == "0"
    assert lines["duplicates"] == (
        f"1 examples repeat an earlier one (first: {dataset.location(2)} is {dataset.location(1)})"
    )
    assert lines["steps an epoch"] == ", ".join(map(str, np.diff(plan.epoch_starts)))
    repeated = sum(8 - len(set(draw.tolist())) for draw in plan.draws)
    assert lines["draws"] == f"16 in 2 epochs, {repeated} repeated within an epoch"
    assert lines["effective size"] == f"{curriculum.effective_share(probs) * 4:.0f} examples, 89.3% of all"
    assert lines["difficulty"] == "10.0% of the draws" and lines["consolidation"] == "90.0% of the draws"
    assert f"{plan.fill:.1%}" in lines["fill"]


def test_histogram_counts_every_example(dataset):
    plan = epochs.plan(dataset.lengths, seq_len=40, batch_size=2, seed=0, epochs=1)
    text = inspection.summary(dataset, plan)
    bars = [line.split() for line in text.splitlines() if " to " in line]
    assert sum(int(bar[3]) for bar in bars) == 4
    assert int(bars[0][0]) == dataset.lengths.min() and int(bars[-1][2]) == dataset.lengths.max() == 40
    assert "effective" not in text and "of the draws" not in text
