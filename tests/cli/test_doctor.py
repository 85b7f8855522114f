"""`qnext doctor` names the machine and says why each op runs where it does."""

import json

import pytest

from qnext.cli import doctor
from qnext.cli.main import main

REPORT = {
    "qnext": "0.1.0",
    "revision": None,
    "python": "3.11.7",
    "system": "Linux 6.1 x86_64",
    "packages": {"torch": "2.13.0", "triton": None},
    "cpu": {
        "name": "A CPU",
        "num_cores": 2,
        "features": ["avx2", "fma"],
        "memory_bytes": 8 * 2**30,
        "torch_capability": "AVX2",
        "torch_threads": 2,
        "kernels": {"threads": "one"},
    },
    "cuda": "13.0",
    "gpus": [
        {
            "name": "A GPU",
            "compute_capability": (9, 0),
            "memory_bytes": 80 * 2**30,
            "num_multiprocessors": 132,
            "has_bfloat16": True,
        }
    ],
    "ops": [
        {"op": "rms_norm", "backend": "torch", "reason": "fastest here", "rejected": {}},
        {"op": "moe", "backend": "", "reason": "none fits", "rejected": {"triton": "no GPU"}},
    ],
}


def test_the_report_shows_packages_hardware_and_the_reason_for_each_op():
    text = doctor.render(REPORT)
    for part in (
        "torch   2.13.0",
        "triton  not installed",
        "avx2 fma",
        "8.0 GiB",
        "cuda:0  A GPU, sm_90, 80 GiB",
        "rms_norm  torch: fastest here",
        "moe       NONE: none fits",
        "not triton: no GPU",
    ):
        assert part in text, part


def test_a_machine_without_gpu_says_so():
    text = doctor.render({**REPORT, "gpus": [], "cuda": None})
    assert "a build without CUDA" in text


def test_doctor_lists_every_op_of_this_build(capsys):
    pytest.importorskip("qnext.kernels.dispatch")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"]
    assert report["cpu"]["num_cores"] >= 1
    assert {op["op"] for op in report["ops"]} >= {"rms_norm", "gated_delta_rule"}
    assert all(op["backend"] and op["reason"] for op in report["ops"])
