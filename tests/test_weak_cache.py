"""Hidden states on disk: what comes back is what was written, or an error. Run: pytest tests/test_weak_cache.py"""

import json
import shutil
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from wmss_jax import data, weak_cache
from wmss_jax.weak_cache import CacheDamaged, WeakCache, Writer

WIDTH = 8
IDENTITY = {"data set": "d1", "tokenizer": "t1", "truncation": "error at 64 tokens", "model": "m1"}
AGAIN = "make it again with `wmss score --cache-hidden`, or remove it"


@pytest.fixture(params=["one shard", "several"])
def sizes(request, monkeypatch):
    """Chunks of 4 tokens; all of them in one shard, or two in a shard."""
    shrink(monkeypatch, 1 << 20 if request.param == "one shard" else 128)


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch, 128)


def shrink(monkeypatch, shard_bytes):
    monkeypatch.setattr(weak_cache, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(weak_cache, "_SHARD_BYTES", shard_bytes)


def dataset_of(*examples):
    """A data set of these examples' tokens; masks have no part in a cache."""
    flat, lengths = np.concatenate(examples).astype(np.int32), [len(tokens) for tokens in examples]
    return data.Dataset(
        flat_tokens=flat, flat_mask=np.ones(len(flat), bool), offsets=np.cumsum([0, *lengths]),
        rows=np.zeros((len(examples), 2), np.int64), prefixes=("f:",), fingerprint="d1", tokenizer_fingerprint="t1",
        report=data.Report(len(examples), len(flat), 0, 0, 0, max(lengths)),
    )  # fmt: skip


def made(n=12, seed=0):
    """n different examples of 1 to 9 tokens, and two that are there again."""
    rng = np.random.default_rng(seed)
    examples = [np.r_[i, rng.integers(0, 3, rng.integers(9))] for i in range(n)]
    return dataset_of(*examples, examples[5], examples[0])


def hidden_of(dataset, seed=0, width=WIDTH):
    """Every bit pattern may occur, NaN's too; examples of the same tokens have the same states."""
    rng, first = np.random.default_rng(seed), weak_cache.unique(dataset)
    states = [rng.integers(0, 1 << 16, (n, width), np.uint16).view(ml_dtypes.bfloat16) for n in dataset.lengths]
    return [states[index] for index in first]


def write(directory, dataset, hidden, identity=IDENTITY, order=None, **given):
    with Writer(directory, dataset, WIDTH, identity, **given) as writer:
        for index in range(len(dataset)) if order is None else order:
            writer.add(int(index), hidden[index])


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == ml_dtypes.bfloat16 and one.shape == two.shape
        assert one.tobytes() == two.tobytes()


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def refusal(directory, dataset, identity=IDENTITY, kind=ValueError):
    """The message with which a cache is not opened: one line that begins with the directory."""
    with pytest.raises(kind) as error:
        WeakCache.open(directory, dataset, identity)
    message = str(error.value)
    assert message.startswith(f"{directory}: ") and "\n" not in message
    return message.removeprefix(f"{directory}: ")


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_in_any_order(tmp_path, sizes, seed):
    dataset = made(seed=seed)
    hidden = hidden_of(dataset, seed)
    rng = np.random.default_rng(seed)
    write(tmp_path / "cache", dataset, hidden, order=rng.permutation(len(dataset)))
    cache = WeakCache.open(tmp_path / "cache", dataset, IDENTITY)
    assert cache.width == WIDTH
    wanted = rng.integers(0, len(dataset), 40)
    for indices in (wanted, tuple(wanted), wanted.tolist(), []):
        assert_same(cache.read(indices), [hidden[index] for index in indices])
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_chunks_of_zeros_are_no_missing_chunks(tmp_path, sizes):
    dataset = made()
    hidden = [np.zeros_like(states) for states in hidden_of(dataset)]
    write(tmp_path / "cache", dataset, hidden)
    assert_same(WeakCache.open(tmp_path / "cache", dataset, IDENTITY).read(range(len(dataset))), hidden)


def test_the_same_tokens_are_stored_once(tmp_path):
    examples = [np.full(50, i) for i in range(20)]
    once, many = dataset_of(*examples), dataset_of(*examples, *examples, *examples)
    assert weak_cache.unique(many).tolist() == [*range(20)] * 3
    assert weak_cache.needed_bytes(once, WIDTH) == weak_cache.needed_bytes(many, WIDTH) == 20 * 50 * WIDTH * 2
    stored = []
    for name, dataset in (("once", once), ("many", many)):
        write(tmp_path / name, dataset, hidden_of(dataset))
        stored.append(sum(file.stat().st_size for file in files(tmp_path / name / "hidden" / "c")))
    assert stored[0] == stored[1] == 20 * 50 * WIDTH * 2 + 4 + 16 + 4  # a chunk with its checksum, and an index


def test_only_equal_tokens_are_the_same():
    first = weak_cache.unique(dataset_of([1, 2], [1], [2], [1, 2, 0], [1, 2], [2, 1], [258], [1, 2, 0]))
    assert first.tolist() == [0, 1, 2, 3, 0, 5, 6, 3] and first.dtype == np.int64


def test_eight_threads_read_at_once(tmp_path, small):
    dataset = made(60)
    hidden = hidden_of(dataset)
    write(tmp_path / "cache", dataset, hidden)
    cache, together = WeakCache.open(tmp_path / "cache", dataset, IDENTITY), threading.Barrier(8)

    def read(seed):
        together.wait()
        for indices in np.random.default_rng(seed).integers(0, len(dataset), (20, 7)):
            assert_same(cache.read(indices), [hidden[index] for index in indices])
        return True

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [True] * 8


def test_examples_longer_than_a_shard(tmp_path, small):
    dataset = dataset_of(np.arange(3), np.arange(50), np.arange(7))
    hidden = hidden_of(dataset)
    write(tmp_path / "cache", dataset, hidden, order=[2, 1, 0])
    assert len(files(tmp_path / "cache" / "hidden" / "c")) == 8  # 60 tokens, 8 a shard
    assert_same(WeakCache.open(tmp_path / "cache", dataset, IDENTITY).read([0, 1, 2]), hidden)


def test_no_such_example(tmp_path):
    dataset = made()
    write(tmp_path / "cache", dataset, hidden_of(dataset))
    cache = WeakCache.open(tmp_path / "cache", dataset, IDENTITY)
    for index in (-1, len(dataset)):
        with pytest.raises(ValueError, match=rf"/cache: examples are 0 to 13, not {index}$"):
            cache.read([0, index])


# -- writing ----------------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_more_than_the_budget_is_refused_before_anything_is_written(tmp_path):
    dataset = made()
    needed = weak_cache.needed_bytes(dataset, WIDTH)
    with pytest.raises(ValueError) as error, Writer(tmp_path / "a/cache", dataset, WIDTH, IDENTITY, needed - 1):
        pass
    assert str(error.value) == (
        f"{tmp_path}/a/cache: the weak agent's hidden states need {needed} bytes, {needed - 1} bytes are allowed: "
        "raise joint.weak.cache_budget_gb, or use joint.weak.placement=resident"
    )
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "a/cache", dataset, hidden_of(dataset), budget_bytes=needed)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    dataset = dataset_of(np.arange(1_000_000))
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(0, 0, 2_040_000_000))
    with pytest.raises(ValueError) as error, Writer(tmp_path / "a/cache", dataset, 1000, IDENTITY):
        pass
    assert str(error.value) == (
        f"{tmp_path}/a/cache: the weak agent's hidden states need 2 GB and 2 % to spare, 2.04 GB are free: "
        "free space, or use joint.weak.placement=resident"
    )
    assert asked == [tmp_path] and list(tmp_path.iterdir()) == []


def test_what_exists_is_not_written_over(tmp_path):
    dataset = made()
    write(tmp_path / "cache", dataset, hidden_of(dataset))
    before = {file: file.read_bytes() for file in files(tmp_path)}
    with pytest.raises(FileExistsError, match="/cache: exists already"):
        write(tmp_path / "cache", dataset, hidden_of(dataset))
    assert before == {file: file.read_bytes() for file in files(tmp_path)}


def test_missing_examples_are_refused(tmp_path, small):
    dataset = made()
    with pytest.raises(ValueError, match=r"/cache: no hidden states of 2 examples, e.g. \[3, 7\] were added; nothing"):
        write(tmp_path / "cache", dataset, hidden_of(dataset), order=[i for i in range(14) if i not in (3, 7)])
    assert list(tmp_path.iterdir()) == []
    # Of examples that are there twice the first one counts.
    with pytest.raises(ValueError, match=r"1 examples, e.g. \[5\]"):
        write(tmp_path / "cache", dataset, hidden_of(dataset), order=[i for i in range(14) if i != 5])
    write(tmp_path / "cache", dataset, hidden_of(dataset), order=range(12))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (1, lambda hidden: hidden[:-1], r"of example 1 are bfloat16\[5, 8\], not bfloat16\[6, 8\]"),
        (1, lambda hidden: hidden[:, :4], r"of example 1 are bfloat16\[6, 4\], not bfloat16\[6, 8\]"),
        (1, lambda hidden: hidden.astype(np.float32), r"of example 1 are float32\[6, 8\], not bfloat16\[6, 8\]"),
        (0, lambda hidden: hidden, "of example 0 came twice"),
        (-1, lambda hidden: hidden, "example -1: examples are 0 to 1"),
        (2, lambda hidden: hidden, "example 2: examples are 0 to 1"),
    ],
)
def test_what_cannot_be_added(tmp_path, index, change, message):
    dataset = dataset_of(np.arange(4), np.arange(6))
    hidden = hidden_of(dataset)
    with pytest.raises(ValueError, match=message), Writer(tmp_path / "cache", dataset, WIDTH, IDENTITY) as writer:
        writer.add(0, hidden[0])
        writer.add(index, change(hidden[index % 2]))
    assert list(tmp_path.iterdir()) == []


def test_a_pass_that_breaks_off_leaves_nothing(tmp_path, small):
    dataset = made()
    hidden = hidden_of(dataset)
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "cache", dataset, WIDTH, IDENTITY) as writer:
        for index in range(8):
            writer.add(index, hidden[index])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, small, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    dataset = made()
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "cache", dataset, hidden_of(dataset))
    assert list(tmp_path.iterdir()) == []


def test_what_tensorstore_cannot_write_is_an_os_error(tmp_path, small):
    dataset = made()
    hidden = hidden_of(dataset)
    with pytest.raises(OSError, match=r"/cache: could not be written: "):  # noqa: SIM117
        with Writer(tmp_path / "cache", dataset, WIDTH, IDENTITY) as writer:
            writer._wait()
            (tmp_path / "cache.partial-new/hidden/c").write_text("in the way")
            for index in range(len(dataset)):
                writer.add(index, hidden[index])
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_no_cache_and_goes(tmp_path, small):
    dataset = made()
    hidden = hidden_of(dataset)
    writer = Writer(tmp_path / "cache", dataset, WIDTH, IDENTITY).__enter__()
    for index in range(10):
        writer.add(index, hidden[index])
    writer._wait()  # a kill would end TensorStore's threads too
    left = tmp_path / "cache.partial-new"
    assert len(files(left)) > 2
    for directory in (tmp_path / "cache", left):
        assert refusal(directory, dataset, kind=CacheDamaged).startswith("not a weak cache, or not a finished one")
    write(tmp_path / "cache", dataset, hidden)
    assert not left.exists()
    assert_same(WeakCache.open(tmp_path / "cache", dataset, IDENTITY).read(range(len(dataset))), hidden)


# -- caches of something else -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [*[[name] for name in IDENTITY], [*IDENTITY], ["model", "truncation"]])
def test_every_difference_is_named(tmp_path, names):
    dataset = made()
    write(tmp_path / "cache", dataset, hidden_of(dataset))
    here = IDENTITY | {name: "new" for name in names}
    differences = " and ".join(f"another {name} ({IDENTITY[name]}, here new)" for name in here if name in names)
    assert refusal(tmp_path / "cache", dataset, here) == f"made for {differences}; {AGAIN}"


def test_what_only_one_of_them_says_is_a_difference(tmp_path):
    dataset = made()
    write(tmp_path / "cache", dataset, hidden_of(dataset))
    more, less = IDENTITY | {"dtype": "bfloat16"}, {name: IDENTITY[name] for name in [*IDENTITY][:-1]}
    assert refusal(tmp_path / "cache", dataset, more).startswith("made for another dtype (None, here bfloat16); ")
    assert refusal(tmp_path / "cache", dataset, less).startswith("made for another model (m1, here None); ")


def test_other_lengths_are_noticed_whatever_the_identity_says(tmp_path):
    dataset = dataset_of([1, 2], [3], [4, 5, 6])
    write(tmp_path / "cache", dataset, hidden_of(dataset))
    for other in (dataset_of([1, 2], [3]), dataset_of([1], [2, 3], [4, 5, 6]), dataset_of([1, 2], [3], [4, 5, 6, 7])):
        assert refusal(tmp_path / "cache", other).startswith("made for examples of other lengths")


def test_a_newer_format(tmp_path, monkeypatch):
    dataset = made()
    monkeypatch.setattr(weak_cache, "FORMAT", 2)
    write(tmp_path / "cache", dataset, hidden_of(dataset))
    monkeypatch.undo()
    message = refusal(tmp_path / "cache", dataset)
    assert message == "format 2; this version reads up to 1: update wmss-jax"


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, small):
    """(directory, data set, hidden states) of a finished cache of several shards of two chunks each."""
    dataset = made()
    hidden = hidden_of(dataset)
    write(tmp_path / "cache", dataset, hidden)
    return tmp_path / "cache", dataset, hidden


def damage(directory, dataset):
    """The message with which a damaged cache is not opened, or its examples are not read; None if they are."""
    try:
        opened = WeakCache.open(directory, dataset, IDENTITY)
        for index in range(len(dataset)):
            opened.read([index])
    except ValueError as error:
        assert str(error).startswith(f"{directory}: ") and "\n" not in str(error) and len(str(error)) < 400
        return str(error)
    return None


def test_every_flipped_bit_is_noticed(cache):
    """In any file and any place: meta.json's spaces too, which it is simpler to guard than to except."""
    directory, dataset, _ = cache
    rng = np.random.default_rng(0)
    shards, others = files(directory / "hidden/c"), [directory / "meta.json", directory / "offsets.npy"]
    others.append(directory / "hidden/zarr.json")
    assert sorted([*shards, *others]) == files(directory) and len(shards) > 3
    for file in files(directory):
        good = file.read_bytes()
        for bit in rng.choice(8 * len(good), 12, replace=False).tolist():
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bad)
            message = damage(directory, dataset)
            assert message, f"bit {bit} of {file}"
            assert message.endswith(AGAIN) and (file in shards or file.name in message)
        file.write_bytes(good)
    assert damage(directory, dataset) is None


def test_every_flipped_bit_of_a_shard_is_noticed_by_all_who_read_there(cache):
    directory, dataset, hidden = cache
    file = files(directory / "hidden/c")[1]
    good, wrong = file.read_bytes(), 0
    for byte in range(0, len(good), 3):
        bad = bytearray(good)
        bad[byte] ^= 1 << byte % 8
        file.write_bytes(bad)
        opened = WeakCache.open(directory, dataset, IDENTITY)
        for index in range(2, 8):
            try:
                assert_same(opened.read([index]), [hidden[index]])
            except CacheDamaged:
                wrong += 1
    assert wrong > len(good) / 3


def test_a_flip_is_told_of_in_one_short_line(cache):
    directory, dataset, _ = cache
    file = files(directory / "hidden/c")[0]
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(CacheDamaged) as error:
        WeakCache.open(directory, dataset, IDENTITY).read([0])
    assert str(error.value).startswith(f"{directory}: damaged (Digest mismatch, stored digest is 0x")
    assert str(error.value).endswith(f"); {AGAIN}")


@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_every_truncated_file_is_noticed_at_opening(cache, keep):
    directory, dataset, _ = cache
    for file in files(directory):
        good = file.read_bytes()
        file.write_bytes(good[: int(keep * len(good)) if keep >= 0 else -1])
        message = refusal(directory, dataset, kind=CacheDamaged)
        assert str(file.relative_to(directory)) in message and message.endswith(AGAIN)
        file.write_bytes(good)


def test_every_missing_file_is_noticed_at_opening(cache):
    directory, dataset, _ = cache
    for file in files(directory):
        good = file.read_bytes()
        file.unlink()
        message = refusal(directory, dataset, kind=CacheDamaged)
        assert str(file.relative_to(directory)) in message and message.endswith(AGAIN)
        file.write_bytes(good)
    (directory / "notes.txt").write_text("files besides do no harm")
    assert damage(directory, dataset) is None


def test_what_goes_missing_after_opening_never_reads_as_zeros(cache):
    directory, dataset, hidden = cache
    opened = WeakCache.open(directory, dataset, IDENTITY)
    shutil.rmtree(directory / "hidden/c")
    for index in range(len(dataset)):
        with pytest.raises(CacheDamaged, match=r"/cache: damaged .*is missing"):
            opened.read([index])


def test_a_chunk_that_its_shard_does_not_list_never_reads_as_zeros(cache):
    """The index of a shard gives every chunk's place and size; all ones, under a checksum that agrees, is none."""
    import google_crc32c

    directory, dataset, _ = cache
    file = files(directory / "hidden/c")[0]
    content = file.read_bytes()
    index = b"\xff" * 16 + content[-20:-4]  # two chunks of 16 bytes each, and the checksum
    file.write_bytes(content[:-36] + index + google_crc32c.value(index).to_bytes(4, "little"))
    with pytest.raises(CacheDamaged, match=r"/cache: damaged .*is missing"):
        WeakCache.open(directory, dataset, IDENTITY).read([0])


def test_no_cache_at_all(tmp_path):
    dataset = made()
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("none", "file", "empty"):
        assert refusal(tmp_path / name, dataset, kind=CacheDamaged) == (
            f"not a weak cache, or not a finished one: it has no meta.json; {AGAIN}"
        )
    for text in ("", "[]", "{}", "null", '{"format": 1}', json.dumps({"format": 1, "crc32c": "00000000"})):
        (tmp_path / "empty/meta.json").write_text(text)
        assert refusal(tmp_path / "empty", dataset, kind=CacheDamaged) == f"meta.json is damaged; {AGAIN}"


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_the_cost_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 96_000_000_000))
    dataset = dataset_of(*[np.arange(256) + i for i in range(1000)])
    assert weak_cache.cost(tmp_path / "cache", dataset, width=1024, tokens_per_step=16384) == (
        "weak cache: 524.3 MB on disk (256,000 unique tokens x 2.048 KB; 96 GB free); a training step reads "
        "50.2 MB for 33.55 MB, in chunks of 262.1 KB; 1 GB/s is 326,371 tokens/s"
    )
