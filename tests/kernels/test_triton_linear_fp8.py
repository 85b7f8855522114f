"""Products with e4m3 weights that carry their scales."""

import pytest
import torch

from tests.kernels.triton_env import DEVICE, HALF, IS_INTERPRETED, error

pytest.importorskip("triton")

from qnext.kernels import dispatch
from qnext.kernels.dispatch import use_backend
from qnext.kernels.experts import triton_fwd as experts
from qnext.kernels.experts_shared.reference import experts_shared_reference
from qnext.kernels.fp8_blocks import dequantized, device_objection, quantize_blocks, widened_blocks
from qnext.kernels.int8_rows import widened
from qnext.kernels.linear import triton_fwd as linear
from qnext.kernels.linear.reference import linear_reference
from qnext.kernels.row_linear import triton_fwd as row_linear
from qnext.kernels.row_linear.reference import row_linear_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def held(num_outputs, size, num_tail=0, dtype=HALF, stack=()):
    """A matrix with its scales, which differ from block to block."""
    weight, scale = quantize_blocks(
        torch.randn(*stack, num_outputs, size, device=DEVICE) * size**-0.5
    )
    weight.block_scale = scale * 2.0 ** torch.randint(-2, 3, scale.shape, device=DEVICE)
    weight.tail = None
    if num_tail:
        weight.tail = torch.randn(num_tail, size, device=DEVICE).to(dtype) * size**-0.5
    return weight


@pytest.fixture
def poisoned_memory(monkeypatch):
    allocate = torch.empty

    def empty(*shape, **how):
        out = allocate(*shape, **how)
        return out.fill_(float("nan")) if out.dtype in TOLERANCE else out

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("num_rows", [1, 7, 16, 33, 130])
@pytest.mark.parametrize(
    "num_outputs, size, num_tail", [(128, 128, 0), (256, 384, 6), (140, 256, 3)]
)
def test_rows_are_multiplied_by_scaled_blocks(num_rows, num_outputs, size, num_tail, is_streamed):
    for dtype in (torch.float32, HALF):
        weight = held(num_outputs, size, num_tail, dtype)
        x = torch.randn(num_rows, size, device=DEVICE).to(dtype)
        assert linear.supports(x, weight) is None
        ours = linear.linear_fp8_fwd(x, weight, None, is_streamed=is_streamed)
        expected = linear_reference(x.double(), widened_blocks(weight, torch.float64))
        assert ours.shape == (num_rows, num_outputs + num_tail)
        assert ours.dtype == dtype
        assert error(ours, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_residual_is_added_and_a_wide_result_is_not_rounded(is_streamed):
    weight = held(128, 256)
    x = torch.randn(5, 256, device=DEVICE).to(HALF)
    residual = torch.randn(5, 128, device=DEVICE).to(HALF)
    expected = linear_reference(x.double(), widened_blocks(weight, torch.float64))
    ours = linear.linear_fp8_fwd(x, weight, residual, is_streamed=is_streamed)
    assert error(ours, expected + residual.double()) < TOLERANCE[HALF]
    if is_streamed:
        wide = linear.linear_fp8_fwd(x, weight, None, out_dtype=torch.float32)
        assert wide.dtype == torch.float32
        assert error(wide, expected) < 1e-5


def test_no_rows_give_no_rows():
    x = torch.empty(0, 256, device=DEVICE, dtype=HALF)
    assert linear.linear_fp8_fwd(x, held(128, 256, 4), None).shape == (0, 132)


def test_written_out_weights_are_their_numbers_times_scales():
    weight = held(140, 256, 3)
    found = linear.dequantize_fwd(weight, weight.tail, HALF)
    assert torch.equal(found, widened_blocks(weight, HALF))
    assert torch.equal(found, widened(weight, HALF))


def test_the_op_takes_scaled_blocks_and_leaves_the_others():
    x, weight = torch.randn(3, 128, device=DEVICE).to(HALF), held(128, 128, 2)
    with use_backend("triton", op="linear"):
        assert dispatch.linear.backend_for(x, weight) == "triton"
        assert error(dispatch.linear(x, weight), linear_reference(x, weight)) < TOLERANCE[HALF]
        with pytest.raises(ValueError, match="not e4m3"):
            dispatch.linear(x, x)
    plain = torch.zeros(4, 128, device=DEVICE, dtype=HALF)
    assert dispatch.linear.backend_for(x, plain) == "torch"
    with pytest.raises(ValueError, match="without its block_scale"):
        dispatch.linear(x, weight.clone())


def test_a_gpu_is_needed_and_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "run on a GPU, not on cpu" in device_objection(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "8.0, fp8 weights need 8.9" in device_objection(torch.device("cuda", 0))


@pytest.mark.parametrize(
    "num_outputs, size, num_tail",
    [
        (256, 256, 5),
        (140, 512, 40),
        (256, 384, 33),
        pytest.param(12288, 2048, 64, marks=pytest.mark.gpu),
    ],
)
def test_few_rows_take_the_tail_along(num_outputs, size, num_tail):
    weight = held(num_outputs, size, num_tail)
    whole = widened_blocks(weight, torch.float32)
    norm = torch.randn(size, device=DEVICE).to(HALF) * 0.2
    for num_rows in (1, 2, 16):
        x = torch.randn(num_rows, size, device=DEVICE).to(HALF)
        ours = row_linear.rows_with_tail_fwd(x, weight, norm, eps=1e-6)
        assert ours.shape == (num_rows, num_outputs + num_tail)
        parts = ours.split([num_outputs, num_tail], dim=1)
        for part, rows in zip(parts, whole.split([num_outputs, num_tail]), strict=True):
            assert error(part, row_linear_reference(x, rows, norm, eps=1e-6)) < TOLERANCE[HALF]


def test_experts_take_scales_and_shared_rows_along():
    num_rows, size, width = 9, 256, 128
    gate_up, down = held(2 * width, size, stack=(3,)), held(size, width, stack=(3,))
    x = torch.randn(num_rows, size, device=DEVICE).to(HALF)
    ids = torch.rand(num_rows, 3, device=DEVICE).topk(2).indices
    weights = torch.rand(num_rows, 2, device=DEVICE)
    shared, gate = torch.randn_like(x), torch.randn(num_rows, 1, device=DEVICE).to(HALF)
    given = (x, gate_up, down, weights, ids)
    assert experts.supports(*given) is None
    ours = experts.experts_shared_triton(*given, shared, gate)
    wide = [dequantized(w, w.block_scale) for w in (gate_up, down)]
    expected = experts_shared_reference(x.float(), *wide, weights, ids, shared.float(), gate)
    assert error(ours, expected) < (0.12 if IS_INTERPRETED else 0.06)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [17, 32, 100, 128, 256, 257, 4096])
@pytest.mark.parametrize(
    "num_outputs, size, num_tail",
    [(12288, 2048, 64), (2048, 4096, 0), (1024, 2048, 0), (2048, 512, 0)],
)
def test_the_flagship_s_products(num_rows, num_outputs, size, num_tail):
    weight = held(num_outputs, size, num_tail)
    x = torch.randn(num_rows, size, device=DEVICE, dtype=HALF)
    expected = linear_reference(x.float(), widened_blocks(weight, torch.float32))
    for is_streamed in (True, False):
        ours = linear.linear_fp8_fwd(x, weight, None, is_streamed=is_streamed)
        assert error(ours, expected) < 1e-2
