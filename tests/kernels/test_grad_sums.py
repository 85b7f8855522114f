"""Weight gradients that kernels add to `.grad` themselves: the same sums as autograd's."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qnext.kernels.grad_sums import adding_to_grads, leaf_of, sum_to_extend
from tests.kernels.triton_env import DEVICE, error

pytest.importorskip("triton")

from qnext.kernels.experts.triton_fwd import experts_triton
from qnext.kernels.linear_cross_entropy.triton_fwd import linear_cross_entropy_triton


def experts_loss(seed, weights):
    torch.manual_seed(seed)
    x = torch.randn(6, 16, device=DEVICE, requires_grad=True)
    top, ids = torch.rand(6, 4, device=DEVICE)[:, :3].topk(2)  # the last expert gets no row
    return (experts_triton(x, *weights, top, ids) * torch.randn(6, 16, device=DEVICE)).sum()


def head_loss(seed, weights):
    torch.manual_seed(seed)
    hidden = torch.randn(6, 16, device=DEVICE, requires_grad=True)
    targets = torch.randint(0, 40, (6,), device=DEVICE)
    return linear_cross_entropy_triton(hidden, weights[0], targets)[0]


CASES = {
    "experts": (experts_loss, ((4, 32, 16), (4, 16, 16))),
    "head": (head_loss, ((40, 16),)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_sums_over_passes_are_autograds_and_stay_in_place(name, is_checkpointed):
    loss_of, shapes = CASES[name]
    torch.manual_seed(0)
    drawn = [torch.randn(shape, device=DEVICE) for shape in shapes]
    results = []
    for is_adding in (False, True):
        weights = [each.clone().requires_grad_() for each in drawn]
        places, through_autograd = None, []
        weights[0].register_hook(lambda grad, seen=through_autograd: seen.append(grad is not None))
        for seed in (1, 2, 3):
            if is_checkpointed:
                loss = checkpoint(loss_of, seed, weights, use_reentrant=False)
            else:
                loss = loss_of(seed, weights)
            if is_adding:
                with adding_to_grads():
                    loss.backward()
            else:
                loss.backward()
            now = [weight.grad.data_ptr() for weight in weights]
            assert places in (None, now)
            places = now
        assert sum(through_autograd) == (1 if is_adding else 3), "the first makes the place"
        results.append([weight.grad for weight in weights])
    for ours, expected in zip(*results, strict=True):
        assert error(ours, expected) < 1e-5


def test_only_a_caller_that_asks_gets_sums_in_place():
    weight = torch.zeros(4, requires_grad=True)
    weight.grad = torch.zeros(4)
    with torch.no_grad():
        assert sum_to_extend(leaf_of(weight)) is None
        with adding_to_grads():
            assert sum_to_extend(leaf_of(weight)) is weight.grad
            assert sum_to_extend(leaf_of(weight * 2)) is None
            weight.grad = None
            assert sum_to_extend(leaf_of(weight)) is None
        assert sum_to_extend(leaf_of(weight)) is None


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_asked_for_by_itself_is_returned(name):
    loss_of, shapes = CASES[name]
    weights = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    grads = torch.autograd.grad(loss_of(1, weights), weights)
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert all(weight.grad.abs().sum() == 0 for weight in weights)
