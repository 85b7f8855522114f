"""The smaller ops against their definitions, and the choice of backends."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from qnext.kernels import dispatch
from qnext.kernels.attention.reference import attention_reference
from qnext.kernels.attention.torch import attention_torch
from qnext.kernels.causal_conv1d.reference import causal_conv1d_reference
from qnext.kernels.causal_conv1d_window.reference import causal_conv1d_window_reference
from qnext.kernels.experts.reference import experts_reference
from qnext.kernels.experts.torch import experts_torch, supports
from qnext.kernels.experts_shared.reference import experts_shared_reference
from qnext.kernels.experts_shared.torch import experts_shared_torch
from qnext.kernels.linear.reference import linear_reference
from qnext.kernels.linear.torch import linear_torch
from qnext.kernels.paged_attention.reference import CachedRows, paged_attention_reference
from qnext.kernels.paged_attention.torch import paged_attention_torch
from qnext.kernels.rotary.reference import rotary_reference
from qnext.kernels.router.reference import router_reference


@pytest.mark.parametrize("has_shared", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 7, 50])
def test_grouped_experts_give_output_and_gradients_of_the_loop(num_tokens, has_shared):
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, 32, requires_grad=True)
    gate_up = torch.randn(12, 16, 32, requires_grad=True)
    down = torch.randn(12, 32, 8, requires_grad=True)
    weights, ids = torch.rand(num_tokens, 12).topk(3)
    weights.requires_grad_()
    shared = torch.randn(num_tokens, 32, requires_grad=True)
    gate = torch.randn(num_tokens, 1, requires_grad=True)
    added = (shared, gate) if has_shared else ()
    inputs = (x, gate_up, down, weights, *added)
    goal = torch.randn(num_tokens, 32)
    grouped = experts_shared_torch if has_shared else experts_torch
    loop = experts_shared_reference if has_shared else experts_reference
    results = []
    for function in (grouped, loop):
        out = function(x, gate_up, down, weights, ids, *added)
        results.append([out, *torch.autograd.grad((out * goal).sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_grouped_experts_say_what_they_cannot_run():
    x, gate_up, down = torch.randn(2, 6), torch.randn(4, 8, 6), torch.randn(4, 6, 4)
    weights, ids = torch.rand(2, 4).topk(2)
    assert "16 bytes" in supports(x, gate_up, down, weights, ids)
    assert "float64" in supports(x.double(), gate_up, down, weights, ids)
    with (
        dispatch.use_backend("torch", "experts"),
        pytest.raises(ValueError, match="experts: backend torch cannot run: .*16 bytes"),
    ):
        dispatch.experts(x, gate_up, down, weights, ids)


def test_attention_backends_agree_forward_and_backward():
    torch.manual_seed(0)
    bounds = torch.tensor([0, 1, 20, 20, 51], dtype=torch.int32)
    shapes = ((51, 6, 16), (51, 2, 16), (51, 2, 16))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    goal = torch.randn(51, 6, 16)
    results = []
    for function in (attention_torch, attention_reference):
        out = function(*inputs, bounds, 31, 0.3)
        results.append([out, *torch.autograd.grad((out * goal).sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("room", [1, 8])
@pytest.mark.parametrize("num_tokens", [1, 515, 4096, 4611])
def test_attention_of_one_document_agrees_on_a_gpu(num_tokens, room, is_deterministic):
    generator = torch.Generator().manual_seed(num_tokens)
    bounds = torch.tensor([0] + [num_tokens] * room, dtype=torch.int32)
    drawn = [torch.randn(num_tokens, heads, 256, generator=generator) for heads in (16, 2, 2, 16)]
    drawn = [x.bfloat16() for x in drawn]
    results = []
    for function, dtype in (
        (attention_torch, torch.bfloat16),
        (attention_reference, torch.float32),
    ):
        *inputs, goal = (x.to("cuda", dtype) for x in drawn)
        inputs = [x.requires_grad_() for x in inputs]
        torch.use_deterministic_algorithms(is_deterministic)
        try:
            out = function(*inputs, bounds.to("cuda"), num_tokens, 1 / 16)
            results.append([out, *torch.autograd.grad(out, inputs, goal)])
        finally:
            torch.use_deterministic_algorithms(False)
    for ours, expected in zip(*results, strict=True):
        error = (ours.float() - expected).norm() / expected.norm()
        assert error < 1e-2 or (ours.float() - expected).abs().max() < 1e-2, error


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_attention_of_one_document_agrees_without_a_look_at_its_bounds(num_tokens):
    torch.manual_seed(0)
    inputs = [torch.randn(num_tokens, heads, 16, requires_grad=True) for heads in (6, 2, 2)]
    bounds = torch.tensor([0, num_tokens], dtype=torch.int32)
    goal = torch.randn(num_tokens, 6, 16)
    results = []
    for function, given in ((attention_torch, bounds.to("meta")), (attention_reference, bounds)):
        out = function(*inputs, given, num_tokens, 0.3)
        results.append([out, *torch.autograd.grad((out * goal).sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row_stable", [False, True])
def test_paged_attention_backends_agree_on_scattered_pages(row_stable):
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(200, 2, 16), torch.randn(200, 2, 16)
    order = torch.randperm(200)
    rows = CachedRows.of((order[:70], order[70:75], order[75:76]), (3, 5, 1))
    q = torch.randn(16, 4, 16)
    arguments = (q, k_cache, v_cache, rows, 0.25, row_stable)
    ours, expected = paged_attention_torch(*arguments), paged_attention_reference(*arguments)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert not ours[9:].any(), "padding rows stay zero"


def test_convolution_restarts_at_each_sequence_and_continues_from_a_state():
    torch.manual_seed(0)
    x, weight = torch.randn(20, 6), torch.randn(6, 4)
    positions = torch.cat([torch.arange(2), torch.arange(18)])
    packed = causal_conv1d_reference(x, weight, positions)
    for part, expected in zip(x.split([2, 18]), packed.split([2, 18]), strict=True):
        alone = F.silu(F.conv1d(F.pad(part.t(), [3, 0]), weight[:, None], groups=6)).t()
        torch.testing.assert_close(alone, expected)
    tail = causal_conv1d_reference(x[10:], weight, torch.arange(10), x[7:10].t())
    torch.testing.assert_close(tail, packed[10:])
    with pytest.raises(ValueError, match="one sequence"):
        causal_conv1d_reference(x, weight, positions, torch.zeros(6, 3))


def test_convolution_windows_go_on_from_each_sequences_inputs():
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    sequences = [torch.randn(10, 6), torch.randn(9, 6)]
    states = torch.randn(5, 6, 3)
    states[3], states[1] = sequences[0][4:7].t(), sequences[1][7:8].t() * torch.tensor([0, 0, 1.0])
    rows = torch.cat([sequences[0][7:], sequences[1][8:], torch.full((4, 6), torch.nan)])
    out = causal_conv1d_window_reference(rows, weight, states, torch.tensor([3, 1]), (3, 1))
    whole = causal_conv1d_reference(sequences[0], weight, torch.arange(10))
    torch.testing.assert_close(out[:3], whole[7:])
    pair = causal_conv1d_reference(sequences[1][7:], weight, torch.arange(2))
    torch.testing.assert_close(out[3], pair[1])


def test_rows_of_a_stable_product_do_not_depend_on_company():
    torch.manual_seed(0)
    x, weight = torch.randn(13, 50), torch.randn(37, 50)
    together = linear_reference(x, weight, row_stable=True)
    for row_idx in range(13):
        alone = linear_reference(x[row_idx : row_idx + 1].clone(), weight, row_stable=True)
        assert torch.equal(alone[0], together[row_idx])


def test_router_takes_the_most_probable_and_renormalises():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 8), torch.randn(5, 8)
    weights, ids, logits = router_reference(x, weight, 2, True, False)
    probs = (x @ weight.t()).softmax(-1)
    expected, expected_ids = probs.topk(2)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(logits.softmax(-1), probs)
    plain, _, _ = router_reference(x, weight, 2, False, False)
    torch.testing.assert_close(plain, expected)


def test_rotation_keeps_lengths_and_passes_the_other_dimensions():
    torch.manual_seed(0)
    x, angles = torch.randn(4, 3, 10), torch.randn(4, 2)
    out = rotary_reference(x, angles.cos(), angles.sin())
    assert torch.equal(out[..., 4:], x[..., 4:])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    back = rotary_reference(out, angles.cos(), -angles.sin())
    torch.testing.assert_close(back, x)


def test_a_backend_that_is_unknown_or_absent_is_refused_by_name():
    with pytest.raises(ValueError, match="backend = 'cuda'"), dispatch.use_backend("cuda"):
        pass
    with (
        pytest.raises(ValueError, match="rotary has no backend 'triton'"),
        dispatch.use_backend("triton", "rotary"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="op = 'softmax'"),
        dispatch.use_backend("torch", "softmax"),
    ):
        pass


def test_a_backend_named_for_the_model_lists_the_ops_that_lack_it():
    with dispatch.use_backend("torch") as bound:
        assert bound["gated_delta_rule"] == bound["experts_shared"] == "torch"
        assert bound["rms_norm"] == "reference"
    assert {choice.op for choice in dispatch.backend_report()} == set(dispatch.OPS)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_product_in_bfloat16_can_leave_in_float32(device):
    torch.manual_seed(0)
    x = torch.randn(5, 64, dtype=torch.bfloat16, device=device)
    weight = torch.randn(40, 64, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        out = linear_torch(x, weight, out_dtype=torch.float32)
    exact = linear_reference(x, weight, out_dtype=torch.float64)
    assert out.dtype == torch.float32
    assert exact.dtype == torch.float64
    # On a GPU nothing is rounded to bfloat16 on the way; a CPU has no such product.
    bound = 1e-5 if device == "cuda" else 2**-8
    assert (out - exact).norm() / exact.norm() < bound
    trained = weight.clone().requires_grad_()
    linear_torch(x, trained, out_dtype=torch.float32).sum().backward()
    assert trained.grad.dtype == torch.bfloat16


def test_ops_are_there_without_triton_and_without_the_compiler():
    code = (
        "import sys, qnext.kernels.dispatch; print(*{'triton', 'torch._dynamo'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], "each takes a second of every start"
