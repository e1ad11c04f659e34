"""The examples run as they stand, stay short, and do what they say."""

import runpy
from pathlib import Path

import numpy as np

import wmss_jax as wmss

LOOP = Path(__file__).parent.parent / "examples/custom_loop.py"


def test_custom_loop_trains_its_own_objective_and_exports(golden, tmp_path, capsys):
    assert len(LOOP.read_text().splitlines()) <= 40
    main = runpy.run_path(str(LOOP))["main"]
    main(golden / "released_code/weak", golden / "released_code/strong", tmp_path / "out")
    printed = capsys.readouterr().out.splitlines()
    first, last = (eval(line) for line in (printed[0], printed[-1]))
    assert last["loss"] < 0.7 * first["loss"] and 0 < first["known"] <= 1
    _, before = wmss.load(golden / "released_code/strong")
    _, after = wmss.load(tmp_path / "out")
    assert np.abs(np.asarray(after["embed"]) - np.asarray(before["embed"])).max() > 0
