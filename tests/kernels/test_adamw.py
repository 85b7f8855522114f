"""AdamW with narrow weights and moments: against torch's, and the kernel against the definition."""

import pytest
import torch

from qnext.kernels.adamw.moments import BLOCK, AdamWRule, Moments
from qnext.kernels.adamw.reference import adamw_reference
from tests.kernels.triton_env import DEVICE, IS_INTERPRETED, error

pytest.importorskip("triton")

from qnext.kernels.adamw.triton_fwd import adamw_triton, supports

# The interpreter cuts fp32 off where a GPU rounds it to bf16.
HALF_LIMIT = 3e-2 if IS_INTERPRETED else 4e-3
LR, DECAY, EPS = 1e-2, 0.1, 1e-8
PLAIN = AdamWRule(0.9, 0.95, EPS, is_stochastic=False)
NOISY = AdamWRule(0.9, 0.95, EPS)


def rates(step, factor=1.0, is_applied=1.0, lr=LR, rule=PLAIN):
    rest = 1 - rule.beta1**step, 1 - rule.beta2**step
    values = [factor, lr, lr * DECAY, 1 / rest[0], rest[1] ** -0.5, is_applied, step]
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def drawn(size, seed, dtype=torch.float32, spread=3.0):
    """Numbers over several decades, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.randn(size, generator=generator) * spread).exp()
    return (torch.randn(size, generator=generator) * scale).to(dtype).to(DEVICE)


def run(function, size, kind, dtype=torch.float32, rule=PLAIN, steps=4, spread=3.0):
    param = drawn(size, 0, dtype, spread=0.1)
    moments = Moments.zeros(param, kind)
    for step in range(1, steps + 1):
        grad = drawn(size, step, dtype, spread)
        function(param, grad, moments, rates(step, 0.5, rule=rule), rule, 7)
    return param, moments


@pytest.mark.parametrize("function", [adamw_reference, adamw_triton])
def test_with_wide_moments_it_is_torchs_adamw(function):
    ours, moments = run(function, 700, "float32")
    theirs = torch.nn.Parameter(drawn(700, 0, spread=0.1))
    adamw = torch.optim.AdamW([theirs], lr=LR, betas=(0.9, 0.95), eps=EPS, weight_decay=DECAY)
    for step in range(1, 5):
        theirs.grad = drawn(700, step) * 0.5
        adamw.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.mean, adamw.state[theirs]["exp_avg"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [PLAIN, NOISY])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [5, BLOCK, 3 * 8 * BLOCK + 17])
def test_the_kernel_is_the_definition(size, dtype, kind, rule):
    ours, our_moments = run(adamw_triton, size, kind, dtype, rule)
    expected, moments = run(adamw_reference, size, kind, dtype, rule)
    for name, value in our_moments.tensors().items():
        want = moments.tensors()[name]
        if value.is_floating_point():
            assert error(value, want) < (1e-4 if value.dtype == torch.float32 else HALF_LIMIT), name
        else:  # a sum near the border of two codes may fall on either side
            difference = (value.int() - want.int()).abs()
            assert difference.max() <= 1, name
            assert difference.float().mean() < 0.02, name
    assert error(ours, expected) < (1e-4 if dtype == torch.float32 else HALF_LIMIT)


@pytest.mark.parametrize("function", [adamw_reference, adamw_triton])
def test_eight_bits_stay_near_wide_moments(function):
    """The direction of a quadratic's descent, over many steps."""
    goal = drawn(4 * BLOCK, 1, spread=0.5)
    ends = []
    for kind in ("float32", "8bit"):
        param = torch.zeros_like(goal)
        moments = Moments.zeros(param, kind)
        for step in range(1, 31):
            function(param, param - goal, moments, rates(step, lr=0.1, rule=NOISY), NOISY, 0)
        ends.append(param)
    assert error(ends[1], ends[0]) < 0.02
    assert error(ends[0], goal) < 0.5


@pytest.mark.parametrize("function", [adamw_reference, adamw_triton])
def test_a_skipped_step_changes_nothing_also_with_nan(function):
    param, moments = run(function, 300, "8bit")
    before = [param.clone(), *(value.clone() for value in moments.tensors().values())]
    bad = torch.full_like(param, float("nan"))
    function(param, bad, moments, rates(5, is_applied=0.0), PLAIN, 0)
    for value, old in zip([param, *moments.tensors().values()], before, strict=True):
        assert torch.equal(value, old)


@pytest.mark.parametrize("function", [adamw_reference, adamw_triton])
def test_rounding_at_random_keeps_changes_below_a_unit_in_the_last_place(function):
    """A thousandth of a unit at each of 40 steps: a twenty-fifth of one on average."""
    param = torch.ones(16 * BLOCK, dtype=torch.bfloat16, device=DEVICE)
    rule = AdamWRule(0.0, 0.0, 0.0)
    moments = Moments.zeros(param, "8bit")
    for step in range(1, 41):
        scales = [1.0, 1e-3 * 2**-7, 0.0, 1.0, 1.0, 1.0, step]
        function(param, -torch.ones_like(param), moments, torch.tensor(scales).to(DEVICE), rule, 3)
    moved = float((param.float() - 1).mean()) / 2**-7
    assert 0.03 < moved < 0.05, moved


def test_a_second_moment_never_vanishes_beside_a_larger_one():
    param = torch.zeros(BLOCK, device=DEVICE)
    grad = torch.full_like(param, 1e-6)
    grad[0] = 1e4
    for function in (adamw_reference, adamw_triton):
        moments = Moments.zeros(param, "8bit")
        function(param.clone(), grad, moments, rates(1), PLAIN, 0)
        assert (moments.square > 0).all()


def test_it_says_what_it_cannot_run():
    param = torch.zeros(4, 4, device=DEVICE)
    moments = Moments.zeros(param, "8bit")
    assert supports(param, param, moments, rates(1), PLAIN) is None
    assert "contiguous" in supports(param, param.t(), moments, rates(1), PLAIN)
    assert "float64" in supports(param.double(), param, moments, rates(1), PLAIN)
