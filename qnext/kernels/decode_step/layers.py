"""One decoder layer on the rows of a window, for Numba.

Letters as everywhere: T rows, C hidden, Hq Hkv D attention, Hk Hv K V DeltaNet, E experts, A per
token, I width. Weights come as a row of addresses, see `numba.LAYER_FIELDS`. Sizes come in `dims`,
see `numba.DIMS`. All activations are fp32.
"""

from typing import Any

import numpy as np
from numba import carray

from qnext.kernels.cpu_lanes import (
    compiled,
    dot,
    inner,
    inverse_rms,
    pointer,
    rms_norm_rows,
    rows_times_matrix,
    sigmoid,
)

# Columns of the table of layers.
IS_ATTENTION, MIXER_IDX, IS_MOE = 0, 1, 2
LN1, IN_PROJ, OUT_PROJ, LN2 = 3, 4, 5, 6
CONV, DECAY_RATE, DT_BIAS, GATED_NORM = 7, 8, 9, 10
Q_NORM, K_NORM = 11, 12
ROUTER, EXPERTS_UP, EXPERTS_DOWN, SHARED_UP, SHARED_DOWN, SHARED_GATE = 13, 14, 15, 16, 17, 18
DENSE_UP, DENSE_DOWN = 19, 20
NUM_COLUMNS = 21
# Entries of the vector of sizes.
C, HQ, HKV, D, HK, HV, K, V, WIDTH, E, A, I, SHARED, DENSE, HALF_ROTARY, NORM_TOPK = range(16)
L2_EPS = np.float32(1e-6)


@inner
def vector(address: Any, size: Any, like: Any) -> Any:
    """An fp32 vector at an address."""
    return carray(pointer(address, like), (size,))


@inner
def matrix(address: Any, rows: Any, columns: Any, like: Any) -> Any:
    """A weight at an address, of the dtype of `like`."""
    return carray(pointer(address, like), (rows, columns))


@inner
def swiglu_add(row: Any, up: Any, down: Any, factor: Any, hidden: Any, out: Any) -> None:
    """out += factor * down(silu(gate x) * up x). row x [C]; up [2I, C]; down [C, I]; hidden [I]"""
    width = down.shape[1]
    for i in range(width):
        gate = dot(row, up[i])
        hidden[i] = gate * sigmoid(gate) * dot(row, up[width + i])
    for c in range(out.shape[0]):
        out[c] += factor * dot(hidden[:width], down[c])


@inner
def conv_rows(mixed: Any, taps: Any, history: Any, start: Any, end: Any, out: Any) -> None:
    """Causal convolution and SiLU of one sequence's rows [start, end). history: [D, width - 1]"""
    width = taps.shape[1]
    for t in range(start, end):
        for c in range(taps.shape[0]):
            total = np.float32(0.0)
            for tap in range(width):
                source = t - (width - 1) + tap
                if source >= start:
                    value = mixed[source, c]
                else:
                    value = history[c, width - 1 + source - start]
                total += value * taps[c, tap]
            out[t, c] = total * sigmoid(total)


@inner
def normalise(row: Any, scale: Any) -> None:
    """Make a row unit length, then scale it. [K]"""
    inverse = np.float32(1.0) / np.sqrt(dot(row, row) + L2_EPS)
    for i in range(row.shape[0]):
        row[i] = row[i] * inverse * scale


@inner
def delta_head(
    state: Any, q: Any, k: Any, v: Any, decay: Any, beta: Any, change: Any, out: Any
) -> None:
    """One token of one head; the state stays as it is. state [K, V]; change, out [V]

    The new state is worked out element by element, as `advance` does, so that both agree to the
    last bit.
    """
    for j in range(v.shape[0]):
        change[j] = np.float32(0.0)
        out[j] = np.float32(0.0)
    for i in range(k.shape[0]):
        for j in range(v.shape[0]):
            change[j] += state[i, j] * decay * k[i]
    for j in range(v.shape[0]):
        change[j] = (v[j] - change[j]) * beta
    for i in range(k.shape[0]):
        for j in range(v.shape[0]):
            out[j] += (state[i, j] * decay + k[i] * change[j]) * q[i]


@inner
def advance(state: Any, k: Any, change: Any, decay: Any, out: Any) -> None:
    """out = decay * state + k change^T; out may be the state itself. [K, V]"""
    for i in range(k.shape[0]):
        for j in range(change.shape[0]):
            out[i, j] = state[i, j] * decay + k[i] * change[j]


@inner
def delta_net(
    x: Any,
    row: Any,
    dims: Any,
    eps: Any,
    starts: Any,
    slots: Any,
    pools: Any,
    buffers: Any,
    like: Any,
    like32: Any,
) -> Any:
    """Gated DeltaNet of normed rows x [T, C]; returns the output of out_proj [T, C]."""
    conv_state, states, window_keys, window_changes, window_decays, window_inputs = pools
    mixed, convolved, heads, result, scratch_state = buffers
    hk, hv, kd, vd = dims[HK], dims[HV], dims[K], dims[V]
    conv_dim = 2 * hk * kd + hv * vd
    size = conv_dim + hv * vd + 2 * hv
    layer = row[MIXER_IDX]
    num_rows = x.shape[0]
    rows_times_matrix(x, matrix(row[IN_PROJ], size, dims[C], like), mixed)
    taps = matrix(row[CONV], conv_dim, dims[WIDTH], like32)
    rate, dt_bias = vector(row[DECAY_RATE], hv, like32), vector(row[DT_BIAS], hv, like32)
    norm = vector(row[GATED_NORM], vd, like32)
    scale = np.float32(kd) ** np.float32(-0.5)
    for n in range(slots.shape[0]):
        slot, start, end = slots[n], starts[n], starts[n + 1]
        conv_rows(mixed, taps, conv_state[layer, slot], start, end, convolved)
        for t in range(start, end):
            step = t - start
            window_inputs[layer, slot, step] = mixed[t, :conv_dim]
            for h in range(hk):
                normalise(convolved[t, h * kd : (h + 1) * kd], scale)
                key = convolved[t, (hk + h) * kd : (hk + h + 1) * kd]
                normalise(key, np.float32(1.0))
                window_keys[layer, slot, step, h] = key
            for h in range(hv):
                key_head = h // (hv // hk)
                q = convolved[t, key_head * kd : (key_head + 1) * kd]
                k = convolved[t, (hk + key_head) * kd : (hk + key_head + 1) * kd]
                v = convolved[t, 2 * hk * kd + h * vd : 2 * hk * kd + (h + 1) * vd]
                b = mixed[t, conv_dim + hv * vd + h]
                a = mixed[t, conv_dim + hv * vd + hv + h] + dt_bias[h]
                softplus = a if a > np.float32(20.0) else np.log1p(np.exp(a))
                decay = np.exp(-rate[h] * softplus)
                change = window_changes[layer, slot, step, h]
                state = states[layer, slot, h] if step == 0 else scratch_state[h]
                out = heads[t, h * vd : (h + 1) * vd]
                delta_head(state, q, k, v, decay, sigmoid(b), change, out)
                if t + 1 < end:
                    advance(state, k, change, decay, scratch_state[h])
                window_decays[layer, slot, step, h] = decay
                inverse = inverse_rms(out, eps)
                for j in range(vd):
                    z = mixed[t, conv_dim + h * vd + j]
                    out[j] = out[j] * inverse * norm[j] * (z * sigmoid(z))
    out_proj = matrix(row[OUT_PROJ], dims[C], hv * vd, like)
    rows_times_matrix(heads[:num_rows, : hv * vd], out_proj, result)


@inner
def rotate(head: Any, weight: Any, eps: Any, cos: Any, sin: Any, half: Any) -> None:
    """Zero-centred norm of one head [D], then rotation of its first 2 * half dimensions."""
    inverse = inverse_rms(head, eps)
    for i in range(head.shape[0]):
        head[i] = head[i] * inverse * (np.float32(1.0) + weight[i])
    for i in range(half):
        first, second = head[i], head[half + i]
        head[i] = first * cos[i] - second * sin[i]
        head[half + i] = second * cos[i] + first * sin[i]


@inner
def attend(
    q: Any, keys: Any, values: Any, pages: Any, page_size: Any, length: Any, scores: Any, out: Any
) -> None:
    """Softmax attention of one query head to the first tokens of a sequence, oldest first.

    q, out: [D]; keys, values: one head's rows of the pool [S, D]; scores: room for `length`.
    """
    scale = np.float32(q.shape[0]) ** np.float32(-0.5)
    top = np.float32(-np.inf)
    for p in range(length):
        slot = pages[p // page_size] * page_size + p % page_size
        scores[p] = dot(q, keys[slot]) * scale
        top = max(top, scores[p])
    total = np.float32(0.0)
    for i in range(out.shape[0]):
        out[i] = np.float32(0.0)
    for p in range(length):
        slot = pages[p // page_size] * page_size + p % page_size
        weight = np.exp(scores[p] - top)
        total += weight
        for i in range(out.shape[0]):
            out[i] += weight * values[slot, i]
    for i in range(out.shape[0]):
        out[i] /= total


@inner
def attention(
    x: Any,
    row: Any,
    dims: Any,
    eps: Any,
    starts: Any,
    contexts: Any,
    pages: Any,
    page_size: Any,
    pools: Any,
    tables: Any,
    buffers: Any,
    like: Any,
    like32: Any,
) -> None:
    """Gated Attention of normed rows x [T, C]; keys and values are written to the pool."""
    key_pool, value_pool = pools
    cos, sin = tables
    fused, heads, result, scores = buffers
    hq, hkv, d, half = dims[HQ], dims[HKV], dims[D], dims[HALF_ROTARY]
    size = 2 * hq * d + 2 * hkv * d
    layer = row[MIXER_IDX]
    rows_times_matrix(x, matrix(row[IN_PROJ], size, dims[C], like), fused)
    q_norm, k_norm = vector(row[Q_NORM], d, like32), vector(row[K_NORM], d, like32)
    for n in range(contexts.shape[0]):
        for t in range(starts[n], starts[n + 1]):
            position = contexts[n] + t - starts[n]
            slot = pages[n, position // page_size] * page_size + position % page_size
            for h in range(hkv):
                key = fused[t, 2 * hq * d + h * d : 2 * hq * d + (h + 1) * d]
                rotate(key, k_norm, eps, cos[position], sin[position], half)
                key_pool[layer, slot, h] = key
                offset = (2 * hq + hkv) * d
                value_pool[layer, slot, h] = fused[t, offset + h * d : offset + (h + 1) * d]
            for h in range(hq):
                q = fused[t, h * d : (h + 1) * d]
                rotate(q, q_norm, eps, cos[position], sin[position], half)
                out = heads[t, h * d : (h + 1) * d]
                head = h // (hq // hkv)
                attend(
                    q,
                    key_pool[layer, :, head],
                    value_pool[layer, :, head],
                    pages[n],
                    page_size,
                    position + 1,
                    scores,
                    out,
                )
                for i in range(d):
                    out[i] *= sigmoid(fused[t, hq * d + h * d + i])
    out_proj = matrix(row[OUT_PROJ], dims[C], hq * d, like)
    rows_times_matrix(heads[: x.shape[0], : hq * d], out_proj, result)


@inner
def route(row: Any, gate: Any, top_k: Any, renormalise: Any, probs: Any, ids: Any) -> None:
    """Ids of the most probable experts, best first, and their weights in probs[ids]."""
    top = np.float32(-np.inf)
    for e in range(gate.shape[0]):
        probs[e] = dot(row, gate[e])
        top = max(top, probs[e])
    total = np.float32(0.0)
    for e in range(gate.shape[0]):
        probs[e] = np.exp(probs[e] - top)
        total += probs[e]
    chosen = np.float32(0.0)
    for a in range(top_k):
        best = -1
        for e in range(gate.shape[0]):
            is_taken = False
            for earlier in range(a):
                is_taken |= ids[earlier] == e
            if not is_taken and (best < 0 or probs[e] > probs[best]):
                best = e
        ids[a] = best
        chosen += probs[best]
    divisor = chosen if renormalise else total
    for a in range(top_k):
        probs[ids[a]] /= divisor


@inner
def mixture(x: Any, row: Any, dims: Any, buffers: Any, result: Any, like: Any) -> None:
    """Mixture of experts of normed rows x [T, C] into result [T, C]."""
    probs, ids, hidden = buffers
    c, e, width, shared = dims[C], dims[E], dims[I], dims[SHARED]
    gate = matrix(row[ROUTER], e, c, like)
    up = carray(pointer(row[EXPERTS_UP], like), (e, 2 * width, c))
    down = carray(pointer(row[EXPERTS_DOWN], like), (e, c, width))
    for t in range(x.shape[0]):
        route(x[t], gate, dims[A], dims[NORM_TOPK] != 0, probs, ids)
        out = result[t]
        for i in range(c):
            out[i] = np.float32(0.0)
        for a in range(dims[A]):
            swiglu_add(x[t], up[ids[a]], down[ids[a]], probs[ids[a]], hidden, out)
        if shared > 0:
            factor = sigmoid(dot(x[t], matrix(row[SHARED_GATE], 1, c, like)[0]))
            shared_up = matrix(row[SHARED_UP], 2 * shared, c, like)
            shared_down = matrix(row[SHARED_DOWN], c, shared, like)
            swiglu_add(x[t], shared_up, shared_down, factor, hidden, out)


@inner
def dense(x: Any, row: Any, dims: Any, hidden: Any, result: Any, like: Any) -> None:
    """Dense SwiGLU of normed rows x [T, C] into result [T, C]."""
    width = dims[DENSE]
    up = matrix(row[DENSE_UP], 2 * width, dims[C], like)
    down = matrix(row[DENSE_DOWN], dims[C], width, like)
    for t in range(x.shape[0]):
        for i in range(dims[C]):
            result[t, i] = np.float32(0.0)
        swiglu_add(x[t], up, down, np.float32(1.0), hidden, result[t])


@compiled
def run_layers(
    x: Any,
    layers: Any,
    dims: Any,
    eps: Any,
    places: Any,
    kv_pools: Any,
    state_pools: Any,
    tables: Any,
    scratch: Any,
    final_norm: Any,
    like: Any,
    like32: Any,
    out: Any,
) -> None:
    """Run decoder layers on the residual rows x [T, C], in place; out: states after the norm.

    places: starts [N + 1], state slots [N], contexts [N], page table [N, P], page size.
    """
    starts, slots, contexts, pages, page_size = places
    normed, fused, convolved, heads, result, scores, probs, ids, hidden, scratch_state = scratch
    num_rows = x.shape[0]
    for layer_idx in range(layers.shape[0]):
        row = layers[layer_idx]
        rms_norm_rows(x, vector(row[LN1], dims[C], like32), eps, normed)
        if row[IS_ATTENTION]:
            attention(
                normed[:num_rows],
                row,
                dims,
                eps,
                starts,
                contexts,
                pages,
                page_size,
                kv_pools,
                tables,
                (fused, heads, result, scores),
                like,
                like32,
            )
        else:
            delta_net(
                normed[:num_rows],
                row,
                dims,
                eps,
                starts,
                slots,
                state_pools,
                (fused, convolved, heads, result, scratch_state),
                like,
                like32,
            )
        for t in range(num_rows):
            for i in range(x.shape[1]):
                x[t, i] += result[t, i]
        rms_norm_rows(x, vector(row[LN2], dims[C], like32), eps, normed)
        if row[IS_MOE]:
            mixture(normed[:num_rows], row, dims, (probs, ids, hidden), result, like)
        else:
            dense(normed[:num_rows], row, dims, hidden, result, like)
        for t in range(num_rows):
            for i in range(x.shape[1]):
                x[t, i] += result[t, i]
    rms_norm_rows(x, final_norm, eps, out)


@compiled
def commit_rows(
    slots: Any,
    counts: Any,
    conv_state: Any,
    states: Any,
    window_keys: Any,
    window_changes: Any,
    window_decays: Any,
    window_inputs: Any,
) -> None:
    """Replay the first counts[n] rows of each window into the committed states of all layers."""
    layers, _, num_heads = states.shape[:3]
    group = num_heads // window_keys.shape[3]
    width = conv_state.shape[3]
    for n in range(slots.shape[0]):
        slot = slots[n]
        for layer in range(layers):
            for step in range(counts[n]):
                for h in range(num_heads):
                    advance(
                        states[layer, slot, h],
                        window_keys[layer, slot, step, h // group],
                        window_changes[layer, slot, step, h],
                        window_decays[layer, slot, step, h],
                        states[layer, slot, h],
                    )
                for c in range(conv_state.shape[2]):
                    for i in range(width - 1):
                        conv_state[layer, slot, c, i] = conv_state[layer, slot, c, i + 1]
                    conv_state[layer, slot, c, width - 1] = window_inputs[layer, slot, step, c]
