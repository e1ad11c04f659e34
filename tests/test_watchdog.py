"""A stalled process says where it waits."""

import threading
import time

import pytest

from wmss_jax.watchdog import watching


def hang_here(seconds):
    threading.Event().wait(seconds)


def test_a_stall_is_reported_with_what_and_where(tmp_path):
    with open(tmp_path / "err", "w") as out, watching(0.1, "start-up", out) as watchdog:
        watchdog.at("step 7")
        hang_here(0.6)
    said = (tmp_path / "err").read_text()
    assert "step 7 for 0 s now" in said and "in hang_here" in said and "start-up" not in said
    assert 1 <= said.count("step 7") <= 3, "again only when it has taken twice as long"


def test_who_gets_on_is_left_alone(tmp_path):
    with open(tmp_path / "err", "w") as out, watching(0.3, "start-up", out) as watchdog:
        for number in range(20):
            watchdog.at(f"step {number}")
            time.sleep(0.03)
    assert not (tmp_path / "err").read_text()


@pytest.mark.parametrize("stall_s", [None, 60])
def test_errors_pass_and_the_thread_ends(stall_s):
    before = threading.active_count()
    with pytest.raises(KeyError), watching(stall_s, "start-up"):
        raise KeyError
    assert threading.active_count() == before
