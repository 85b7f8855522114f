"""A report shows every number with its spread, and says what it leaves out."""

import json

import pytest

from benchmarks.report import Measurement, Skipped, environment, print_report, readable


def test_the_median_is_not_moved_by_one_disturbed_repeat():
    assert Measurement("a", "tok/s", (10.0, 11.0, 1.0)).median == 10.0


def test_a_report_ends_with_one_json_line_of_everything(capsys):
    measurements = [
        Measurement("slow", "tok/s", (2.0, 3.0, 2.5)),
        Measurement("fast", "tok/s", (5.0,), baseline="slow", labels={"cell": "decode 1"}),
    ]
    returned = print_report(measurements, environment(3), [Skipped("other", "not installed")])
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record == json.loads(json.dumps(returned))
    assert [each["values"] for each in record["measurements"]] == [[2.0, 3.0, 2.5], [5.0]]
    assert record["skipped"] == [{"name": "other", "reason": "not installed"}]
    assert record["num_threads"] == 3
    assert record["command"].startswith("python")
    assert any("2.00x of slow" in line for line in lines)
    assert any("2.50 tok/s  [2.00 to 3.00]" in line for line in lines)
    assert "not measured: other: not installed" in lines


@pytest.mark.parametrize(
    "value, shown",
    [
        (1234.4, "1,234"),
        (99.96, "100.0"),
        (3.14159, "3.14"),
        (0.0234, "0.023"),
        (0.00002, "2.0e-05"),
    ],
)
def test_small_numbers_keep_digits_and_large_ones_drop_them(value, shown):
    assert readable(value) == shown
