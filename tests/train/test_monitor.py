import json
import math

import pytest
import torch

from qnext.train.monitor import RunLog, peak_flops, routing_report


def read(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_log_tells_no_step_twice_and_drops_torn_lines(tmp_path):
    log = RunLog(tmp_path, resume_step=0, use_tensorboard=False)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    log = RunLog(tmp_path, resume_step=2, use_tensorboard=False)
    log.write("train", 3, {"loss": 0.25})
    log.close()
    assert [(record["step"], record["loss"]) for record in read(tmp_path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.25),
    ]


def test_numbers_that_json_lacks_are_written_as_words(tmp_path):
    log = RunLog(tmp_path, resume_step=0, use_tensorboard=False)
    log.write("skip", 1, {"loss": math.nan, "more": {"norm": math.inf}})
    log.close()
    assert read(tmp_path)[0]["loss"] == "nan"
    assert read(tmp_path)[0]["more"]["norm"] == "inf"


def test_the_routing_report_tells_even_from_collapsed():
    counts = torch.tensor([[5.0, 5.0, 5.0, 5.0], [20.0, 0.0, 0.0, 0.0]])
    probs = counts / 20
    entropy = torch.tensor([math.log(4), 0.0])
    report = routing_report(counts, probs, entropy)
    assert report["max_load"] == pytest.approx([1, 4])
    assert report["entropy"] == pytest.approx([1, 0])
    assert report["token_entropy"] == pytest.approx([1, 0])
    assert report["dead_experts"] == [0, 3]
    assert report["balance"] == pytest.approx([1, 4])


def test_a_cpu_has_no_peak_to_compare_with():
    assert peak_flops(torch.device("cpu")) is None
