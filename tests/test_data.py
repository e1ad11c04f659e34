"""From files to batches: cache, plan, batches. Run: pytest tests/test_data.py"""

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import chats
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmss_jax import data, encoding, epochs, examples, packing, tokenizer


def source(path, **given):
    return SimpleNamespace(path=str(path), **given)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source(path.name)


def rows(n, longest=12, seed=0):
    """Questions with answers of very unequal length."""
    rng = np.random.default_rng(seed)
    return [
        {"question": f"{i} " + "apples " * rng.integers(longest), "answer": "fruits" * rng.integers(1, longest)}
        for i in range(n)
    ]


@functools.cache
def made(n=60, seq_len=64):
    """A dataset of n examples; the directory is left to the system."""
    import tempfile
    from pathlib import Path

    root = Path(tempfile.mkdtemp())
    return prepare(root, write(root / "train.jsonl", rows(n)), seq_len=seq_len)


def prepare(root, *sources, **settings):
    settings = {"seq_len": 64, "tokenizer": chats.plain(), "cache_dir": root / "cache"} | settings
    return data.prepare(sources, settings.pop("tokenizer"), root=root, **settings)


# -- encoded once -----------------------------------------------------------------------------------------------------


def test_a_dataset_is_its_examples_encoded(tmp_path):
    qa = write(tmp_path / "qa.jsonl", rows(5))
    chat = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
    mixed = write(tmp_path / "mixed.jsonl", [{"messages": chat}, {"text": "Tom has fruits."}])
    dataset = prepare(tmp_path, qa, mixed)
    expected = [example for one in (qa, mixed) for example in examples.read(one, tmp_path)]
    assert len(dataset) == len(expected) == dataset.report.examples == 7
    for index, example in enumerate(expected):
        for loss_on in ("completion", "all"):
            tokens, mask = encoding.encode(example, chats.plain(), loss_on=loss_on)
            assert np.array_equal(dataset.tokens(index), tokens)
            assert np.array_equal(dataset.mask(index, loss_on), mask)
        assert dataset.location(index) == example.location
    assert dataset.lengths.tolist() == [len(dataset.tokens(index)) for index in range(7)]
    assert dataset.lengths.dtype == np.int64 and dataset.tokens(0).dtype == np.int32
    trained = sum(int(dataset.mask(index).sum()) for index in range(7))
    longest = int(dataset.lengths.max())
    assert dataset.report == data.Report(7, int(dataset.lengths.sum()), trained, 0, 0, longest)
    assert dataset.tokenizer_fingerprint == tokenizer.fingerprint(chats.plain())


def test_chat_template_and_system_prompt_reach_the_encoding(tmp_path):
    qa = write(tmp_path / "qa.jsonl", rows(1))
    (example,) = examples.read(qa, tmp_path)
    for setting in ({"system_prompt": "Add."}, {"chat_template": False}):
        tokens, _ = encoding.encode(example, chats.plain(), **setting)
        assert np.array_equal(prepare(tmp_path, qa, **setting).tokens(0), tokens)


def test_the_second_call_only_reads(tmp_path, monkeypatch):
    qa = write(tmp_path / "qa.jsonl", rows(5))
    first = prepare(tmp_path, qa)
    (entry,) = (tmp_path / "cache").iterdir()
    assert sorted(file.name for file in entry.iterdir()) == [
        "mask.npy", "meta.json", "offsets.npy", "rows.npy", "tokens.npy",
    ]  # fmt: skip
    for name in ("encode_batch", "encode"):
        monkeypatch.setattr(encoding, name, None)
    before = {file: file.stat().st_mtime_ns for file in entry.iterdir()}
    second = prepare(tmp_path, qa)
    assert before == {file: file.stat().st_mtime_ns for file in entry.iterdir()}
    assert first.fingerprint == second.fingerprint and first.report == second.report
    assert not second.flat_tokens.flags.writeable
    assert np.array_equal(first.flat_tokens, second.flat_tokens)


def test_the_same_bytes_elsewhere_are_the_same_entry(tmp_path):
    qa = write(tmp_path / "qa.jsonl", rows(5))
    first = prepare(tmp_path, qa)
    (tmp_path / "moved").mkdir()
    (tmp_path / "qa.jsonl").rename(tmp_path / "moved/other.jsonl")
    second = prepare(tmp_path, source("moved/other.jsonl"))
    assert len(list((tmp_path / "cache").iterdir())) == 1 and second.fingerprint == first.fingerprint
    assert second.location(1) == f"{tmp_path}/moved/other.jsonl:2"


def test_every_input_has_its_own_entry(tmp_path):
    encoded = functools.partial(prepare, tmp_path, seq_len=99)
    qa = write(tmp_path / "qa.jsonl", rows(5))
    swapped = source("qa.jsonl", prompt="{answer}", completion="{question}")
    changed = chats.plain()
    changed.chat_template = changed.chat_template.replace("<|user|>", "<|system|>")
    found = [
        encoded(qa),
        encoded(swapped),
        encoded(source("qa.jsonl", limit=4)),
        encoded(qa, chat_template=False),
        encoded(qa, system_prompt="Add."),
        encoded(qa, tokenizer=tokenizer.load(chats.directory(300))),
    ]
    write(tmp_path / "qa.jsonl", rows(5, seed=1))
    found.append(encoded(qa))
    assert len({dataset.fingerprint for dataset in found}) == len(list((tmp_path / "cache").iterdir())) == len(found)
    # Where the tokens are the same, scores stay valid: another length, a template that says what is done anyway.
    same = encoded(source("qa.jsonl", prompt="{question}", completion="{answer}"), seq_len=98)
    assert same.fingerprint == found[-1].fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == len(found) + 1


def test_a_failed_call_leaves_nothing_behind(tmp_path):
    bad = write(tmp_path / "bad.jsonl", [*rows(3), {"question": "1?", "answer": ""}])
    with pytest.raises(ValueError, match=r"bad.jsonl:4: answer is empty"):
        prepare(tmp_path, bad)
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(tmp_path, write(tmp_path / "qa.jsonl", rows(3)))
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_at_once(tmp_path, monkeypatch):
    """The one that comes second finds the entry taken and uses it."""
    qa = write(tmp_path / "qa.jsonl", rows(3))
    rename = os.rename

    def other_was_faster(partial, entry):
        shutil.copytree(partial, entry)
        rename(partial, entry)

    monkeypatch.setattr("pathlib.Path.rename", other_was_faster)
    assert len(prepare(tmp_path, qa)) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


# -- too long ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unequal(tmp_path):
    """Three examples of 5, 30 and 9 tokens, and one whose answer begins after 21."""
    pieces = [(1, 1), (1, 26), (1, 5), (20, 3)]
    pairs = [{"prompt": "1" * prompt, "completion": "2" * completion} for prompt, completion in pieces]
    return write(tmp_path / "pairs.jsonl", pairs)


def test_too_long_is_an_error(tmp_path, unequal):
    dataset = prepare(tmp_path, unequal, seq_len=30)
    assert dataset.lengths.tolist() == [5, 30, 9, 26]
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError) as error:
        prepare(tmp_path, unequal, seq_len=9)
    assert str(error.value).replace(f"{tmp_path}/", "") == (
        "2 of 4 examples are longer than seq_len = 9 tokens (pairs.jsonl:2 has 30, pairs.jsonl:4 has 26): "
        "raise seq_len, or set too_long to truncate or drop"
    )
    assert not (tmp_path / "cache").exists()


def test_too_long_is_dropped(tmp_path, unequal):
    dataset = prepare(tmp_path, unequal, seq_len=9, too_long="drop")
    assert dataset.lengths.tolist() == [5, 9]
    assert [dataset.location(index).rpartition(":")[2] for index in range(2)] == ["1", "3"]
    assert dataset.report == data.Report(2, 14, 8, dropped=2, truncated=0, longest=30)
    with pytest.raises(
        ValueError, match=r"^all 4 examples are too long for seq_len = 3 \(too_long: drop\): raise seq_len"
    ):
        prepare(tmp_path, unequal, seq_len=3, too_long="drop")


def test_too_long_is_truncated(tmp_path, unequal):
    dataset = prepare(tmp_path, unequal, seq_len=9, too_long="truncate")
    assert dataset.lengths.tolist() == [5, 9, 9]
    assert dataset.report == data.Report(3, 23, 14, dropped=1, truncated=1, longest=30)
    eos = chats.plain().eos_token_id
    ends = [int(dataset.tokens(index)[-1]) == eos for index in range(3)]
    assert ends == [True, False, True], "what was cut off has no EOS"
    assert dataset.mask(1).tolist() == [False] * 3 + [True] * 6


def test_wrong_arguments(tmp_path, unequal):
    with pytest.raises(ValueError, match="too_long 'cut' is unknown; choose 'error', 'drop' or 'truncate'"):
        prepare(tmp_path, unequal, too_long="cut")
    with pytest.raises(ValueError, match="no sources"):
        prepare(tmp_path)
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"empty.jsonl: the data set is empty; give it at least one row$"):
        prepare(tmp_path, unequal, empty)


# -- batches ----------------------------------------------------------------------------------------------------------


def plan_of(dataset, **given):
    settings = {"seq_len": 64, "batch_size": 4, "seed": 1, "epochs": 2} | given
    return epochs.plan(dataset.lengths, **settings)


def stacked(batches):
    """All batches one after the other."""
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_equal(one, two):
    assert list(one) == list(two)
    for name in one:
        assert one[name].dtype == two[name].dtype and np.array_equal(one[name], two[name]), name


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("dedup", [True, False])
def test_batches_have_each_draw_once_with_its_mask(loss_on, dedup):
    dataset = made()
    weights = np.arange(1.0, len(dataset) + 1)
    plan = plan_of(dataset, probs=weights / weights.sum(), dedup=dedup)
    batches = list(data.batches(dataset, plan, loss_on=loss_on))
    assert len(batches) == plan.total_steps
    seen = []
    for step, batch in enumerate(batches):
        dtypes = {name: (values.dtype.name, values.shape) for name, values in batch.items()}
        assert dtypes == {
            name: ("float32" if name == "loss_weights" else "int32", (4, 64))
            for name in ("tokens", "targets", "loss_weights", "segments", "positions", "example_index")
        }
        for row in range(4):
            indices = plan.rows_of(step)[row]
            for segment, index in enumerate(indices, 1):
                here = batch["segments"][row] == segment
                assert set(batch["example_index"][row][here]) == {index}
                assert np.array_equal(batch["tokens"][row][here], dataset.tokens(index))
                assert np.array_equal(batch["targets"][row][here][:-1], dataset.tokens(index)[1:])
                assert np.array_equal(batch["loss_weights"][row][here][:-1] > 0, dataset.mask(index, loss_on)[1:])
                assert batch["loss_weights"][row][here][-1] == 0
                assert batch["positions"][row][here].tolist() == list(range(len(dataset.tokens(index))))
                seen.append(int(index))
            padding = batch["segments"][row] == 0
            assert (batch["example_index"][row][padding] == -1).all() and not batch["loss_weights"][row][padding].any()
            assert padding.sum() == 64 - dataset.lengths[indices].sum()
    assert sorted(seen) == sorted(np.concatenate(plan.draws).tolist())


def random_dataset(sizes, seed):
    """Examples of random tokens, padding's id and EOS's among them, and of random masks."""
    rng, n = np.random.default_rng(seed), sum(sizes)
    return data.Dataset(
        flat_tokens=rng.integers(0, 4, n).astype(np.int32), flat_mask=rng.random(n) < 0.5,
        offsets=np.cumsum([0, *sizes]), rows=np.zeros((len(sizes), 2), np.int64), prefixes=("f:",),
        fingerprint="", tokenizer_fingerprint="", report=data.Report(len(sizes), n, 0, 0, 0, max(sizes)),
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 16), min_size=1, max_size=20), st.integers(1, 4), st.booleans(),
    st.sampled_from(["completion", "all"]), st.integers(0, 99),
)  # fmt: skip
def test_packed_rows_are_the_drawn_examples(sizes, batch_size, weighted, loss_on, seed):
    """Read back from the arrays alone: every draw once, whole, with its mask, and nothing besides."""
    dataset = random_dataset(sizes, seed)
    probs = np.full(len(dataset), 1 / len(dataset)) if weighted else None
    plan = epochs.plan(dataset.lengths, seq_len=16, batch_size=batch_size, seed=seed, epochs=2, probs=probs)
    found = []
    for batch in (data.batch(dataset, plan, step, loss_on=loss_on) for step in range(plan.total_steps)):
        for row in range(batch_size):
            arrays = {name: values[row] for name, values in batch.items()}
            for segment in range(1, arrays["segments"].max() + 1):
                tokens, weights, index = (
                    arrays[name][arrays["segments"] == segment] for name in ("tokens", "loss_weights", "example_index")
                )
                assert len(set(index.tolist())) == 1
                assert tokens.tolist() == dataset.tokens(index[0]).tolist()
                assert weights.tolist() == [*dataset.mask(index[0], loss_on)[1:].astype(float), 0.0]
                found.append(int(index[0]))
            assert not arrays["loss_weights"][arrays["segments"] == 0].any()
    assert sorted(found) == sorted(np.concatenate(plan.draws).tolist())


@pytest.mark.parametrize("hosts", [2, 4])
def test_every_hosts_slice_is_that_of_a_single_host(hosts):
    dataset = made()
    plan = plan_of(dataset)
    whole = list(data.batches(dataset, plan))
    readers = [data.batches(dataset, plan, rows=rows) for rows in np.array_split(np.arange(4), hosts)]
    for batch, *slices in zip(whole, *readers, strict=True):
        assert all(len(part["tokens"]) == 4 // hosts for part in slices)
        assert_equal(batch, stacked(slices))


def test_from_any_step_on_it_is_the_tail():
    dataset = made()
    plan = plan_of(dataset)
    whole = list(data.batches(dataset, plan))
    assert len(whole) > 6
    for start in range(plan.total_steps):
        assert_equal(stacked(whole[start:]), stacked(data.batches(dataset, plan, start_step=start)))
        assert_equal(whole[start], data.batch(dataset, plan, start))
    assert list(data.batches(dataset, plan, start_step=plan.total_steps)) == []


def test_resuming_on_another_number_of_hosts():
    dataset = made()
    plan = plan_of(dataset)
    whole = stacked(data.batches(dataset, plan))
    before = stacked(data.batch(dataset, plan, step) for step in range(3))
    after = [data.batches(dataset, plan, start_step=3, rows=rows) for rows in ([0, 1], [2, 3])]
    after = stacked(stacked(slices) for slices in zip(*after, strict=True))
    assert_equal(whole, stacked([before, after]))


def test_nothing_before_the_first_step_is_read(monkeypatch):
    dataset = made()
    plan, asked = plan_of(dataset), []
    rows_of = epochs.Plan.rows_of
    monkeypatch.setattr(epochs.Plan, "rows_of", lambda self, step: asked.append(step) or rows_of(self, step))
    reader = data.batches(dataset, plan, start_step=5, threads=2, prefetch=2)
    next(reader)
    reader.close()
    assert min(asked) == 5


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 1), (8, 16)])
def test_threads_do_not_change_the_order(threads, prefetch):
    dataset = made()
    plan = plan_of(dataset)
    read = data.batches(dataset, plan, threads=threads, prefetch=prefetch)
    assert_equal(stacked(read), stacked(data.batch(dataset, plan, step) for step in range(plan.total_steps)))


def test_errors_in_a_thread_surface(monkeypatch):
    dataset = made()
    plan, layout = plan_of(dataset), packing.layout

    def broken(tokens, masks, index, seq_len):
        if plan.rows_of(3)[0].tolist() == list(index):
            raise RuntimeError("in the worker")
        return layout(tokens, masks, index, seq_len)

    monkeypatch.setattr(packing, "layout", broken)
    reader = data.batches(dataset, plan)
    for _ in range(3):
        next(reader)
    with pytest.raises(RuntimeError, match="in the worker"):
        next(reader)


def test_leaving_early_stops_the_threads():
    dataset = made()
    for batch in data.batches(dataset, plan_of(dataset, epochs=20)):
        assert batch
        break
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(5)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start_step": -1}, "start_step = -1 is outside 0 to"),
        ({"start_step": 999}, "start_step = 999 is outside 0 to"),
        ({"rows": [3, 4]}, r"rows \[3, 4\] are not all among the 4 of a batch"),
        ({"loss_on": "prompt"}, "loss_on 'prompt' is unknown"),
    ],
)
def test_batches_errors_come_at_once(given, message):
    dataset = made()
    with pytest.raises(ValueError, match=message):
        data.batches(dataset, plan_of(dataset), **given)


def test_grain_is_quiet():
    """In a fresh process, where every warning is an error and nothing is printed."""
    code = "import sys; sys.path.insert(0, 'tests'); import test_data as t; from wmss_jax import data; d = t.made(20); "
    code += "print(sum(1 for _ in data.batches(d, t.plan_of(d))))"
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.strip().isdigit() and not ran.stderr, ran.stderr
