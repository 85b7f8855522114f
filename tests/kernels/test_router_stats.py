"""A router's statistics in one pass against their definition."""

import pytest
import torch

from qnext.kernels.router_stats.reference import router_stats_reference
from tests.kernels.triton_env import DEVICE, error

pytest.importorskip("triton")

from qnext.kernels.router_stats.triton_fwd import router_stats_triton, supports


def run(function, logits, ids, z_weight=0.3):
    logits = logits.clone().requires_grad_()
    prob_mean, counts, z_mean, entropy = function(logits, ids)
    assert not counts.requires_grad
    assert not entropy.requires_grad
    goal = torch.linspace(-1, 2, logits.shape[1], device=DEVICE, dtype=logits.dtype)
    (grad,) = torch.autograd.grad((prob_mean * goal).sum() + z_weight * z_mean, logits)
    return prob_mean, counts, z_mean, entropy, grad


@pytest.mark.parametrize("num_experts", [4, 20, 512])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_statistics_and_gradient_are_those_of_the_definition(num_tokens, num_experts):
    torch.manual_seed(num_tokens)
    logits = torch.randn(num_tokens, num_experts, device=DEVICE) * 3
    ids = logits.topk(3, dim=-1).indices
    assert supports(logits, ids) is None
    ours = run(router_stats_triton, logits, ids)
    expected = run(router_stats_reference, logits.double(), ids)
    assert torch.equal(ours[1], expected[1])
    # One token's entropy may be the small difference of larger numbers.
    assert float((ours[3].double() - expected[3]).abs()) < 1e-6 * max(1.0, float(expected[3]))
    for i in (0, 2, 4):
        assert error(ours[i], expected[i]) < 1e-5


def test_a_sure_router_has_no_entropy_and_nothing_is_nan():
    logits = torch.full((5, 8), -1e4, device=DEVICE)
    logits[:, 2] = 1e4
    values = run(router_stats_triton, logits, logits.topk(2, dim=-1).indices, z_weight=0.0)
    assert values[3] == 0
    assert all(value.isfinite().all() for value in values)


def test_it_says_what_it_cannot_run():
    logits, ids = torch.zeros(2, 4, device=DEVICE), torch.zeros(2, 1, dtype=torch.int64)
    assert "fp32" in supports(logits.double(), ids)
    assert "2048 experts" in supports(torch.zeros(1, 2048, device=DEVICE), ids)
