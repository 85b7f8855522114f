"""Kernels of prefill on a CPU against their references, and what their bits may not depend on."""

import pytest
import torch
import torch.nn.functional as F

from qnext.kernels import cpu_products
from qnext.kernels.causal_conv1d.numba import causal_conv1d_numba
from qnext.kernels.causal_conv1d.reference import causal_conv1d_reference
from qnext.kernels.experts import numba as experts_module
from qnext.kernels.experts.numba import experts_numba
from qnext.kernels.experts.reference import experts_reference
from qnext.kernels.gated_delta_rule.numba import gated_delta_rule_numba
from qnext.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from qnext.kernels.gated_rms_norm.numba import gated_rms_norm_numba
from qnext.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from qnext.kernels.int8_rows import quantize_rows
from qnext.kernels.l2_norm.numba import l2_norm_numba
from qnext.kernels.l2_norm.reference import l2_norm_reference
from qnext.kernels.linear import numba as linear_module
from qnext.kernels.linear.numba import linear_numba
from qnext.kernels.paged_attention import numba as paged_module
from qnext.kernels.paged_attention.numba import paged_attention_numba
from qnext.kernels.paged_attention.reference import CachedRows, paged_attention_reference
from qnext.kernels.rms_norm.numba import rms_norm_numba
from qnext.kernels.rms_norm.reference import rms_norm_reference
from qnext.kernels.router.numba import router_numba
from qnext.kernels.router.reference import router_reference
from qnext.kernels.swiglu import numba as swiglu_module
from qnext.kernels.swiglu.numba import swiglu_numba
from qnext.kernels.swiglu.reference import swiglu_reference

needs_tiles = pytest.mark.skipif(
    cpu_products.dual_objection() is not None, reason=str(cpu_products.dual_objection())
)
BFLOAT16 = torch.bfloat16


def _error(ours, expected):
    return float((ours.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def _rounded(x):
    return x.to(BFLOAT16).double()


@pytest.fixture(params=[1, 2])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _on_one_thread(function, *args, **kwargs):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(*args, **kwargs)
    finally:
        torch.set_num_threads(before)


@needs_tiles
@pytest.mark.parametrize(
    ("num_rows", "size", "num_outputs"),
    [(1, 2, 9), (5, 34, 11), (16, 32, 8), (37, 100, 27), (200, 66, 33), (400, 32, 16)],
)
def test_a_tiled_product_rounds_its_factors_and_nothing_else(
    num_rows, size, num_outputs, num_threads
):
    torch.manual_seed(0)
    wide = torch.randn(num_rows, size + 3)
    x, weight = wide[:, 1 : size + 1], torch.randn(num_outputs, size).to(BFLOAT16)
    ours = linear_numba(x, weight)
    assert _error(ours, _rounded(x) @ weight.double().t()) < 1e-6
    assert torch.equal(ours, _on_one_thread(linear_numba, x, weight))


def _int8(weight):
    rows, scale = quantize_rows(weight)
    rows.row_scale = scale
    return rows, rows.double() * scale.double()


@needs_tiles
@pytest.mark.parametrize(("num_rows", "size", "num_outputs"), [(5, 34, 11), (200, 66, 33)])
def test_a_tiled_product_takes_int8_rows_exactly(num_rows, size, num_outputs, num_threads):
    torch.manual_seed(0)
    x = torch.randn(num_rows, size)
    weight, exact = _int8(torch.randn(num_outputs, size))
    assert linear_module.supports(x, weight) is None
    assert _error(linear_numba(x, weight), _rounded(x) @ exact.t()) < 1e-6


@needs_tiles
def test_tiled_experts_and_swiglu_take_int8_rows(num_threads):
    torch.manual_seed(0)
    x = torch.randn(150, 34)
    gate_up, wide_gate_up = _int8(0.3 * torch.randn(3, 20, 34))
    down, wide_down = _int8(torch.randn(3, 34, 10))
    weights, ids = torch.rand(150, 3).topk(2)
    ours = experts_numba(x, gate_up, down, weights, ids)
    exact = experts_reference(x.double(), wide_gate_up, wide_down, weights, ids)
    assert _error(ours, exact) < 1e-2
    gate_up, wide_gate_up = _int8(0.3 * torch.randn(20, 34))
    down, wide_down = _int8(torch.randn(34, 10))
    assert swiglu_module.supports(x, gate_up, down) is None
    exact = swiglu_reference(x.double(), wide_gate_up, wide_down)
    assert _error(swiglu_numba(x, gate_up, down), exact) < 1e-2


@needs_tiles
def test_a_row_of_a_tiled_product_has_the_same_bits_in_any_company():
    x, weight = torch.randn(77, 48), torch.randn(19, 48).to(BFLOAT16)
    whole = linear_numba(x, weight)
    for start, end in ((0, 1), (3, 21), (60, 77)):
        assert torch.equal(linear_numba(x[start:end], weight), whole[start:end])


def test_linear_says_which_many_rows_it_leaves_to_others():
    x, weight = torch.randn(3, 6), torch.randn(8, 6)
    assert "matrix product" in linear_module.supports(x, weight)
    assert "few" in linear_module.supports(x, weight[:3].to(BFLOAT16))
    odd = torch.randn(3, 5), torch.randn(8, 5).to(BFLOAT16)
    assert "pairs" in linear_module.supports(*odd)


@needs_tiles
@pytest.mark.parametrize(
    ("num_tokens", "size", "width", "num_experts", "num_active"),
    [(1, 6, 4, 5, 2), (7, 34, 10, 8, 3), (150, 32, 24, 3, 2), (500, 16, 16, 1, 1)],
)
def test_tiled_experts_give_what_the_loop_gives(
    num_tokens, size, width, num_experts, num_active, num_threads
):
    torch.manual_seed(0)
    x = torch.randn(num_tokens, size)
    gate_up = (0.3 * torch.randn(num_experts, 2 * width, size)).to(BFLOAT16)
    down = torch.randn(num_experts, size, width).to(BFLOAT16)
    weights, ids = torch.rand(num_tokens, num_experts).topk(num_active)
    inputs = (x, gate_up, down, weights, ids)
    assert experts_module.supports(*inputs) is None
    ours = experts_numba(*inputs)
    exact = torch.zeros(num_tokens, size, dtype=torch.float64)
    for token in range(num_tokens):
        for weight, idx in zip(weights[token], ids[token], strict=True):
            gate, up = (gate_up[idx].double() @ _rounded(x[token])).chunk(2)
            exact[token] += weight * (down[idx].double() @ _rounded(F.silu(gate) * up))
    # An activation that lies between two bfloat16 may go either way.
    assert _error(ours, exact) < 5e-4
    assert _error(ours, experts_reference(x.double(), *inputs[1:])) < 1e-2
    assert torch.equal(ours, _on_one_thread(experts_numba, *inputs))
    alone = experts_numba(x[:1], gate_up, down, weights[:1], ids[:1])
    assert torch.equal(ours[:1], alone), "a token's bits do not depend on its company"


@needs_tiles
@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_tiled_attention_gives_the_softmax_over_scattered_pages(head_dim, num_threads):
    torch.manual_seed(0)
    lengths, contexts = (1, 70, 0, 5), (0, 100, 9, 64)
    order = torch.randperm(400)
    slots = order[: sum(lengths) + sum(contexts)].split(
        [a + b for a, b in zip(lengths, contexts, strict=True)]
    )
    q = torch.randn(sum(lengths) + 4, 4, head_dim)
    pools = torch.randn(2, 400, 2, head_dim)
    inputs = (q, *pools, CachedRows.of(slots, lengths), head_dim**-0.5)
    assert paged_module.supports(*inputs, product_dtype=BFLOAT16) is None
    ours = paged_attention_numba(*inputs, product_dtype=BFLOAT16)
    exact = paged_attention_reference(q.double(), *pools.double(), *inputs[3:])
    assert _error(ours, exact) < 8e-3
    assert not ours[sum(lengths) :].any(), "rows of no sequence stay zero"
    again = _on_one_thread(paged_attention_numba, *inputs, product_dtype=BFLOAT16)
    assert torch.equal(ours, again)


@needs_tiles
def test_tiled_attention_never_looks_ahead():
    torch.manual_seed(0)
    q, pools = torch.randn(90, 2, 16), torch.randn(2, 90, 2, 16)
    whole_rows, part_rows = (CachedRows.of((torch.arange(n),), (n,)) for n in (90, 50))
    whole = paged_attention_numba(q, *pools, whole_rows, 0.25, product_dtype=BFLOAT16)
    pools[:, 50:] = torch.nan
    part = paged_attention_numba(q[:50], *pools, part_rows, 0.25, product_dtype=BFLOAT16)
    assert torch.equal(whole[:50], part)


def test_attention_in_tiles_is_for_bfloat16_models():
    q, pools = torch.randn(3, 2, 8), torch.randn(2, 9, 2, 8)
    inputs = (q, *pools, CachedRows.of((torch.arange(3),), (3,)), 0.3)
    assert "bfloat16" in paged_module.supports(*inputs)
    assert "bfloat16" in paged_module.supports(*inputs, product_dtype=torch.float32)


def _delta_inputs(num_tokens, shape, decay):
    hk, hv, kd, vd = shape
    torch.manual_seed(0)
    q = F.normalize(torch.randn(num_tokens, hk, kd), dim=-1)
    k = F.normalize(torch.randn(num_tokens, hk, kd) + 1, dim=-1)
    v = torch.randn(num_tokens, hv * vd + 5)[:, 2 : 2 + hv * vd].view(num_tokens, hv, vd)
    g, beta = -decay * torch.rand(num_tokens, hv), torch.rand(num_tokens, hv)
    return q, k, v, g, beta


@pytest.mark.parametrize("decay", [0.0, 0.001, 1.0, 50.0])
@pytest.mark.parametrize("lengths", [(1,), (65,), (7, 0, 20, 1)])
@pytest.mark.parametrize("shape", [(1, 2, 3, 5), (2, 4, 16, 37), (2, 2, 33, 64), (1, 1, 128, 128)])
def test_the_recurrence_on_a_cpu_is_that_of_the_reference(lengths, shape, decay, num_threads):
    inputs = _delta_inputs(sum(lengths), shape, decay)
    bounds = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    state = torch.randn(len(lengths), *shape[1:])
    for initial in (None, state):
        ours, final = gated_delta_rule_numba(*inputs, cu_seqlens=bounds, initial_state=initial)
        wide = None if initial is None else initial.double()
        exact, exact_final = gated_delta_rule_reference(
            *(x.double() for x in inputs), cu_seqlens=bounds, initial_state=wide
        )
        assert _error(ours, exact) < 2e-6
        assert (final is None) == (initial is None)
        if final is not None:
            assert _error(final, exact_final) < 2e-6
    again = _on_one_thread(gated_delta_rule_numba, *inputs, cu_seqlens=bounds)
    assert torch.equal(gated_delta_rule_numba(*inputs, cu_seqlens=bounds)[0], again[0])


def test_a_recurrence_split_anywhere_has_the_bits_of_the_whole():
    inputs = _delta_inputs(40, (2, 4, 16, 24), 0.01)
    state = torch.randn(1, 4, 16, 24)
    before = state.clone()
    bounds = torch.tensor([0, 40], dtype=torch.int32)
    whole, final = gated_delta_rule_numba(*inputs, cu_seqlens=bounds, initial_state=state)
    assert torch.equal(state, before), "the state that goes in stays as it is"
    outputs = []
    for start, end in ((0, 1), (1, 18), (18, 40)):
        bounds = torch.tensor([0, end - start], dtype=torch.int32)
        part = [x[start:end] for x in inputs]
        out, state = gated_delta_rule_numba(*part, cu_seqlens=bounds, initial_state=state)
        outputs.append(out)
    assert torch.equal(torch.cat(outputs), whole)
    assert torch.equal(state, final)


@pytest.mark.parametrize("channels", [3, 16, 41])
@pytest.mark.parametrize("lengths", [(1,), (2, 1, 9), (30,)])
def test_convolution_on_a_cpu_gives_the_reference(lengths, channels, num_threads):
    torch.manual_seed(0)
    x = torch.randn(sum(lengths), channels + 2)[:, 1 : channels + 1]
    taps = torch.randn(channels, 4)
    positions = torch.cat([torch.arange(n) for n in lengths])
    ours = causal_conv1d_numba(x, taps, positions)
    assert _error(ours, causal_conv1d_reference(x.double(), taps.double(), positions)) < 1e-6
    history = torch.randn(channels, 3)
    steps = torch.arange(x.shape[0])
    ours = causal_conv1d_numba(x, taps.to(BFLOAT16), steps, history)
    exact = causal_conv1d_reference(x.double(), taps.to(BFLOAT16).double(), steps, history.double())
    assert _error(ours, exact) < 1e-6
    if len(lengths) > 1:
        with pytest.raises(ValueError, match="one sequence"):
            causal_conv1d_numba(x, taps, positions, history)


@pytest.mark.parametrize("size", [1, 16, 45])
def test_norms_on_a_cpu_give_the_references(size, num_threads):
    torch.manual_seed(0)
    heads = torch.randn(7, 3 * size + 2)[:, 1 : 1 + 3 * size].view(7, 3, size)
    weight, gate = torch.randn(size).to(BFLOAT16), 30 * torch.randn(7, 3, size)
    wide = heads.double()
    for rows in (heads, heads[:, 1]):
        exact = rms_norm_reference(rows.double(), weight.double(), 1e-6)
        assert _error(rms_norm_numba(rows, weight, 1e-6), exact) < 1e-6
    exact = l2_norm_reference(wide, 1e-6, 0.3)
    assert _error(l2_norm_numba(heads, 1e-6, 0.3), exact) < 1e-6
    exact = gated_rms_norm_reference(wide, gate.double(), weight.double(), 1e-6)
    assert _error(gated_rms_norm_numba(heads, gate, weight, 1e-6), exact) < 1e-6


@pytest.mark.parametrize("is_normed", [False, True])
def test_router_on_a_cpu_chooses_as_the_reference(is_normed, num_threads):
    torch.manual_seed(0)
    x, weight = torch.randn(33, 16), torch.randn(20, 16)
    ours = router_numba(x, weight, 6, is_normed, False)
    exact = router_reference(x, weight, 6, is_normed, False)
    assert torch.equal(ours[1], exact[1])
    torch.testing.assert_close(ours[0], exact[0], rtol=2e-6, atol=1e-7)
    ids = router_numba(torch.zeros(2, 16), weight, 3, is_normed, False)[1]
    assert ids.tolist() == [[0, 1, 2]] * 2, "among equal experts the lowest id"
