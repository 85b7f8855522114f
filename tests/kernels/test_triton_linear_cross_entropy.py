import pytest
import torch
import torch.nn.functional as F

# Before Triton: it turns the interpreter on where there is no GPU.
from tests.kernels.triton_env import DEVICE, HALF, IS_INTERPRETED, error

pytest.importorskip("triton")

from qnext.kernels.linear_cross_entropy import triton_fwd
from qnext.kernels.linear_cross_entropy.reference import (
    linear_cross_entropy_reference,
)
from qnext.kernels.linear_cross_entropy.triton_fwd import (
    linear_cross_entropy_triton,
    rows_per_chunk,
    supports,
)

LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
gpu_only = pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _fresh_memory_is_poisoned(monkeypatch):
    """torch.empty gives NaN, as memory may."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def filled(*args, make=make, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(triton_fwd.torch, name, filled)


@pytest.fixture(autouse=True)
def _chunks_of_seven_rows_on_the_cpu(monkeypatch):
    if IS_INTERPRETED:
        monkeypatch.setattr(triton_fwd, "CHUNK_BYTES", 7 * 50 * 4)


def draw(num_tokens, words=50, columns=16, dtype=torch.float32, weight_dtype=None, size=1.0):
    hidden = (torch.randn(num_tokens, columns, device=DEVICE) * size).to(dtype)
    weight = torch.randn(words, columns, device=DEVICE).to(weight_dtype or dtype)
    targets = torch.randint(0, words, (num_tokens,), device=DEVICE)
    targets[::3] = -100
    targets[-1:] = words - 1
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def exact(hidden, weight, targets, z_weight=0.0):
    """Losses and gradients in float64, from the inputs as they were rounded."""
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    total, loss, count = linear_cross_entropy_reference(*wide, targets, z_weight)
    return total, loss, count, torch.autograd.grad(total * 0.37, wide)


def check(hidden, weight, targets, z_weight=0.0, limit=None):
    limit = limit or LIMITS[hidden.dtype]
    assert supports(hidden, weight, targets, z_weight) is None
    total, loss, count = linear_cross_entropy_triton(hidden, weight, targets, z_weight)
    grads = torch.autograd.grad(total * 0.37, (hidden, weight))
    want_total, want_loss, want_count, want_grads = exact(hidden, weight, targets, z_weight)
    assert total.dtype == loss.dtype == torch.float32
    assert not loss.requires_grad
    assert count == want_count
    assert error(total, want_total) < limit
    assert error(loss, want_loss) < limit
    for grad, want, of in zip(grads, want_grads, (hidden, weight), strict=True):
        assert grad.dtype == of.dtype
        assert error(grad, want) < limit


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 20])
def test_losses_and_gradients_are_those_of_float64(num_tokens):
    check(*draw(num_tokens))


@pytest.mark.parametrize("words", [2, 7, 33, 130, 2100])
def test_a_vocabulary_of_any_size_is_covered(words, monkeypatch):
    monkeypatch.setattr(triton_fwd, "CHUNK_BYTES", 4 * words * 4)
    check(*draw(9, words))


def test_a_vocabulary_of_several_blocks_is_read_twice_and_overwritten_once(monkeypatch):
    monkeypatch.setattr(triton_fwd, "CHUNK_BYTES", 2 * 5003 * 4)
    check(*draw(3, 5003), z_weight=1e-3)


def test_the_z_loss_pulls_counted_rows():
    check(*draw(20), z_weight=0.01)


def test_half_precision_rows_take_heads_of_their_own_or_of_full_precision():
    check(*draw(20, dtype=torch.float16))
    check(*draw(20, dtype=torch.float16, weight_dtype=torch.float32), limit=3e-3)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden, weight, targets = draw(8, size=3000.0)
    assert (hidden @ weight.t()).abs().max() > 1e4
    check(hidden, weight, targets)
    check(hidden, weight, targets, 1e-4)


def test_a_large_logit_that_is_right_costs_nothing():
    hidden = torch.full((2, 1), 1e4, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[0.9], [1.0], [0.1]], device=DEVICE, requires_grad=True)
    total, _, _ = linear_cross_entropy_triton(hidden, weight, torch.ones_like(hidden[:, 0]).long())
    assert total == 0
    assert (torch.autograd.grad(total, hidden)[0] == 0).all()


def test_rows_that_are_left_out_are_not_even_read():
    hidden, weight, targets = draw(9)
    total, loss, _ = linear_cross_entropy_triton(hidden, weight, targets)
    with torch.no_grad():
        hidden[targets == -100] = float("inf")
    again, loss_again, _ = linear_cross_entropy_triton(hidden, weight, targets)
    assert total == again
    assert loss == loss_again
    (grad,) = torch.autograd.grad(again, hidden)
    assert (grad[targets == -100] == 0).all()


def test_a_batch_that_is_left_out_whole_costs_nothing():
    hidden, weight, targets = draw(9)
    total, loss, count = linear_cross_entropy_triton(hidden, weight, targets.fill_(-100), 0.1)
    grads = torch.autograd.grad(total, (hidden, weight))
    assert total == loss == count == 0
    assert all((grad == 0).all() for grad in grads)


def test_only_the_gradients_that_are_asked_for_are_made():
    hidden, weight, targets = draw(9)
    want = exact(hidden, weight, targets)[3]
    total, _, _ = linear_cross_entropy_triton(hidden.detach(), weight, targets)
    assert error(torch.autograd.grad(total * 0.37, weight)[0], want[1]) < 1e-5
    total, _, _ = linear_cross_entropy_triton(hidden, weight.detach(), targets)
    assert error(torch.autograd.grad(total * 0.37, hidden)[0], want[0]) < 1e-5
    with torch.no_grad():
        total, _, _ = linear_cross_entropy_triton(hidden, weight, targets)
    assert not total.requires_grad
    assert error(total, exact(hidden, weight, targets)[0]) < 1e-5


def test_a_second_backward_pass_gives_the_same_gradients():
    hidden, weight, targets = draw(9)
    total, _, _ = linear_cross_entropy_triton(hidden, weight, targets)
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(total, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_chunks_are_about_equal_and_stay_in_their_memory(monkeypatch):
    monkeypatch.setattr(triton_fwd, "CHUNK_BYTES", 640 << 20)
    assert [rows_per_chunk(n, 151936, 2) for n in (4096, 8192)] == [2048, 2048]
    for num_tokens in (1, 100, 2208, 2209, 4096, 5000, 8192):
        size = rows_per_chunk(num_tokens, 151936, 2)
        assert 1 <= size <= 2208
        assert -(-num_tokens // size) == -(-num_tokens // 2208)


def test_what_the_kernel_cannot_take_is_named():
    hidden, weight, targets = draw(2)
    assert "float64" in supports(hidden.double(), weight, targets)
    assert "no rows" in supports(hidden[:0], weight, targets[:0])


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("words", [151936, 32001, 513])
def test_real_vocabularies_equal_float64_on_a_gpu(dtype, words, monkeypatch):
    monkeypatch.setattr(triton_fwd, "CHUNK_BYTES", 300 * words * dtype.itemsize)
    hidden, weight, targets = draw(700, words, 256, dtype, size=0.1)
    check(hidden, weight, targets, z_weight=1e-4)


@pytest.mark.gpu
@gpu_only
def test_full_precision_heads_keep_full_precision_gradients_on_a_gpu():
    check(*draw(700, 5001, 256, HALF, torch.float32, size=0.1))


@pytest.mark.gpu
@gpu_only
def test_large_logits_stay_finite_on_a_gpu():
    hidden, weight, targets = draw(64, 20000, 256, torch.float32, size=700.0)
    check(hidden, weight, targets, limit=1e-4)
    halves = [x.detach().to(HALF).requires_grad_() for x in (hidden, weight)]
    total, _, _ = linear_cross_entropy_triton(*halves, targets, 1e-4)
    grads = torch.autograd.grad(total, halves)
    assert total.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    plain = F.cross_entropy((halves[0] @ halves[1].t()).float(), targets, reduction="sum")
    loss = linear_cross_entropy_triton(*halves, targets)[1]
    assert error(loss, plain) < 1e-3
