"""The delta rule's inputs on a GPU: outputs and gradients against the reference."""

import pytest
import torch

# Before Triton: it turns the interpreter on where there is no GPU.
from tests.kernels.triton_env import DEVICE, error, poisoned

pytest.importorskip("triton")

from qnext.kernels.delta_inputs.reference import DeltaSizes, delta_inputs_reference
from qnext.kernels.delta_inputs.triton_fwd import delta_inputs_triton, supports

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TINY = DeltaSizes(num_key_heads=2, num_value_heads=4, key_head_dim=16, value_head_dim=8)
ODD = DeltaSizes(num_key_heads=3, num_value_heads=6, key_head_dim=12, value_head_dim=20)
FLAGSHIP = DeltaSizes(16, 32, 128, 128)


def positions_of(lengths):
    parts = [torch.arange(length) for length in lengths]
    return torch.cat(parts).to(DEVICE)


def draw(sizes, lengths, width=4, dtype=torch.float32):
    """fused, conv_weight, A_log, dt_bias, local_positions; the heads' parameters are fp32."""
    heads = sizes.num_value_heads
    fused = torch.randn(sum(lengths), sum(sizes.columns), device=DEVICE)
    weight = torch.randn(sizes.conv_dim, width, device=DEVICE) * width**-0.5
    rates = torch.rand(heads, device=DEVICE).mul(16).clamp_min(1e-4).log()
    bias = torch.randn(heads, device=DEVICE) - 3
    return [fused.to(dtype), weight.to(dtype), rates, bias, positions_of(lengths)]


def outputs_and_gradients(function, inputs, sizes, goals=None, history=None):
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    outputs = function(*leaves, inputs[4], sizes=sizes, history=history)
    if goals is None:
        goals = [torch.randn(x.shape, device=DEVICE) for x in outputs]
    matching = [goal.to(x.dtype) for goal, x in zip(goals, outputs, strict=True)]
    return goals, [*outputs, *torch.autograd.grad(outputs, leaves, matching)]


def check(inputs, sizes, limit, history=None):
    """Ours against the reference in float64 on the same rounded inputs."""
    wide = [*(x.double() for x in inputs[:4]), inputs[4]]
    past = None if history is None else history.double()
    goals, expected = outputs_and_gradients(delta_inputs_reference, wide, sizes, None, past)
    _, ours = outputs_and_gradients(delta_inputs_triton, inputs, sizes, goals, history)
    names = ("q", "k", "v", "g", "beta", "z", "d_fused", "d_conv_weight", "d_A_log", "d_dt_bias")
    for name, mine, theirs in zip(names, ours, expected, strict=True):
        assert mine.shape == theirs.shape
        assert error(mine, theirs) < limit, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lengths", [(1,), (21,), (3, 0, 1, 5, 2, 4, 1, 0, 19)])
def test_outputs_and_gradients_match_the_reference(dtype, lengths):
    check(draw(TINY, lengths, dtype=dtype), TINY, LIMITS[dtype])


@pytest.mark.parametrize("width", [1, 2, 4, 7, 8])
def test_any_width_up_to_eight_runs_at_sizes_that_are_no_powers_of_two(width):
    check(draw(ODD, (5, 17, 1), width), ODD, LIMITS[torch.float32])


def test_many_short_sequences_cross_chunks_of_programs():
    torch.manual_seed(1)
    lengths = torch.randint(0, 6, (20,)).tolist()
    check(draw(TINY, lengths), TINY, LIMITS[torch.float32])


def test_a_chunk_goes_on_from_the_inputs_before_it():
    inputs = draw(TINY, (19,))
    whole = delta_inputs_triton(*inputs, sizes=TINY)
    fused, positions = inputs[0], inputs[4]
    history = fused[10:13, : TINY.conv_dim].t()
    tail = [fused[13:], *inputs[1:4], positions[:6]]
    ours = delta_inputs_triton(*tail, sizes=TINY, history=history)
    for mine, expected in zip(ours, whole, strict=True):
        assert error(mine, expected[13:]) < LIMITS[torch.float32]
    check(tail, TINY, LIMITS[torch.float32], history)


def test_one_token_goes_on_from_a_history():
    inputs = draw(TINY, (1,))
    check(inputs, TINY, LIMITS[torch.float32], torch.randn(TINY.conv_dim, 3, device=DEVICE))


@pytest.mark.parametrize("pad", [3, 16])
def test_rows_are_read_in_place_and_nothing_beside_them(pad):
    inputs = draw(TINY, (4, 9))
    num_tokens, columns = inputs[0].shape
    wide = poisoned(num_tokens + 16, columns + 2 * pad, dtype=torch.float32)
    rows = wide[8:-8, pad : pad + columns]
    rows.copy_(inputs[0])
    check([rows, *inputs[1:]], TINY, LIMITS[torch.float32])


def test_nothing_of_a_document_reaches_its_neighbours():
    lengths = (9, 6, 5)
    inputs = draw(TINY, lengths)
    goals, clean = outputs_and_gradients(delta_inputs_triton, inputs, TINY)
    rows = inputs[0].clone()
    rows[9:15] = float("nan")
    _, spoiled = outputs_and_gradients(delta_inputs_triton, [rows, *inputs[1:]], TINY, goals)
    for ours, expected in zip(spoiled[:7], clean[:7], strict=True):
        assert torch.equal(ours[:9], expected[:9])
        assert torch.equal(ours[15:], expected[15:])


def test_gradients_are_the_same_bits_each_time():
    inputs = draw(TINY, (4, 9))
    goals, first = outputs_and_gradients(delta_inputs_triton, inputs, TINY)
    _, second = outputs_and_gradients(delta_inputs_triton, inputs, TINY, goals)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_slow_and_fast_decay_keep_their_relative_precision():
    inputs = draw(TINY, (9,))
    inputs[2] = torch.tensor([-9.0, 2.7, 0.0, 1.0], device=DEVICE)
    inputs[3] = torch.tensor([-20.0, 5.0, 30.0, -88.0], device=DEVICE)
    g = delta_inputs_triton(*inputs, sizes=TINY)[3]
    wide = [*(x.double() for x in inputs[:4]), inputs[4]]
    expected = delta_inputs_reference(*wide, sizes=TINY)[3]
    torch.testing.assert_close(g.double(), expected, rtol=2e-5, atol=0)


def test_outputs_that_nobody_uses_get_no_gradient():
    inputs = draw(TINY, (7,))
    results = []
    for function in (delta_inputs_triton, delta_inputs_reference):
        leaves = [x.detach().requires_grad_() for x in inputs[:4]]
        outputs = function(*leaves, inputs[4], sizes=TINY)
        results.append(torch.autograd.grad(outputs[1].square().mul(outputs[1]).sum(), leaves[:2]))
    for mine, expected in zip(*results, strict=True):
        assert error(mine, expected) < LIMITS[torch.float32]


def test_what_cannot_run_is_said():
    inputs = draw(TINY, (3,))
    assert supports(*inputs, sizes=TINY) is None
    assert "float64" in supports(inputs[0].double(), *inputs[1:], sizes=TINY)
    assert "no rows" in supports(inputs[0][:0], *inputs[1:], sizes=TINY)
    assert "columns" in supports(inputs[0][:, 1:], *inputs[1:], sizes=TINY)
    assert "9 taps" in supports(*draw(TINY, (3,), width=9), sizes=TINY)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("lengths", [(1,), (127,), (5, 1, 0, 2, 300, 3, 3000), (2, 3) * 200])
def test_flagship_sizes_match_on_a_gpu(dtype, lengths):
    check(draw(FLAGSHIP, lengths, dtype=dtype), FLAGSHIP, LIMITS[dtype])


@pytest.mark.gpu
def test_a_cuda_graph_replays_forward_and_backward_on_new_rows():
    inputs = draw(FLAGSHIP, (70, 30), dtype=torch.bfloat16)
    goals, _ = outputs_and_gradients(delta_inputs_triton, inputs, FLAGSHIP)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, captured = outputs_and_gradients(delta_inputs_triton, inputs, FLAGSHIP, goals)
    inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    _, fresh = outputs_and_gradients(delta_inputs_triton, inputs, FLAGSHIP, goals)
    assert all(torch.equal(one, two) for one, two in zip(captured, fresh, strict=True))
