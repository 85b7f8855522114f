"""Passes without launches: what they compile, and what they leave alone."""

import os
import subprocess
import sys

import pytest
import torch

from qnext.kernels.first_pass import ZeroedTensors, compile_ahead_of

# Triton compiles for a GPU that is not there; a launch would need one.
SCRIPT = """
import threading
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime._async_compile import active_mode
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from benchmarks.ops.compile_ahead import TargetOnly
from qnext.kernels.first_pass import compile_ahead_of
from qnext.kernels.row_linear.triton_fwd import RowTile, row_linear_fwd

driver.set_active(TargetOnly(GPUTarget("cuda", 90, 32)))
torch.cuda.get_device_capability = lambda *device: (9, 0)
launch = JITFunction.run
compiled = []
knobs.compilation.listener = lambda **found: compiled.append(
    (found["src"].fn.__name__, found["cache_hit"], threading.current_thread().name)
)
how = {"eps": 1e-6, "out_dtype": torch.float32}
x, weight = torch.ones(4, 64), torch.ones(32, 64)
left = []

def run():
    left.append(row_linear_fwd(x, weight, x[0], None, None, **how))
    left.append(row_linear_fwd(x[:1], weight, None, None, None, **how))
    row_linear_fwd(x[:1], weight, None, None, None, **how)
    row_linear_fwd(x[:1], weight, None, None, None, **how, tile=RowTile(3, 64, 1))

compile_ahead_of(run, torch.device("cuda"))
names = sorted(name for name, _, _ in compiled)
assert names == ["row_linear_dot_kernel", "row_linear_gemv_kernel", "row_norm_kernel"], names
assert not any(hit for _, hit, _ in compiled)
assert all(thread != "MainThread" for _, _, thread in compiled), compiled
assert all(not y.any() for y in left)
assert JITFunction.run is launch

def interrupted():
    row_linear_fwd(x.double().half(), weight.half(), None, None, None, **how)
    raise KeyboardInterrupt

try:
    compile_ahead_of(interrupted, torch.device("cuda"))
except KeyboardInterrupt:
    print("interrupted")
assert JITFunction.run is launch and active_mode.get() is None
assert compile_ahead_of(lambda: 1 / 0, torch.device("cuda"))  # a warning, no more
try:
    row_linear_fwd(x[:1], weight, None, None, None, **how, tile=RowTile(3, 64, 1))
except Exception as problem:
    print("later:", type(problem).__name__)
"""


def test_kernels_of_a_pass_are_compiled_beside_it_and_not_launched(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "interrupted" in done.stdout
    assert "later: " in done.stdout  # what does not compile is told when it is launched
    assert "division by zero" in done.stderr
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 4


def test_a_cpu_needs_no_pass_before_the_first():
    assert not compile_ahead_of(lambda: pytest.fail("it ran"), torch.device("cpu"))


@torch.library.custom_op("qnext::left_open_for_a_test", mutates_args=())
def left_open(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x + 1, torch.full_like(x, 7.0)


def test_results_of_our_own_operators_are_zeros():
    with ZeroedTensors():
        first, second = left_open(torch.ones(3))
    assert not first.any() and not second.any()


def test_tensors_are_made_of_zeros():
    with ZeroedTensors():
        x = torch.empty(3, 2)
        made = (x, torch.empty_like(x), x.new_empty(5), torch.empty_strided((2, 2), (1, 2)))
        kept = torch.ones(2) + 1
    assert not any(y.any() for y in made)
    assert kept.tolist() == [2, 2]
