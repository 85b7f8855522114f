"""Candidates of a tuner are compiled by other processes, without a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from benchmarks.ops.tune_experts import candidates, row_tiles
from qnext.kernels.experts.triton_config import Tile

SCRIPT = """
from triton.backends.compiler import GPUTarget
from benchmarks.ops.compile_ahead import compile_ahead
from benchmarks.ops.experts import Shape
from benchmarks.ops.tune_experts import launch_candidate
from qnext.kernels.experts.triton_config import Tile

if __name__ == "__main__":
    shape = Shape(4, 2, 256, 512)
    tries = [
        (shape, "up", 128, Tile(128, 64, 8, 4, True)),
        (shape, "down", 128, Tile(256, 64, 8, 3, True)),
        (shape, "up", 16, Tile(64, 64, 4, 3)),
        (shape, "down", 16, Tile(100, 64, 4, 3)),
    ]
    print(*compile_ahead(launch_candidate, tries, GPUTarget("cuda", 90, 32), 2), sep="\\n")
"""


@pytest.mark.slow
def test_kernels_land_in_the_cache_and_what_fails_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.getcwd()}
    run = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, check=True
    )
    assert "block_n=100" in run.stdout and run.stdout.count("Tile(") == 1
    kernels = sorted(path.stem for path in (tmp_path / "cache").rglob("*.cubin"))
    assert kernels == ["experts_persistent_kernel"] * 2 + ["experts_up_fwd_kernel"]


def test_candidates_are_distinct_and_few():
    found = candidates([16, 32, 64, 128], [64, 128])
    assert len(set(found)) == len(found) < 200
    assert Tile(128, 64, 8, 4) in row_tiles("up", 128)
