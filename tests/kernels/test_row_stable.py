"""Where rows must not influence one another, any company gives the same bits."""

import pytest
import torch

from qnext.kernels.experts.reference import experts_reference
from qnext.kernels.experts.torch import experts_torch
from qnext.kernels.linear.reference import linear_reference
from qnext.kernels.linear.torch import linear_torch
from qnext.kernels.router.reference import router_reference

# (rows, in, out): whole vectors and not, one row, more rows than a vector has numbers
SHAPES = [(1, 64, 48), (13, 50, 37), (16, 32, 1), (40, 96, 128)]


@pytest.mark.parametrize("num_rows, size_in, size_out", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_of_a_product_has_the_same_bits_in_any_company(num_rows, size_in, size_out, dtype):
    x = torch.randn(num_rows, size_in, dtype=dtype)
    weight = torch.randn(size_out, size_in, dtype=dtype)
    together = linear_torch(x, weight, row_stable=True)
    assert together.is_contiguous()
    torch.testing.assert_close(together, linear_reference(x, weight))
    wide = torch.randn(num_rows, size_in + 3, dtype=dtype)  # rows at other alignments
    wide[:, 3:] = x
    assert torch.equal(linear_torch(wide[:, 3:], weight, row_stable=True), together)
    for start in range(num_rows):
        some = linear_torch(x[start : start + 3].clone(), weight, row_stable=True)
        assert torch.equal(some, together[start : start + 3])


@pytest.mark.parametrize("num_rows, size, width", [(1, 64, 32), (11, 50, 12), (33, 48, 20)])
def test_experts_give_a_row_the_same_bits_in_any_company(num_rows, size, width):
    num_experts, num_active = 6, 3
    x = torch.randn(num_rows, size)
    gate_up = torch.randn(num_experts, 2 * width, size) * 0.1
    down = torch.randn(num_experts, size, width) * 0.1
    router = torch.randn(num_experts, size)
    weights, ids, _ = router_reference(x, router, num_active, True, True)
    together = experts_torch(x, gate_up, down, weights, ids, row_stable=True)
    torch.testing.assert_close(together, experts_reference(x, gate_up, down, weights, ids))
    for start in range(num_rows):
        rows = x[start : start + 2].clone()
        weights, ids, _ = router_reference(rows, router, num_active, True, True)
        some = experts_torch(rows, gate_up, down, weights, ids, row_stable=True)
        assert torch.equal(some, together[start : start + 2])
