"""Matrices in int8 with a scale for each row."""

import pytest
import torch

from qnext.kernels.experts.reference import experts_reference
from qnext.kernels.experts.torch import experts_torch
from qnext.kernels.int8_rows import quantize_rows, scale_of, widened
from qnext.kernels.linear.reference import linear_reference
from qnext.kernels.linear.torch import linear_torch
from qnext.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from qnext.kernels.linear_cross_entropy.torch import linear_cross_entropy_torch


def quantized(*shape):
    torch.manual_seed(len(shape))
    held, scale = quantize_rows(torch.randn(shape))
    held.row_scale = scale
    return held


def test_an_element_is_off_by_half_a_step_at_most_and_the_largest_is_exact():
    torch.manual_seed(0)
    rows = torch.randn(5, 33) * torch.tensor([1e-6, 1.0, 1e4, 3.0, 0.0])[:, None]
    held, scale = quantize_rows(rows)
    assert held.dtype == torch.int8
    assert (held[:4].abs().amax(1) == 127).all()
    error = (held * scale - rows).abs()
    assert (error <= 0.501 * scale).all()
    assert not (held * scale)[4].any(), "a row of zeros stays one"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_are_refused(value):
    rows = torch.ones(2, 4)
    rows[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinities"):
        quantize_rows(rows)


def test_scales_that_were_lost_are_missed_by_name():
    with pytest.raises(ValueError, match=r"\(3, 8\) without its row_scale"):
        scale_of(torch.zeros(3, 8, dtype=torch.int8))


def test_products_take_the_scales_into_account():
    weight, x = quantized(12, 20), torch.randn(3, 20)
    expected = x @ (weight.float() * weight.row_scale).t()
    for function in (linear_torch, linear_reference):
        for row_stable in (False, True):
            torch.testing.assert_close(function(x, weight, row_stable), expected)


def test_the_loss_takes_the_scales_into_account():
    weight, hidden = quantized(12, 20), torch.randn(3, 20)
    targets = torch.tensor([1, 5, 11])
    expected = torch.nn.functional.cross_entropy(
        hidden @ (weight * weight.row_scale).t(), targets, reduction="sum"
    )
    for function in (linear_cross_entropy_torch, linear_cross_entropy_reference):
        torch.testing.assert_close(function(hidden, weight, targets)[0], expected)


def test_experts_take_the_scales_into_account():
    gate_up, down = quantized(6, 16, 32), quantized(6, 32, 8)
    x = torch.randn(7, 32)
    weights, ids = torch.rand(7, 6).topk(2)
    plain = [widened(part, torch.float32) for part in (gate_up, down)]
    expected = experts_reference(x, *plain, weights, ids)
    for function in (experts_torch, experts_reference):
        for row_stable in (False, True):
            out = function(x, gate_up, down, weights, ids, row_stable)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
