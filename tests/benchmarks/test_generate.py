"""The benchmark measures what it says, and refuses to time wrong answers."""

import json

import pytest

from benchmarks import generate
from benchmarks.report import Measurement
from qnext.engine.llm import LLM
from tests.engine.tiny import tiny_model

ARGUMENTS = "--repeats 1 --prefill 8 --batch 1 2 --tokens 4 --drafts 0 1".split()


def test_the_median_is_not_moved_by_one_disturbed_repeat():
    assert Measurement("a", "tok/s", (10.0, 11.0, 1.0)).median == 10.0


def test_a_report_ends_with_one_json_line_of_every_measurement(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    generate.main(["--model", str(tmp_path), *ARGUMENTS])
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    names = [each["name"] for each in record["measurements"]]
    assert names == [
        "prefill 8 tokens",
        *(f"decode {count} x 4, k = {drafts}" for count in (1, 2) for drafts in (0, 1)),
    ]
    assert all(len(each["values"]) == 1 for each in record["measurements"])
    assert record["command"].startswith("python")
    assert record["num_threads"] >= 1
    assert any("k = 1" in line and "accepted" in line for line in lines)


def test_configurations_that_write_different_tokens_are_not_timed():
    engines = {
        name: LLM.from_model(tiny_model(seed=seed), num_speculative_tokens=0, max_model_len=64)
        for name, seed in (("0", 1), ("1", 2))
    }
    prompts = generate.decode_prompts(engines["0"], 1)
    with pytest.raises(ValueError, match="k = 1 differ"):
        generate.check_equal_outputs(engines, prompts, 16)
