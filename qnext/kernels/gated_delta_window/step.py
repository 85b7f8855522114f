"""Gated DeltaNet between its projections, for the rows of a window, inside a whole step."""

from typing import Any

import numpy as np

from qnext.kernels.cpu_columns import advance_state, read_state
from qnext.kernels.cpu_lanes import floats_at, from_bits, inner, ints_at, offset
from qnext.kernels.cpu_math import sigmoid, silu, softplus, sum_of_squares
from qnext.kernels.cpu_team import layer_part, share, thread_idx
from qnext.kernels.decode_step import fields as F

_L2_EPS = np.float32(1e-6)
_ONE = np.float32(1.0)


@inner
def _advance_history(
    history: Any, width: Any, inputs: Any, channels: Any, span: Any, count: Any
) -> None:
    """Take `count` window inputs into the last raw inputs of the convolution's channels [span)."""
    start, end = span
    for c in range(start, end):
        own = offset(history, c * (width - 1))
        for i in range(width - 1):
            source = i + count - (width - 1)
            own[i] = own[i + count] if source < 0 else inputs[source * channels + c]


@inner
def _convolve(
    mixed: Any, stride: Any, history: Any, taps: Any, width: Any, sizes: Any, span: Any, out: Any
) -> None:
    """Causal convolution and SiLU of a window's rows, channels [span).

    mixed, out: rows `stride` apart; history: [channels, width - 1]; taps: [width, channels]
    """
    num_rows, channels = sizes
    start, end = span
    for t in range(num_rows):
        row = offset(out, t * stride)
        for c in range(start, end):
            row[c] = np.float32(0.0)
        for tap in range(width):
            source = t - (width - 1) + tap
            weights = offset(taps, tap * channels)
            if source >= 0:
                inputs = offset(mixed, source * stride)
                for c in range(start, end):
                    row[c] += inputs[c] * weights[c]
            else:
                past = offset(history, width - 1 + source)
                for c in range(start, end):
                    row[c] += past[c * (width - 1)] * weights[c]
        for c in range(start, end):
            row[c] = silu(row[c])


@inner
def _normalise(row: Any, size: Any, scale: Any, out: Any) -> None:
    """A row of unit length, times scale."""
    factor = scale / np.sqrt(sum_of_squares(row, size) + _L2_EPS)
    for i in range(size):
        out[i] = row[i] * factor


@inner
def _product(a: Any, b: Any, size: Any) -> Any:
    """Sum of a[i] * b[i], one after another."""
    total = np.float32(0.0)
    for i in range(size):
        total += a[i] * b[i]
    return total


@inner
def _settle(t: Any, place: Any, head: Any, slot_place: Any) -> Any:
    """Replay all pending rows but the last into a head's state; returns how many were pending."""
    count = ints_at(t[F.PENDING])[slot_place % t[F.NUM_SLOTS]]
    hv, k, v, group = t[F.HV], t[F.K], t[F.V], t[F.HV] // t[F.HK]
    rows = slot_place * t[F.MAX_WINDOW]
    for step in range(count - 1):
        advance_state(
            floats_at(place),
            offset(floats_at(t[F.WINDOW_KEYS]), ((rows + step) * t[F.HK] + head // group) * k),
            offset(floats_at(t[F.WINDOW_CHANGES]), ((rows + step) * hv + head) * v),
            floats_at(t[F.WINDOW_DECAYS])[(rows + step) * hv + head],
            (k, v),
        )
    return count


@inner
def _value_head(t: Any, row: Any, n: Any, slot_place: Any, head: Any) -> None:
    """One value head of a sequence's rows: states, read-out, norm and gate.

    The committed state stays as it is but for rows accepted earlier, which it takes in while it
    is read. Rows after the first go on from a scratch state.
    """
    hv, kd, vd, group = t[F.HV], t[F.K], t[F.V], t[F.HV] // t[F.HK]
    starts = ints_at(t[F.STARTS])
    start, count = starts[n], starts[n + 1] - starts[n]
    stride = t[F.STRIDE_FUSED]
    channels = 2 * t[F.HK] * kd + hv * vd
    window = slot_place * t[F.MAX_WINDOW]
    address = t[F.STATES] + (slot_place * hv + head) * kd * vd * 4
    pending = _settle(t, address, head, slot_place)
    state, scratch = (
        floats_at(address),
        offset(floats_at(t[F.SCRATCH_STATE]), thread_idx() * kd * vd),
    )
    all_keys = floats_at(t[F.WINDOW_KEYS])
    changes, decays = floats_at(t[F.WINDOW_CHANGES]), floats_at(t[F.WINDOW_DECAYS])
    norm = floats_at(row[F.GATED_NORM])
    eps = from_bits(np.int32(t[F.EPS]))
    key_head = head // group
    q_offset, k_offset = key_head * kd, (t[F.HK] + key_head) * kd
    # The last pending row, read before this window overwrites it.
    last = window + pending - 1
    old_key = offset(all_keys, (last * t[F.HK] + key_head) * kd)
    old_change = offset(changes, (last * hv + head) * vd)
    old_decay = decays[last * hv + head] if pending > 0 else _ONE
    before, after = state, state
    is_updating = pending > 0
    heads = floats_at(t[F.HEADS])
    for step in range(count):
        fused = offset(floats_at(t[F.FUSED]), (start + step) * stride)
        convolved = offset(floats_at(t[F.CONVOLVED]), (start + step) * stride)
        q, k = offset(convolved, q_offset), offset(convolved, k_offset)
        values = offset(convolved, 2 * t[F.HK] * kd + head * vd)
        gates = offset(fused, channels + hv * vd)
        beta = sigmoid(gates[head])
        a = gates[hv + head] + floats_at(row[F.DT_BIAS])[head]
        decay = np.float32(np.exp(-floats_at(row[F.DECAY_RATE])[head] * softplus(a)))
        out = offset(heads, (start + step) * t[F.STRIDE_HEADS] + head * vd)
        change = offset(changes, ((window + step) * hv + head) * vd)
        from_k = offset(floats_at(t[F.STATE_READ]), (n * hv + head) * vd)
        read_state(
            before,
            after,
            is_updating,
            (old_key, old_change, old_decay),
            (kd, vd),
            k,
            q,
            from_k,
            out,
        )
        overlap = _product(k, q, kd)
        for j in range(vd):
            change[j] = (values[j] - decay * from_k[j]) * beta
            out[j] = decay * out[j] + overlap * change[j]
        decays[(window + step) * hv + head] = decay
        inverse = _ONE / np.sqrt(sum_of_squares(out, vd) / np.float32(vd) + eps)
        z = offset(fused, channels + head * vd)
        for j in range(vd):
            out[j] = out[j] * inverse * norm[j] * silu(z[j])
        old_key, old_change, old_decay = k, change, decay
        before = state if step == 0 else scratch
        after = scratch
        is_updating = True


@layer_part
def mix_window(t: Any, row: Any, normed: Any, arranged: Any) -> None:
    """DeltaNet heads of this thread: FUSED, the projected rows, to HEADS.

    The loop holds the work on a key head, with the value heads that read it: a function for it
    would be compiled twice.
    """
    first_item, last_item = share(t[F.NUM_SEQS] * t[F.HK], 1)
    for item in range(first_item, last_item):
        n, head = item // t[F.HK], item % t[F.HK]
        hk, hv, kd, vd, width = t[F.HK], t[F.HV], t[F.K], t[F.V], t[F.WIDTH]
        group = hv // hk
        channels = 2 * hk * kd + hv * vd
        starts = ints_at(t[F.STARTS])
        start, count = starts[n], starts[n + 1] - starts[n]
        slot_place = row[F.MIXER_IDX] * t[F.NUM_SLOTS] + ints_at(t[F.SLOTS])[n]
        pending = ints_at(t[F.PENDING])[ints_at(t[F.SLOTS])[n]]
        history = offset(floats_at(t[F.CONV_STATE]), slot_place * channels * (width - 1))
        inputs = offset(floats_at(t[F.WINDOW_INPUTS]), slot_place * t[F.MAX_WINDOW] * channels)
        keys = offset(floats_at(t[F.WINDOW_KEYS]), slot_place * t[F.MAX_WINDOW] * hk * kd)
        stride = t[F.STRIDE_FUSED]
        fused = offset(floats_at(t[F.FUSED]), start * stride)
        convolved = offset(floats_at(t[F.CONVOLVED]), start * stride)
        spans = (
            (head * kd, (head + 1) * kd),
            ((hk + head) * kd, (hk + head + 1) * kd),
            (2 * hk * kd + head * group * vd, 2 * hk * kd + (head + 1) * group * vd),
        )
        for part in range(3):
            span = spans[part]
            if pending > 0:
                _advance_history(history, width, inputs, channels, span, pending)
            taps = floats_at(row[F.CONV])
            _convolve(fused, stride, history, taps, width, (count, channels), span, convolved)
            for t_row in range(count):
                for c in range(span[0], span[1]):
                    inputs[t_row * channels + c] = fused[t_row * stride + c]
        scale = _ONE / np.sqrt(np.float32(kd))
        for t_row in range(count):
            q = offset(convolved, t_row * stride + spans[0][0])
            k = offset(convolved, t_row * stride + spans[1][0])
            _normalise(q, kd, scale, q)
            _normalise(k, kd, _ONE, k)
        for h in range(head * group, (head + 1) * group):
            _value_head(t, row, n, slot_place, h)
        for t_row in range(count):
            k = offset(convolved, t_row * stride + spans[1][0])
            for i in range(kd):
                keys[(t_row * hk + head) * kd + i] = k[i]
