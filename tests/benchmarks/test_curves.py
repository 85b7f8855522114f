"""The script that lays loss curves of two backends on each other."""

import json

import pytest

from benchmarks.curves import Difference, compare, curve_config, make_batches, parse


def test_torch_and_reference_learn_the_same_within_rounding(capsys):
    options = ["--small", "--device", "cpu", "--steps", "25", "--tokens", "256"]
    found = compare(parse([*options, "--backends", "torch", "reference"]))
    named = {difference.name: difference for difference in found}
    assert named["torch and reference, float32"].largest < 1e-3
    assert 0 < named["torch and nudged, float32"].largest < 1e-2
    assert named["torch and reference, bfloat16"].largest < 0.2
    start, end = capsys.readouterr().out.splitlines()[0].split(": ")[1].split(", ")
    assert float(end) < float(start) - 0.2, "there is something to learn"


def test_the_last_line_is_json(capsys):
    compare(parse(["--small", "--device", "cpu", "--steps", "1", "--backends", "torch"]))
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["steps"] == 1
    assert record["rows"][0]["name"] == "torch and nudged, float32"


def test_batches_are_the_same_each_time_and_differ_among_each_other():
    config = curve_config(is_small=True)
    one, two = (make_batches(config, 2, 64, 1, "cpu") for _ in range(2))
    ids = [[batch.batch.token_ids.tolist() for batch in batches] for batches in (one, two)]
    assert ids[0] == ids[1]
    assert ids[0][0] != ids[0][1]


def test_differences_are_of_curves_of_equal_length():
    difference = Difference.between("x", [3.0, 2.0], [3.5, 2.0])
    assert (difference.largest, difference.mean) == (0.5, 0.25)
    assert difference.finals == (2.0, 2.0)
    with pytest.raises(ValueError, match="zip"):
        Difference.between("x", [1.0], [1.0, 2.0])
