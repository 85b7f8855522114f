"""Norms, gates and attention's inputs on a GPU: outputs and gradients against the references."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

# Before Triton: it turns the interpreter on where there is no GPU.
from tests.kernels.triton_env import DEVICE, error, poisoned

pytest.importorskip("triton")

from qnext.kernels.add_rms_norm import triton_fwd as add_rms_norm
from qnext.kernels.add_rms_norm.reference import add_rms_norm_reference
from qnext.kernels.attention_inputs import triton_fwd as attention_inputs
from qnext.kernels.attention_inputs.reference import AttentionSizes, attention_inputs_reference
from qnext.kernels.gated_rms_norm import triton_fwd as gated_rms_norm
from qnext.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from qnext.kernels.gpu_rows import column_sums
from qnext.kernels.rms_norm import triton_fwd as rms_norm
from qnext.kernels.rms_norm.reference import rms_norm_reference
from qnext.kernels.sigmoid_gate import triton_fwd as sigmoid_gate
from qnext.kernels.sigmoid_gate.reference import sigmoid_gate_reference
from qnext.kernels.silu_mul import triton_fwd as silu_mul
from qnext.kernels.silu_mul.reference import silu_mul_reference

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-6
OPS = {
    "rms_norm": (rms_norm, rms_norm_reference),
    "add_rms_norm": (add_rms_norm, add_rms_norm_reference),
    "gated_rms_norm": (gated_rms_norm, gated_rms_norm_reference),
    "silu_mul": (silu_mul, silu_mul_reference),
    "sigmoid_gate": (sigmoid_gate, sigmoid_gate_reference),
    "attention_inputs": (attention_inputs, attention_inputs_reference),
}


@dataclass
class Case:
    """Inputs of one op; those that `fixed` numbers get no gradient."""

    inputs: list[torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[int, ...] = ()

    def cast(self, dtype):
        keep = [x if i in self.fixed else x.to(dtype) for i, x in enumerate(self.inputs)]
        return Case(keep, self.options, self.fixed)


def rows_case(op, num_tokens, heads, columns):
    def draw(*shape):
        return torch.randn(*shape, device=DEVICE)

    if op == "rms_norm":
        return Case([draw(num_tokens, heads, columns), draw(columns)], {"eps": EPS})
    if op == "add_rms_norm":
        x, residual = draw(num_tokens, columns), draw(num_tokens, columns)
        return Case([x, residual, draw(columns)], {"eps": EPS})
    if op == "gated_rms_norm":
        x, z = draw(num_tokens, heads, columns), draw(num_tokens, heads, columns)
        return Case([x, z, draw(columns)], {"eps": EPS})
    if op == "silu_mul":
        return Case([draw(num_tokens, 2 * columns)])
    if op == "sigmoid_gate":
        return Case([draw(num_tokens, heads, columns), draw(num_tokens, heads * columns)])
    sizes = AttentionSizes(heads, max(1, heads // 2), columns)
    angles = draw(num_tokens, max(1, columns // 8))
    inputs = [draw(num_tokens, sum(sizes.columns)), draw(columns), draw(columns)]
    options = {"eps": EPS, "sizes": sizes}
    return Case([*inputs, angles.cos(), angles.sin()], options, fixed=(3, 4))


def embedded(x, pad):
    """The same rows inside wider and taller ones that are all NaN."""
    if x.dim() == 1:
        return x
    columns = x[0].numel()
    wide = poisoned(x.shape[0] + 2, columns + 2 * pad, dtype=x.dtype)
    wide[1:-1, pad : pad + columns] = x.flatten(1)
    return wide[1:-1, pad : pad + columns].unflatten(1, x.shape[1:])


def outputs_and_gradients(function, case, goals=None):
    inputs = [
        x.detach() if i in case.fixed else x.detach().requires_grad_()
        for i, x in enumerate(case.inputs)
    ]
    out = function(*inputs, **case.options)
    outputs = out if isinstance(out, tuple) else (out,)
    if goals is None:
        goals = [torch.randn(x.shape, device=DEVICE) for x in outputs]
    learned = [x for x in inputs if x.requires_grad]
    matching = [goal.to(x.dtype) for goal, x in zip(goals, outputs, strict=True)]
    return goals, [*outputs, *torch.autograd.grad(outputs, learned, matching)]


def check(op, case, limit):
    """Ours against the reference in float64 on the same rounded inputs."""
    module, reference = OPS[op]
    function = getattr(module, f"{op}_triton")
    wide = Case([x.double() for x in case.inputs], case.options, case.fixed)
    goals, expected = outputs_and_gradients(reference, wide)
    _, ours = outputs_and_gradients(function, case, goals)
    for i, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        assert mine.shape == theirs.shape
        assert error(mine, theirs) < limit, f"{op}: result {i}"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_tokens, heads, columns", [(1, 2, 16), (5, 3, 24), (9, 1, 40)])
def test_outputs_and_gradients_match_the_reference(op, dtype, num_tokens, heads, columns):
    case = rows_case(op, num_tokens, heads, columns).cast(dtype)
    check(op, case, LIMITS[dtype])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("pad", [3, 16])
def test_slices_of_wider_rows_are_read_in_place_and_nothing_beside_them(op, pad):
    case = rows_case(op, 5, 3, 24)
    case.inputs = [x if i in case.fixed else embedded(x, pad) for i, x in enumerate(case.inputs)]
    check(op, case, LIMITS[torch.float32])


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_the_same_bits_each_time(op):
    case = rows_case(op, 7, 2, 24)
    function = getattr(OPS[op][0], f"{op}_triton")
    goals, first = outputs_and_gradients(function, case)
    _, second = outputs_and_gradients(function, case, goals)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_float64_and_empty_inputs_are_left_to_the_reference(op):
    case = rows_case(op, 3, 2, 16)
    supports = OPS[op][0].supports
    assert supports(*case.inputs, **case.options) is None
    double = [x.double() for x in case.inputs]
    assert "float64" in supports(*double, **case.options)
    empty = [x[:0] if x.dim() > 1 else x for x in case.inputs]
    assert "no rows" in supports(*empty, **case.options)


def test_a_gradient_that_is_one_number_expanded_is_read_right():
    x = torch.randn(4, 24, device=DEVICE, requires_grad=True)
    weight = torch.randn(24, device=DEVICE, requires_grad=True)
    ours = torch.autograd.grad(rms_norm.rms_norm_triton(x, weight, EPS).sum(), (x, weight))
    theirs = torch.autograd.grad(rms_norm_reference(x, weight, EPS).sum(), (x, weight))
    for mine, expected in zip(ours, theirs, strict=True):
        assert error(mine, expected) < LIMITS[torch.float32]


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_of_the_residual_sum_may_go_unused(used):
    inputs = [torch.randn(3, 16, device=DEVICE, requires_grad=True) for _ in range(2)]
    inputs.append(torch.randn(16, device=DEVICE, requires_grad=True))
    results = []
    for function in (add_rms_norm.add_rms_norm_triton, add_rms_norm_reference):
        out = function(*inputs, EPS)[used]
        results.append(torch.autograd.grad(out.square().sum(), inputs, allow_unused=True))
    for mine, expected in zip(*results, strict=True):
        assert (mine is None) == (expected is None)
        assert mine is None or error(mine, expected) < LIMITS[torch.float32]


def test_a_residual_stream_may_be_wider_than_what_a_layer_adds():
    x = torch.randn(5, 24, device=DEVICE).half().requires_grad_()
    residual = torch.randn(5, 24, device=DEVICE, requires_grad=True)
    weight = torch.randn(24, device=DEVICE)
    normed, summed = add_rms_norm.add_rms_norm_triton(x, residual, weight, EPS)
    expected = add_rms_norm_reference(x, residual, weight, EPS)
    assert (normed.dtype, summed.dtype) == (torch.float16, torch.float32)
    assert error(normed, expected[0]) < LIMITS[torch.float16]
    assert torch.equal(summed, expected[1])
    dx, d_residual = torch.autograd.grad(summed.sum() + normed.float().sum(), (x, residual))
    assert (dx.dtype, d_residual.dtype) == (torch.float16, torch.float32)


def test_a_second_stage_sum_transposes_when_asked_to():
    partials = torch.randn(70, 3 * 11, device=DEVICE)
    expected = partials.double().sum(0)
    assert error(column_sums(partials, torch.float32), expected) < LIMITS[torch.float32]
    ours = column_sums(partials, torch.float32, columns=11)
    assert error(ours, expected.view(3, 11).t()) < LIMITS[torch.float32]


def test_gate_and_value_are_views_of_the_fused_rows():
    case = rows_case("attention_inputs", 3, 4, 16)
    fused = case.inputs[0]
    _, _, v, gate = attention_inputs.attention_inputs_triton(*case.inputs, **case.options)
    assert v.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    assert gate.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("num_tokens", [1, 127, 4096])
def test_flagship_sizes_match_on_a_gpu(op, dtype, num_tokens):
    heads, columns = {
        "rms_norm": (1, 2048),
        "add_rms_norm": (1, 2048),
        "gated_rms_norm": (32, 128),
        "silu_mul": (1, 512),
        "sigmoid_gate": (16, 256),
        "attention_inputs": (16, 256),
    }[op]
    check(op, rows_case(op, num_tokens, heads, columns).cast(dtype), LIMITS[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_a_cuda_graph_replays_the_forward_on_new_rows(op):
    case = rows_case(op, 33, 4, 64).cast(torch.bfloat16)
    function = getattr(OPS[op][0], f"{op}_triton")
    function(*case.inputs, **case.options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*case.inputs, **case.options)
    case.inputs[0].copy_(torch.randn_like(case.inputs[0]))
    graph.replay()
    fresh = function(*case.inputs, **case.options)
    pairs = zip(captured, fresh, strict=True) if isinstance(fresh, tuple) else [(captured, fresh)]
    assert all(torch.equal(one, two) for one, two in pairs)
