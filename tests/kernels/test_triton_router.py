"""The router for many rows, and a mixture with its shared expert, against plain PyTorch."""

import pytest
import torch

from qnext.kernels.experts_shared.reference import experts_shared_reference
from qnext.kernels.router.reference import router_reference
from tests.kernels.triton_env import DEVICE, error

pytest.importorskip("triton")

from qnext.kernels.experts_shared.triton_fwd import experts_shared_triton
from qnext.kernels.router.triton_fwd import router_triton


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("sizes", [(1, 16, 5, 2), (33, 24, 40, 6), (7, 16, 130, 10)], ids=str)
def test_rows_choose_as_the_reference_with_its_gradients(sizes, is_normed):
    num_rows, width, num_experts, top_k = sizes
    torch.manual_seed(0)
    x = torch.randn(num_rows, width, device=DEVICE, requires_grad=True)
    weight = torch.randn(num_experts, width, device=DEVICE, requires_grad=True)
    factors = torch.randn(num_rows, top_k, device=DEVICE)
    found = []
    for function in (router_triton, router_reference):
        weights, ids, logits = function(x, weight, top_k, is_normed, False)
        loss = (weights * factors).sum() + logits.square().mean()
        found.append([weights, logits, *torch.autograd.grad(loss, (x, weight)), ids])
    for ours, expected in zip(*(values[:-1] for values in found), strict=True):
        assert error(ours, expected) < 1e-5
    assert torch.equal(found[0][-1], found[1][-1])


@pytest.mark.gpu
def test_logits_of_16_bit_rows_are_equal_with_and_without_gradients():
    torch.manual_seed(2)
    x = torch.randn(300, 256, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(64, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    expected = x.double() @ weight.double().t()
    graph = torch.compile(router_triton, fullgraph=True)
    trained = router_triton(x, weight, 4, True, False)
    with torch.no_grad():
        generated = router_triton(x, weight, 4, True, False)
    for found in (trained, graph(x, weight, 4, True, False)):
        assert error(found[2], expected) < 1e-5  # rounded they are 1e-3 off
        assert all(torch.equal(a, b) for a, b in zip(found, generated, strict=True))
    (grad,) = torch.autograd.grad(trained[2].square().sum(), weight)
    assert error(grad, 2 * expected.t() @ x.double()) < 1e-2


def test_equal_logits_go_to_the_lowest_ids():
    x = torch.ones(3, 8, device=DEVICE)
    weights, ids, _ = router_triton(x, torch.ones(20, 8, device=DEVICE), 4, True, False)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert error(weights, torch.full((3, 4), 0.25)) < 1e-6


def test_a_mixture_adds_its_shared_expert_with_gradients():
    torch.manual_seed(1)
    num_rows, width, num_experts, size, top_k = 9, 24, 5, 16, 2

    def draw(*shape):
        return torch.randn(*shape, device=DEVICE).mul_(0.5).requires_grad_()

    x, gate_up = draw(num_rows, width), draw(num_experts, 2 * size, width)
    down, shared = draw(num_experts, width, size), draw(num_rows, width)
    gate = draw(num_rows, 1)
    top_weights, ids = torch.rand(num_rows, num_experts, device=DEVICE).topk(top_k)
    inputs = (x, gate_up, down, top_weights.requires_grad_(), shared, gate)
    found = []
    for function in (experts_shared_triton, experts_shared_reference):
        out = function(x, gate_up, down, top_weights, ids, shared, gate)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, expected in zip(*found, strict=True):
        assert error(ours, expected) < 1e-4
