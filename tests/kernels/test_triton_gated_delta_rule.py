"""Gated delta rule on a GPU, or its kernels under the interpreter, against the recurrence."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.triton_env import DEVICE, HALF, IS_INTERPRETED, error

pytest.importorskip("triton")

from qnext.kernels.gated_delta_rule import (
    triton_chunks,
    triton_fwd,
    triton_scan,
    triton_segments,
)
from qnext.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from qnext.kernels.gated_delta_rule.summary import gated_delta_summary_reference
from qnext.kernels.gated_delta_rule.torch import gated_delta_rule_torch
from qnext.kernels.gated_delta_rule.triton_fwd import (
    gated_delta_rule_triton,
    supports,
)
from qnext.kernels.gated_delta_rule.triton_summary import gated_delta_summary

NAMES = ("out", "final", "dq", "dk", "dv", "dg", "dbeta", "dstate")
# Rounding of one operand is 2^-9 in bfloat16; a state is rounded once per chunk that reads it.
LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 1.2e-2}
FLAGSHIP = (16, 32, 128, 128)  # Hk, Hv, K, V


def _inputs(shape, lengths, decay, dtype, alike=1.0, seed=0):
    """q, k, v, g, beta, initial state, bounds; `alike` is the part that all keys share."""
    torch.manual_seed(seed)
    key_heads, heads, key_dim, value_dim = shape
    num_tokens = sum(lengths)
    q = F.normalize(torch.randn(num_tokens, key_heads, key_dim), dim=-1) * key_dim**-0.5
    k = F.normalize(torch.randn(num_tokens, key_heads, key_dim) + alike, dim=-1)
    v = torch.randn(num_tokens, heads, value_dim)
    g = -decay * torch.rand(num_tokens, heads)
    beta = torch.rand(num_tokens, heads)
    state = torch.randn(len(lengths), heads, key_dim, value_dim)
    wide = [x.to(DEVICE) for x in (g, beta, state)]
    return [*(x.to(DEVICE, dtype) for x in (q, k, v)), *wide], _bounds(lengths)


def _bounds(lengths):
    return torch.tensor((0, *lengths)).cumsum(0).to(DEVICE, torch.int32)


def _results(function, inputs, bounds, has_state):
    """Output, final state and all gradients of a loss with random weights."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, final = function(
        *leaves[:5], cu_seqlens=bounds, initial_state=leaves[5] if has_state else None
    )
    weights = torch.Generator().manual_seed(1)
    loss = (out.double() * torch.randn(out.shape, generator=weights).to(out.device)).sum()
    if not has_state:
        assert final is None
        return [out, *torch.autograd.grad(loss, leaves[:5])]
    loss += (final.double() * torch.randn(final.shape, generator=weights).to(out.device)).sum()
    return [out, final, *torch.autograd.grad(loss, leaves)]


def _check(inputs, bounds, limit, has_state=True, reference=gated_delta_rule_reference):
    ours = _results(gated_delta_rule_triton, inputs, bounds, has_state)
    expected = _results(reference, [x.double() for x in inputs], bounds, has_state)
    names = NAMES if has_state else [name for name in NAMES[:-1] if name != "final"]
    found = {n: error(a, b) for n, a, b in zip(names, ours, expected, strict=True)}
    # dg is a sum over K x V products of both signs: without decay, mostly cancellation.
    limits = {name: limit * (2 if name == "dg" else 1) for name in names}
    # NaN is not below any limit.
    assert all(value < limits[name] for name, value in found.items()), found


@pytest.mark.parametrize(
    "lengths, decay, shape, dtype",
    [
        ((1,), 0.0, (1, 2, 16, 24), torch.float32),
        ((65,), 1.0, (1, 1, 32, 16), torch.float32),
        ((64,), 0.05, (2, 2, 16, 16), torch.float16),
        ((1, 66, 0, 15), 0.05, (1, 2, 16, 24), torch.float32),
    ],
    ids=str,
)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(lengths, decay, shape, dtype):
    _check(*_inputs(shape, lengths, decay, dtype), LIMITS[dtype])


def test_without_states_none_come_out():
    _check(
        *_inputs((1, 3, 16, 16), (3, 70), 0.1, torch.float32),
        LIMITS[torch.float32],
        has_state=False,
    )


def test_very_fast_decay_neither_overflows_nor_loses_the_slow_tokens_after_it():
    inputs, bounds = _inputs((1, 2, 16, 16), (100,), 0.1, torch.float32)
    inputs[3][10:50] = -50.0
    _check(inputs, bounds, LIMITS[torch.float32])


def test_equal_keys_written_in_full_are_still_inverted_exactly():
    inputs, bounds = _inputs((1, 1, 16, 16), (90,), 0.0, torch.float32, alike=30.0)
    inputs[4].fill_(1.0)
    _check(inputs, bounds, 1e-4)


def test_equal_keys_are_inverted_as_exactly_as_16_bits_allow():
    inputs, bounds = _inputs((1, 2, 16, 16), (90,), 0.0, torch.float16, alike=30.0)
    inputs[4].fill_(1.0)
    _check(inputs, bounds, LIMITS[torch.float16])


def test_states_kept_by_the_forward_give_the_gradients_of_states_computed_again(monkeypatch):
    inputs, bounds = _inputs((1, 2, 16, 16), (70, 5), 0.1, torch.float32)
    kept = _results(gated_delta_rule_triton, inputs, bounds, True)
    monkeypatch.setattr(triton_fwd, "KEEP_STATES_TOKENS", 74)
    again = _results(gated_delta_rule_triton, inputs, bounds, True)
    for name, a, b in zip(NAMES, kept, again, strict=True):
        assert error(a, b) < 1e-6, name


def _whole_and_segmented(monkeypatch, inputs, bounds, has_state, length):
    """Without gradients: outputs before the bounds' end and final state, in one piece and cut."""
    found = []
    for tokens in (1 << 30, length):
        monkeypatch.setattr(triton_segments, "SEGMENT_TOKENS", tokens)
        with torch.no_grad():
            state = inputs[5] if has_state else None
            out, final = gated_delta_rule_triton(
                *inputs[:5], cu_seqlens=bounds, initial_state=state
            )
        assert (final is not None) == has_state
        found.append([out[: bounds[-1]], *([final] if has_state else [])])
    return found


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("end, lengths", [(600, [128, 192, 256, 24]), (120, [120, 0, 0, 0])])
def test_segments_change_no_bit(monkeypatch, end, lengths, has_state):
    monkeypatch.setattr(triton_segments, "STEP", 64)
    inputs, _ = _inputs((1, 2, 16, 16), (600,), 0.05, torch.float32)
    given = inputs[5].clone()
    table = triton_segments.segments
    seen = []

    def segments(*args):
        parts = table(*args)
        seen.append([(part.cu_seqlens[1] - part.cu_seqlens[0]).item() for part in parts])
        return parts

    monkeypatch.setattr(triton_fwd, "segments", segments)
    whole, cut = _whole_and_segmented(monkeypatch, inputs, _bounds((end,)), has_state, 100)
    assert seen == [[], lengths]
    for a, b in zip(whole, cut, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(inputs[5], given)


def test_segments_grow_from_a_quarter_to_the_whole():
    starts = [triton_segments.eighths_before.fn(idx) for idx in range(10)]
    lengths = [end - start for start, end in zip(starts[:-1], starts[1:], strict=True)]
    assert lengths == [2, 3, 4, 5, 6, 7, 8, 8, 8]


def test_gradients_after_a_forward_in_segments_are_those_of_the_recurrence(monkeypatch):
    monkeypatch.setattr(triton_fwd, "KEEP_STATES_TOKENS", 1)
    monkeypatch.setattr(triton_segments, "SEGMENT_TOKENS", 64)
    monkeypatch.setattr(triton_segments, "STEP", 64)
    _check(*_inputs((1, 2, 16, 16), (200,), 0.05, torch.float32), LIMITS[torch.float32])


@pytest.mark.parametrize(
    "tokens, has_grad, kept", [(70, True, True), (70, False, False), (71, True, False)]
)
def test_states_are_kept_only_for_gradients_of_few_tokens(monkeypatch, tokens, has_grad, kept):
    monkeypatch.setattr(triton_fwd, "KEEP_STATES_TOKENS", 70)
    inputs, bounds = _inputs((1, 1, 16, 16), (tokens,), 0.1, torch.float32)
    written = []
    launch = triton_fwd.scan

    def scan(*args, **kwargs):
        written.append(kwargs["states"])
        launch(*args, **kwargs)

    monkeypatch.setattr(triton_fwd, "scan", scan)
    with torch.set_grad_enabled(has_grad):
        gated_delta_rule_triton(*[x.requires_grad_() for x in inputs[:5]], cu_seqlens=bounds)
    assert (written[0] is not None) == kept


def test_beta_of_zero_has_a_gradient():
    inputs, bounds = _inputs((1, 2, 16, 16), (70,), 0.1, torch.float32)
    inputs[4][::3] = 0.0
    _check(inputs, bounds, LIMITS[torch.float32])


def test_nothing_crosses_a_border_not_even_nan():
    inputs, bounds = _inputs((1, 2, 16, 16), (50, 40), 0.0, torch.float32)
    clean = _results(gated_delta_rule_triton, inputs, bounds, True)
    for x in inputs[:5]:
        x[:50] = float("nan")
    inputs[5][0] = float("nan")
    dirty = _results(gated_delta_rule_triton, inputs, bounds, True)
    for name, ours, expected in zip(NAMES, dirty, clean, strict=True):
        own = slice(1, None) if name in ("final", "dstate") else slice(50, None)
        assert torch.equal(ours[own], expected[own]), name


@pytest.mark.parametrize("split", [1, 64, 99])
def test_a_sequence_split_anywhere_equals_the_whole(split):
    inputs, bounds = _inputs((1, 2, 16, 16), (100,), 0.01, torch.float32)
    *tokens, state = inputs
    whole, final = gated_delta_rule_triton(*tokens, cu_seqlens=bounds, initial_state=state)
    head, between = gated_delta_rule_triton(
        *[x[:split] for x in tokens], cu_seqlens=_bounds((split,)), initial_state=state
    )
    tail, last = gated_delta_rule_triton(
        *[x[split:] for x in tokens], cu_seqlens=_bounds((100 - split,)), initial_state=between
    )
    assert error(torch.cat([head, tail]), whole) < 1e-5
    assert error(last, final) < 1e-5


def test_tokens_may_lie_apart_in_memory():
    inputs, bounds = _inputs((2, 2, 16, 16), (70,), 0.1, torch.float32)
    mixed = torch.cat([x.flatten(1) for x in inputs[:3]], dim=1)
    views = [x.view(70, 2, 16) for x in mixed.split(32, dim=1)]
    assert not views[0].is_contiguous()
    out, _ = gated_delta_rule_triton(*views, *inputs[3:5], cu_seqlens=bounds)
    expected, _ = gated_delta_rule_triton(*inputs[:5], cu_seqlens=bounds)
    assert torch.equal(out, expected)


def test_no_tokens_leave_the_states_as_they_are():
    inputs, bounds = _inputs((1, 2, 16, 16), (0, 0), 0.1, torch.float32)
    out, final = gated_delta_rule_triton(*inputs[:5], cu_seqlens=bounds, initial_state=inputs[5])
    assert out.shape == (0, 2, 16)
    assert torch.equal(final, inputs[5])


def test_the_chunk_table_covers_every_token_once_in_order():
    lengths = [0, 1, 64, 65, 0, 200] * 50 + [7]
    bounds = _bounds(lengths)
    k = torch.zeros(sum(lengths), 1, 16, device=DEVICE)
    gate = torch.zeros(sum(lengths), 1, device=DEVICE)
    inputs = triton_chunks.Inputs(None, k, k, gate, gate, bounds)
    table, first = triton_chunks.chunk_table(inputs)
    expected, starts = [], bounds.tolist()
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        expected += [[t, min(t + 64, end)] for t in range(start, end, 64)]
    assert table[: len(expected)].tolist() == expected
    assert not table[len(expected) :].any()
    counts = torch.tensor([-(-length // 64) for length in lengths])
    assert first.tolist() == (counts.cumsum(0) - counts).tolist()


def test_a_summary_maps_the_state_before_to_the_state_after():
    inputs, bounds = _inputs((1, 2, 16, 24), (70, 0, 30), 0.05, torch.float32)
    q, k, v, g, beta, state = inputs
    through, written = gated_delta_summary(k, v, g, beta, cu_seqlens=bounds)
    _, final = gated_delta_rule_triton(q, k, v, g, beta, cu_seqlens=bounds, initial_state=state)
    assert error(through @ state + written, final) < 1e-5
    expected = gated_delta_summary_reference(
        *[x.double() for x in (k, v, g, beta)], cu_seqlens=bounds
    )
    assert error(through, expected[0]) < 1e-5
    assert error(written, expected[1]) < 1e-5


def test_what_it_cannot_run_it_says():
    inputs, bounds = _inputs((1, 2, 16, 16), (3,), 0.1, torch.float32)
    assert supports(*inputs[:5], cu_seqlens=bounds) is None
    assert "float64" in supports(*[x.double() for x in inputs[:5]], cu_seqlens=bounds)
    assert "int32" in supports(*inputs[:5], cu_seqlens=bounds.long())
    with pytest.raises(ValueError, match="Hv = 3 must be a multiple of Hk = 2"):
        gated_delta_rule_triton(
            *[x.expand(-1, 2, -1) for x in inputs[:2]],
            torch.zeros(3, 3, 16),
            *inputs[3:5],
            cu_seqlens=bounds,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.02, 2.0])
def test_the_flagship_has_the_gradients_of_the_chunks_in_float64(decay, dtype):
    limit = max(LIMITS[dtype], 1e-4)
    inputs, bounds = _inputs(FLAGSHIP, (700, 1, 0, 64, 300), decay, dtype, alike=0.1)
    _check(inputs, bounds, limit, reference=gated_delta_rule_torch)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (64, 128), (80, 48), (256, 256)], ids=str)
def test_other_sizes_have_the_gradients_of_the_chunks_in_float64(size):
    for shape in ((2, 2, *size), (1, 4, *size)):
        inputs, bounds = _inputs(shape, (190, 33, 65), 0.05, HALF, alike=0.1)
        _check(inputs, bounds, LIMITS[HALF], reference=gated_delta_rule_torch)


def _kernels(inputs, bounds):
    return triton_scan.kernels(triton_chunks.Inputs(*inputs[:5], bounds))


@pytest.mark.gpu
@pytest.mark.skipif(not triton_scan.HAS_GLUON, reason="this Triton has no Gluon that fits")
def test_gluon_scans_the_heads_that_it_can():
    assert _kernels(*_inputs(FLAGSHIP, (3,), 0.1, HALF))[0] == "gluon"
    for shape, dtype in (
        ((1, 2, 64, 128), HALF),
        ((1, 2, 128, 96), HALF),
        (FLAGSHIP, torch.float32),
    ):
        assert _kernels(*_inputs(shape, (3,), 0.1, dtype)) == ["triton"]
    (q, k, v, *rest), bounds = _inputs(FLAGSHIP, (3,), 0.1, HALF)
    crooked = torch.cat([v.flatten(), v.flatten()[:1]])[1:].view_as(v)  # not 16-byte aligned
    assert _kernels([q, k, crooked, *rest], bounds) == ["triton"]


@pytest.mark.gpu
@pytest.mark.skipif(not triton_scan.HAS_GLUON, reason="this Triton has no Gluon that fits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize(
    "lengths", [(1,), (63, 0, 64, 65), (1000,), [0, 1, 5, 64, 90, 33] * 50], ids=len
)
def test_gluon_scans_as_triton_does(monkeypatch, lengths, has_state, dtype):
    inputs, bounds = _inputs((2, 4, 128, 192), lengths, 0.02, dtype, alike=0.1)
    found = _results(gated_delta_rule_triton, inputs, bounds, has_state)
    monkeypatch.setattr(triton_scan, "HAS_GLUON", False)
    expected = _results(gated_delta_rule_triton, inputs, bounds, has_state)
    errors = [error(a, b) for a, b in zip(found, expected, strict=True)]
    assert all(found < LIMITS[dtype] for found in errors), errors


@pytest.mark.gpu
@pytest.mark.skipif(not triton_scan.HAS_GLUON, reason="this Triton has no Gluon that fits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(2, 6), (1, 1), (1, 4)], ids=str)
@pytest.mark.parametrize(
    "lengths", [[64, 7, 0] * 60, (1,), (63, 0, 64, 65), (5000, *[0] * 500)], ids=len
)
def test_gluon_has_the_gradients_that_triton_has(monkeypatch, lengths, heads, dtype):
    inputs, bounds = _inputs((*heads, 128, 128), lengths, 0.02, dtype, alike=0.1)

    def with_tokens_apart(q, *others, **named):
        apart = torch.cat([q, q], dim=1)[:, : q.shape[1]]
        return gated_delta_rule_triton(apart, *others, **named)

    found = _results(with_tokens_apart, inputs, bounds, True)
    monkeypatch.setattr(triton_scan, "HAS_GLUON", False)
    expected = _results(gated_delta_rule_triton, inputs, bounds, True)
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        assert error(ours, theirs) < LIMITS[dtype] * (2 if name == "dg" else 1), name


@pytest.mark.gpu
def test_nothing_crosses_a_border_of_flagship_heads_not_even_nan():
    inputs, bounds = _inputs(FLAGSHIP, (50, 100, 70), 0.02, HALF, alike=0.1)
    clean = _results(gated_delta_rule_triton, inputs, bounds, True)
    for x in inputs[:5]:
        x[:50] = x[150:] = float("nan")
    inputs[5][::2] = float("nan")
    dirty = _results(gated_delta_rule_triton, inputs, bounds, True)
    for name, ours, expected in zip(NAMES, dirty, clean, strict=True):
        own = slice(1, 2) if name in ("final", "dstate") else slice(50, 150)
        assert torch.equal(ours[own], expected[own]), name


@pytest.mark.gpu
def test_many_packed_sequences_have_the_gradients_of_the_chunks_in_float64():
    lengths = [0, 1, 5, 64, 90, 33] * 50
    inputs, bounds = _inputs((4, 8, 128, 128), lengths, 0.02, HALF, alike=0.1)
    _check(inputs, bounds, LIMITS[HALF], reference=gated_delta_rule_torch)


@pytest.mark.gpu
def test_a_long_sequence_gives_the_same_bits_each_time():
    inputs, bounds = _inputs(FLAGSHIP, (8192,), 0.02, HALF, alike=0.1)
    first = _results(gated_delta_rule_triton, inputs, bounds, True)
    for _ in range(3):
        again = _results(gated_delta_rule_triton, inputs, bounds, True)
        for name, a, b in zip(NAMES, first, again, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.gpu
@pytest.mark.parametrize("has_state", [True, False])
def test_segments_of_flagship_heads_change_no_bit(monkeypatch, has_state):
    inputs, _ = _inputs(FLAGSHIP, (19000,), 0.02, HALF, alike=0.1)
    for end in (19000, 18000, 5000):  # on streams that run side by side
        bounds = _bounds((end,))
        for length in (8192, 1024):
            whole, cut = _whole_and_segmented(monkeypatch, inputs, bounds, has_state, length)
            for a, b in zip(whole, cut, strict=True):
                assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_graph_of_segments_replays_with_other_bounds():
    inputs, bounds = _inputs(FLAGSHIP, (17000,), 0.02, HALF, alike=0.1)

    def run():
        return gated_delta_rule_triton(*inputs[:5], cu_seqlens=bounds, initial_state=inputs[5])

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, final = run()
    bounds.copy_(_bounds((12000,)))
    graph.replay()
    expected, expected_final = run()
    assert torch.equal(out[:12000], expected[:12000])
    assert torch.equal(final, expected_final)


@pytest.mark.gpu
def test_a_graph_replays_with_other_bounds():
    inputs, bounds = _inputs(FLAGSHIP, (500, 12, 0), 0.02, HALF, alike=0.1)

    def run():
        return gated_delta_rule_triton(*inputs[:5], cu_seqlens=bounds, initial_state=inputs[5])

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, final = run()
    bounds.copy_(_bounds((100, 300, 112)))
    graph.replay()
    expected, expected_final = run()
    assert torch.equal(out, expected)
    assert torch.equal(final, expected_final)


def test_the_interpreter_is_used_only_without_a_gpu():
    assert IS_INTERPRETED == (DEVICE == "cpu")
