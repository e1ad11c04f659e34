"""Metrics of a stage: one line a step, none twice after a resume. Run: pytest tests/test_tracking.py"""

import builtins
import io
import json
import time

import jax.numpy as jnp
import pytest
from rich.console import Console

from wmss_jax.tracking import Tracker


def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def track(work_dir, steps, total_steps=10, console=None, **settings):
    console = console or plain()
    with Tracker(work_dir, total_steps, console=console, **settings) as tracker:
        for step in steps:
            tracker.log(step, {"loss": step / 4, "tokens_per_s": 12345.6})
    return console.file.getvalue()


def lines(work_dir):
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]


def test_one_object_a_line(tmp_path):
    before = time.time()
    track(tmp_path / "new/stage", [1, 2])
    first, second = lines(tmp_path / "new/stage")
    assert (first["step"], first["loss"], second["step"]) == (1, 0.25, 2)
    assert before - 1 < first["time"] <= second["time"] < time.time() + 1


def test_lines_can_be_read_while_it_runs(tmp_path):
    with Tracker(tmp_path, 10, console=plain()) as tracker:
        tracker.log(1, {"loss": 2.0})
        assert lines(tmp_path)[0]["loss"] == 2.0


def test_resumed_run_has_no_duplicates(tmp_path):
    track(tmp_path, [1, 2, 3, 4, 5])
    track(tmp_path, [4, 5, 6], start_step=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    track(tmp_path, [1])  # from the start
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_torn_last_line_is_dropped(tmp_path):
    track(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    track(tmp_path, [4], start_step=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4]


def test_device_scalars_and_not_finite_values(tmp_path):
    with Tracker(tmp_path, 10, console=plain()) as tracker:
        tracker.log(1, {"loss": jnp.float32(0.5), "nan": float("nan"), "inf": float("inf")})
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert strict["loss"] == 0.5 and strict["nan"] is None and strict["inf"] is None


def test_reserved_names(tmp_path):
    with Tracker(tmp_path, 10, console=plain()) as tracker, pytest.raises(ValueError, match="step or time"):
        tracker.log(1, {"time": 1.0})


def test_only_the_primary_writes(tmp_path):
    out = track(tmp_path / "stage", [1, 2], primary=False, tensorboard=True)
    assert out == "" and not (tmp_path / "stage").exists()


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    out = track(tmp_path, range(1, 11)).splitlines()
    assert out[0] == "step 1/10  loss 0.2500  12,346 tokens/s"
    assert out[1] == "step 10/10  loss 2.5000  12,346 tokens/s  ETA 0:00:00"
    assert len(out) == 2  # the others came within 30 s
    assert len(track(tmp_path, range(1, 11), plain_every_s=0).splitlines()) == 10


def test_utilisation_is_shown_where_it_is_known(tmp_path):
    console = plain()
    with Tracker(tmp_path, 10, console=console) as tracker:
        tracker.log(1, {"loss": 1.0, "tokens_per_s": 10.0, "mfu": 0.4123})
    assert console.file.getvalue() == "step 1/10  loss 1.0000  10 tokens/s  41.2% of peak\n"


def test_eta_goes_by_the_pace_since_the_first_step(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = plain()
    with Tracker(tmp_path, 2000, console=console, start_step=500, plain_every_s=0) as tracker:
        now += 600  # compiling
        tracker.log(510, {})
        now += 20
        tracker.log(520, {})
    assert console.file.getvalue().splitlines()[1] == "step 520/2000  ETA 0:49:20"


def test_bar_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    out = track(tmp_path, [6, 7], start_step=5, console=console)
    assert "7/10" in out and "loss 1.7500" in out and "tokens/s" in out and "ETA" in out
    assert out.endswith("\n\x1b[?25h")  # the cursor is back


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    track(tmp_path, [1, 2], tensorboard=True)
    track(tmp_path, [2, 3], tensorboard=True, start_step=1)
    seen = []
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # TFRecord: length, its checksum, record, its checksum
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                seen.append(("purge", event.step))
            seen += [(value.tag, event.step) for value in event.summary.value if value.tag == "loss"]
    assert seen == [("purge", 1), ("loss", 1), ("loss", 2), ("purge", 2), ("loss", 2), ("loss", 3)]


def test_missing_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tensorboardX":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'wmss-jax\[tracking\]'"):
        Tracker(tmp_path, 10, tensorboard=True, console=plain())
