"""Chunked gated delta rule against the recurrence."""

import pytest
import torch
import torch.nn.functional as F

from qnext.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from qnext.kernels.gated_delta_rule.torch import gated_delta_rule_torch

SHAPES = [(2, 4, 16, 24), (3, 3, 32, 32), (1, 5, 8, 8)]  # Hk, Hv, K, V
LENGTHS = [(1,), (63,), (64,), (65,), (130,), (1, 29, 1, 119, 50, 0)]
DECAYS = [0.0, 0.01, 1.0, 50.0]


def _inputs(shape, num_tokens, decay, dtype, seed=0):
    torch.manual_seed(seed)
    key_heads, heads, key_dim, value_dim = shape
    # A common part makes keys alike, which is where an inverse loses digits first.
    q = F.normalize(torch.randn(num_tokens, key_heads, key_dim, dtype=dtype), dim=-1)
    k = F.normalize(torch.randn(num_tokens, key_heads, key_dim, dtype=dtype) + 1, dim=-1)
    v = torch.randn(num_tokens, heads, value_dim, dtype=dtype)
    g = -decay * torch.rand(num_tokens, heads, dtype=dtype)
    beta = torch.rand(num_tokens, heads, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, g, beta)]


def _bounds(lengths):
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


def _error(a, b):
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_chunks_give_output_and_gradients_of_the_recurrence(lengths, decay):
    for shape in SHAPES:
        for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
            inputs = _inputs(shape, sum(lengths), decay, dtype)
            weights = torch.randn_like(inputs[2])
            results = []
            for function in (gated_delta_rule_torch, gated_delta_rule_reference):
                out, final = function(*inputs, cu_seqlens=_bounds(lengths))
                assert final is None
                results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
            for name, ours, expected in zip("oqkvgb", *results, strict=True):
                # A decay of 50 leaves gradients of g that are mostly cancellation.
                bound = limit * (100 if name == "g" else 1)
                error = (ours - expected).norm()
                scale = expected.norm() + 1e-4 * results[1][0].norm()
                assert error <= bound * scale, (name, shape, dtype, float(error / scale))


@pytest.mark.parametrize("decay", [0.001, 5.0])
def test_states_pass_in_and_out_with_gradients(decay):
    lengths = (1, 70, 64, 0, 15)
    inputs = _inputs((2, 4, 16, 24), sum(lengths), decay, torch.float64)
    state = torch.randn(len(lengths), 4, 16, 24, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (gated_delta_rule_torch, gated_delta_rule_reference):
        out, final = function(*inputs, cu_seqlens=_bounds(lengths), initial_state=state)
        loss = out.square().sum() + (final * state.detach()).sum()
        results.append([out, final, *torch.autograd.grad(loss, [*inputs, state])])
    for ours, expected in zip(*results, strict=True):
        assert _error(ours, expected) < 1e-11


@pytest.mark.parametrize("split", [1, 37, 64, 100, 149])
def test_a_sequence_split_anywhere_equals_the_whole(split):
    inputs = _inputs((2, 4, 16, 24), 150, 0.01, torch.float64)
    zero = torch.zeros(1, 4, 16, 24, dtype=torch.float64)
    whole, final = gated_delta_rule_torch(*inputs, cu_seqlens=_bounds((150,)), initial_state=zero)
    head, between = gated_delta_rule_torch(
        *[x[:split] for x in inputs], cu_seqlens=_bounds((split,)), initial_state=zero
    )
    tail, last = gated_delta_rule_torch(
        *[x[split:] for x in inputs], cu_seqlens=_bounds((150 - split,)), initial_state=between
    )
    assert _error(torch.cat([head, tail]), whole) < 1e-12
    assert _error(last, final) < 1e-12


def test_rows_give_what_one_stream_gives():
    inputs = _inputs((2, 4, 16, 24), 4 * 96, 0.01, torch.float64)
    lengths = (96, 40, 56, 96, 1, 95)
    stream, _ = gated_delta_rule_torch(*inputs, cu_seqlens=_bounds(lengths))
    rows, _ = gated_delta_rule_torch(*inputs, cu_seqlens=_bounds(lengths), row_tokens=96)
    assert _error(rows, stream) < 1e-12


def test_a_sequence_leaks_nothing_into_the_next_even_without_decay():
    lengths = (50, 50)
    inputs = _inputs((2, 4, 16, 24), 100, 0.0, torch.float64)
    out, _ = gated_delta_rule_torch(*inputs, cu_seqlens=_bounds(lengths))
    grads = torch.autograd.grad(out[50:].sum(), inputs)
    for name, grad in zip("qkvgb", grads, strict=True):
        # g enters through differences of one running sum, whose gradients cancel up to rounding.
        assert float(grad[:50].abs().max()) <= (1e-13 if name == "g" else 0.0), name
    unseparated, _ = gated_delta_rule_torch(*inputs, cu_seqlens=_bounds((100,)))
    assert _error(unseparated[50:], out[50:]) > 1e-2, "the border must matter for this test to"


def test_heads_that_do_not_divide_are_refused():
    inputs = _inputs((2, 4, 8, 8), 3, 1.0, torch.float32)
    inputs[2] = torch.randn(3, 5, 8)
    with pytest.raises(ValueError, match="Hv = 5 must be a multiple of Hk = 2"):
        gated_delta_rule_torch(*inputs, cu_seqlens=_bounds((3,)))
