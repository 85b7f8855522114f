import pytest
import torch
import torch.nn.functional as F

from qnext.kernels.linear_cross_entropy import torch as chunked
from qnext.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from qnext.kernels.linear_cross_entropy.torch import linear_cross_entropy_torch

FUNCTIONS = [linear_cross_entropy_reference, linear_cross_entropy_torch]


def draw(num_tokens, dtype=torch.float64, words=50):
    hidden = torch.randn(num_tokens, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, words, (num_tokens,))
    targets[::3] = -100
    return hidden, weight, targets


@pytest.fixture(autouse=True)
def _chunks_of_seven_tokens(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 7 * 50)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 20, 43])
def test_the_loss_and_its_gradients_are_those_of_plain_cross_entropy(function, num_tokens):
    hidden, weight, targets = draw(num_tokens)
    total, loss, count = function(hidden, weight, targets)
    grads = torch.autograd.grad(total * 0.37, (hidden, weight))
    plain = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=-100, reduction="sum")
    expected = torch.autograd.grad(plain * 0.37, (hidden, weight))
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(loss, plain.detach())
    assert count == (targets != -100).sum()
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_z_loss_adds_the_squared_log_sum_of_counted_rows(function):
    hidden, weight, targets = draw(20)
    total, loss, _ = function(hidden, weight, targets, 0.01)
    grads = torch.autograd.grad(total, (hidden, weight))
    logits = hidden @ weight.t()
    plain = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    z_sum = logits.logsumexp(-1)[targets != -100].square().sum()
    expected = torch.autograd.grad(plain + 0.01 * z_sum, (hidden, weight))
    torch.testing.assert_close(total, plain + 0.01 * z_sum)
    torch.testing.assert_close(loss, plain.detach())
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want)


def test_bfloat16_stays_near_float32():
    hidden, weight, targets = draw(43, torch.float32)
    total, _, _ = linear_cross_entropy_reference(hidden, weight, targets)
    expected = torch.autograd.grad(total, (hidden, weight))
    rounded = hidden.detach().bfloat16().requires_grad_()
    half, _, _ = linear_cross_entropy_torch(rounded, weight, targets)
    grads = torch.autograd.grad(half, (rounded, weight))
    assert half.dtype == torch.float32
    assert grads[1].dtype == torch.float32
    torch.testing.assert_close(half, total, rtol=1e-2, atol=0)
    for grad, want in zip(grads, expected, strict=True):
        assert (grad.float() - want).norm() / want.norm() < 3e-2


def test_rows_that_are_all_left_out_cost_nothing():
    hidden, weight, _ = draw(5)
    targets = torch.full((5,), -100)
    total, loss, count = linear_cross_entropy_torch(hidden, weight, targets)
    grads = torch.autograd.grad(total, (hidden, weight))
    assert total == loss == count == 0
    assert all(grad.abs().max() == 0 for grad in grads)


def test_without_gradients_none_are_made():
    hidden, weight, targets = draw(20)
    with torch.no_grad():
        total, _, _ = linear_cross_entropy_torch(hidden, weight, targets)
    assert not total.requires_grad


@pytest.mark.gpu
def test_the_compiled_chunk_equals_the_reference_on_a_gpu():
    hidden = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(512, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, 512, (300,), device="cuda")
    total, _, _ = linear_cross_entropy_torch(hidden, weight, targets, 1e-4)
    expected, _, _ = linear_cross_entropy_reference(hidden, weight, targets, 1e-4)
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=0)
    grads = torch.autograd.grad(total, (hidden, weight))
    want = torch.autograd.grad(expected, (hidden, weight))
    for grad, other in zip(grads, want, strict=True):
        assert (grad.float() - other.float()).norm() / other.float().norm() < 2e-2
