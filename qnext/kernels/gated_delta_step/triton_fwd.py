"""A DeltaNet layer between its projections, for a few new rows per sequence, in one kernel.

The kernel here takes all sizes; `gluon_fwd.py` has a faster one for heads of 128 x 128.
"""

import os

import torch
import triton
import triton.language as tl

from qnext.kernels.gated_delta_step.inputs import L2_EPS, StepMemory, StepRows, StepWeights
from qnext.kernels.gated_delta_step.triton_gates import silu, softplus

# Triton reads the same variable when it is imported; interpreted kernels take CPU tensors.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Gluon compiles for GPUs only, and its names were others in older releases.
HAS_GLUON = not IS_INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
if HAS_GLUON:
    from qnext.kernels.gated_delta_step import gluon_fwd

MAX_WIDTH = 4  # three past inputs of each channel are kept in registers
MAX_HEAD_DIM = 128  # a head's whole state is kept in registers
MAX_ROWS = 8  # also what the Gluon kernel norms at once
STATE_PER_WARP = 2048  # elements of a head's state per warp: 64 in each thread
MAX_REGISTERS = 128  # of a thread, so that two programs of 8 warps share a multiprocessor


@triton.jit
def channels(
    i_h: tl.tensor, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    B: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Places of a head's [k, v] and [q, z] in a row of `fused`, and which exist, all [2, B].

    Two vectors at a time, so that each thread of 8 warps holds one element. A single vector of
    128 would be laid out like the rows of the state, 16 elements in each thread, and spill.
    """
    is_key = tl.arange(0, 2)[:, None] == 0
    o_c = tl.arange(0, B)[None, :]
    o_q = i_h // (HV // HK) * K
    o_v = 2 * HK * K + i_h * V
    o_kv = tl.where(is_key, HK * K + o_q, o_v) + o_c
    o_qz = tl.where(is_key, o_q, HV * V + o_v) + o_c
    return o_kv, o_qz, o_c < tl.where(is_key, K, V), is_key


@triton.jit
def load_row(
    p_ring: tl.tensor, p_fused: tl.tensor, i_h: tl.tensor, position: tl.tensor,
    context: tl.tensor, end: tl.tensor,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    B: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Raw inputs of a head at a position: [k, v] and [q, z], both [2, B], and b and a.

    Those before `context` come from the ring, which has no z; positions outside 0 .. end - 1 are
    zero.
    """
    D: tl.constexpr = 2 * HK * K + HV * V
    o_kv, o_qz, m_x, is_key = channels(i_h, HK, HV, K, V, B)
    is_past = position < context
    is_there = (position >= 0) & (position < end)
    p_past = p_ring + position % R * (D + 2 * HV)
    p_new = p_fused + (position - context) * (D + HV * V + 2 * HV)
    p_row = tl.where(is_past, p_past, p_new)
    p_b = p_row + tl.where(is_past, D, D + HV * V) + i_h
    kv = tl.load(p_row + o_kv, mask=m_x & is_there, other=0.0).to(tl.float32)
    qz = tl.load(p_row + o_qz, mask=m_x & is_there & (is_key | ~is_past), other=0.0)
    b = tl.load(p_b, mask=is_there, other=0.0).to(tl.float32)
    a = tl.load(p_b + HV, mask=is_there, other=0.0).to(tl.float32)
    qz = qz.to(tl.float32)
    return kv, qz, b, a


@triton.jit
def store_row(
    p_ring: tl.tensor, kv: tl.tensor, qz: tl.tensor, b: tl.tensor, a: tl.tensor,
    i_h: tl.tensor, position: tl.tensor,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    B: tl.constexpr,
) -> None:  # fmt: skip
    """Write a head's raw inputs to the ring; of heads that share q and k, the first writes them."""
    D: tl.constexpr = 2 * HK * K + HV * V
    o_kv, o_qz, m_x, is_key = channels(i_h, HK, HV, K, V, B)
    is_first = i_h % (HV // HK) == 0
    p_row = p_ring + position % R * (D + 2 * HV)
    tl.store(p_row + o_kv, kv.to(p_ring.dtype.element_ty), mask=m_x & (is_first | ~is_key))
    tl.store(p_row + o_qz, qz.to(p_ring.dtype.element_ty), mask=m_x & (is_first & is_key))
    tl.store(p_row + D + i_h, b.to(p_ring.dtype.element_ty))
    tl.store(p_row + D + HV + i_h, a.to(p_ring.dtype.element_ty))


@triton.jit
def load_taps(
    p_conv1d: tl.tensor, i_h: tl.tensor, LAG: tl.constexpr, WIDTH: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, B: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Weights of the inputs LAG rows back; z, which skips the convolution, has 1 at LAG 0."""
    o_kv, o_qz, m_x, is_key = channels(i_h, HK, HV, K, V, B)
    p_taps = p_conv1d + (WIDTH - 1 - LAG)
    kv = tl.load(p_taps + o_kv * WIDTH, mask=m_x & (LAG < WIDTH), other=0.0)
    q = tl.load(p_taps + o_qz * WIDTH, mask=m_x & is_key & (LAG < WIDTH), other=0.0)
    return kv.to(tl.float32), tl.where(is_key, q.to(tl.float32), 1.0 if LAG == 0 else 0.0)


@triton.jit
def unit_key(x: tl.tensor, EPS: tl.constexpr, SCALE: tl.constexpr) -> tl.tensor:
    """The two rows of x [2, B], the first one at length SCALE."""
    factor = tl.rsqrt(tl.sum(x * x, 1) + EPS) * SCALE
    is_key = tl.arange(0, 2) == 0
    return tl.split(tl.permute(x * tl.where(is_key, factor, 1.0)[:, None], (1, 0)))


@triton.jit(
    do_not_specialize=["Q"],
    do_not_specialize_on_alignment=["p_slots", "p_query_lens", "p_context_lens", "p_pending"],
)
def gated_delta_step_fwd_kernel(
    p_fused: tl.tensor,
    p_conv1d: tl.tensor,
    p_A_log: tl.tensor,
    p_dt_bias: tl.tensor,
    p_norm: tl.tensor,
    p_ring: tl.tensor,
    p_states: tl.tensor,
    p_slots: tl.tensor,
    p_query_lens: tl.tensor,
    p_context_lens: tl.tensor,
    p_pending: tl.tensor,
    p_heads: tl.tensor,
    Q: tl.tensor,
    norm_eps: tl.tensor,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    EPS: tl.constexpr,
    B: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """One value head of one sequence: its whole state in registers, its rows one by one.

    The entries of the ring that are read (start - (WIDTH - 1) .. context - 1) and written
    (context .. end - 1) differ, so the programs of a sequence need no order among them. Replayed,
    certain and draft rows run through the same instructions, so drafts change no bit of the rest.
    """
    D: tl.constexpr = 2 * HK * K + HV * V
    i_h = tl.program_id(0)
    i_n = tl.program_id(1).to(tl.int64)
    slot = tl.load(p_slots + i_n).to(tl.int64)
    query_len = tl.load(p_query_lens + i_n)
    context = tl.load(p_context_lens + i_n)
    is_real = query_len > 0
    # Padding reads and runs nothing: all its positions are outside 0 .. end - 1.
    context = tl.where(is_real, context, 0)
    start = context - tl.where(is_real, tl.load(p_pending + i_n), 0)
    end = context + query_len
    p_ring += slot * (R * (D + 2 * HV))
    p_fused += i_n * Q * (D + HV * V + 2 * HV)
    p_heads += i_n * Q * (HV * V) + i_h * V
    o_k = tl.arange(0, B)[:, None]
    o_v = tl.arange(0, B)
    m_v = o_v < V
    p_s = p_states + (slot * HV + i_h) * (K * V) + o_k * V + o_v[None, :]
    m_s = (o_k < K) & m_v[None, :]
    # A state with no token in it is zero, so a new sequence needs no cleared slot.
    m_old = m_s & (start > 0)

    # Older inputs than the convolution is wide may never have been written: not read.
    end3 = start if WIDTH > 3 else 0
    end2 = start if WIDTH > 2 else 0
    end1 = start if WIDTH > 1 else 0
    kv0, qz0, _, _ = load_row(p_ring, p_fused, i_h, start - 3, start, end3, HK, HV, K, V, R, B)
    kv1, qz1, _, _ = load_row(p_ring, p_fused, i_h, start - 2, start, end2, HK, HV, K, V, R, B)
    kv2, qz2, _, _ = load_row(p_ring, p_fused, i_h, start - 1, start, end1, HK, HV, K, V, R, B)
    rate = tl.exp(tl.load(p_A_log + i_h).to(tl.float32))
    dt_bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    if USE_PDL:
        # The state doesn't depend on the kernel in front: it is on its way while that one ends.
        b_s = tl.load(p_s, mask=m_old, other=0.0).to(tl.float32)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kv3, qz3, b, a = load_row(p_ring, p_fused, i_h, start, context, end, HK, HV, K, V, R, B)
    if not USE_PDL:
        b_s = tl.load(p_s, mask=m_old, other=0.0).to(tl.float32)

    for position in range(start, end):
        kv4, qz4, next_b, next_a = load_row(
            p_ring, p_fused, i_h, position + 1, context, end, HK, HV, K, V, R, B
        )
        if position >= context:
            store_row(p_ring, kv3, qz3, b, a, i_h, position, HK, HV, K, V, R, B)
        taps_kv, taps_qz = load_taps(p_conv1d, i_h, 3, WIDTH, HK, HV, K, V, B)
        b_kv, b_qz = kv0 * taps_kv, qz0 * taps_qz
        taps_kv, taps_qz = load_taps(p_conv1d, i_h, 2, WIDTH, HK, HV, K, V, B)
        b_kv, b_qz = b_kv + kv1 * taps_kv, b_qz + qz1 * taps_qz
        taps_kv, taps_qz = load_taps(p_conv1d, i_h, 1, WIDTH, HK, HV, K, V, B)
        b_kv, b_qz = b_kv + kv2 * taps_kv, b_qz + qz2 * taps_qz
        taps_kv, taps_qz = load_taps(p_conv1d, i_h, 0, WIDTH, HK, HV, K, V, B)
        b_kv, b_qz = b_kv + kv3 * taps_kv, b_qz + qz3 * taps_qz
        decay = tl.exp(-rate * softplus(a + dt_bias))
        beta = tl.sigmoid(b)
        b_k, b_v = unit_key(silu(b_kv), EPS, 1.0)
        held = tl.sum(b_s * b_k[:, None], 0)
        change = beta * (b_v - decay * held)
        b_s = decay * b_s + b_k[:, None] * change[None, :]
        if position == context:
            tl.store(p_s, b_s.to(p_states.dtype.element_ty), mask=m_s)
        b_q, gate = unit_key(silu(b_qz), EPS, K**-0.5)
        b_o = tl.sum(b_s * b_q[:, None], 0)
        if position >= context:
            inverse = tl.rsqrt(tl.sum(b_o * b_o, 0) / V + norm_eps)
            norm = tl.load(p_norm + o_v, mask=m_v, other=0.0).to(tl.float32)
            gated = (b_o * inverse * norm * gate).to(p_heads.dtype.element_ty)
            tl.store(p_heads + (position - context) * (HV * V) + o_v, gated, mask=m_v)
        kv0, kv1, kv2, kv3 = kv1, kv2, kv3, kv4
        qz0, qz1, qz2, qz3 = qz1, qz2, qz3, qz4
        b, a = next_b, next_a

    for i_row in range(query_len, Q):
        tl.store(p_heads + i_row * (HV * V) + o_v, tl.zeros([B], tl.float32), mask=m_v)


def kernels(memory: StepMemory) -> list[str]:
    """Kernels that take the sizes of the states, best one first."""
    takes_gluon = HAS_GLUON and memory.states.shape[2:] == (gluon_fwd.HEAD_DIM, gluon_fwd.HEAD_DIM)
    return ["gluon", "triton"] if takes_gluon else ["triton"]


def gated_delta_step_fwd(
    fused: torch.Tensor,
    weights: StepWeights,
    memory: StepMemory,
    rows: StepRows,
    *,
    use_pdl: bool = False,
    kernel: str | None = None,
    num_warps: int | None = None,
    num_ahead: int = 0,
) -> torch.Tensor:
    """Launch one program per value head of each sequence.

    Tests and benchmarks choose the kernel, its number of warps, and with `num_ahead` how many
    programs ahead a state is called into the second cache (0: none; for the Gluon kernel).
    """
    if (kernel or kernels(memory)[0]) == "gluon":
        return gluon_fwd.gated_delta_step_gluon_fwd(
            fused, weights, memory, rows, use_pdl=use_pdl, num_warps=num_warps, num_ahead=num_ahead
        )
    num_seqs = rows.state_slots.shape[0]
    _, num_heads, key_dim, value_dim = memory.states.shape
    channels, width = weights.conv1d.shape
    heads = torch.empty(
        fused.shape[0], num_heads * value_dim, dtype=fused.dtype, device=fused.device
    )
    block = triton.next_power_of_2(max(key_dim, value_dim))
    num_warps = num_warps or min(8, max(1, block * block // STATE_PER_WARP))
    options: dict[str, int] = {"launch_pdl": True} if use_pdl else {}
    if num_warps == 8:
        options["maxnreg"] = MAX_REGISTERS
    gated_delta_step_fwd_kernel[(num_heads, num_seqs)](
        fused,
        weights.conv1d,
        weights.A_log,
        weights.dt_bias,
        weights.norm,
        memory.conv_ring,
        memory.states,
        rows.state_slots,
        rows.query_lens,
        rows.context_lens,
        rows.num_pending,
        heads,
        fused.shape[0] // num_seqs,
        weights.norm_eps,
        HK=(channels - num_heads * value_dim) // (2 * key_dim),
        HV=num_heads,
        K=key_dim,
        V=value_dim,
        WIDTH=width,
        R=memory.conv_ring.shape[1],
        EPS=L2_EPS,
        B=block,
        USE_PDL=use_pdl,
        num_warps=num_warps,
        num_stages=1,
        **options,
    )
    return heads


def gated_delta_step_triton(
    fused: torch.Tensor,
    weights: StepWeights,
    memory: StepMemory,
    rows: StepRows,
    *,
    use_pdl: bool = False,
) -> torch.Tensor:
    """As `gated_delta_step_reference`; each state is read once and written once."""
    return gated_delta_step_fwd(fused, weights, memory, rows, use_pdl=use_pdl)


def supports(
    fused: torch.Tensor,
    weights: StepWeights,
    memory: StepMemory,
    rows: StepRows,
    *,
    use_pdl: bool = False,
) -> str | None:
    """Why the kernel cannot run these inputs, or None."""
    ring, states = memory.conv_ring, memory.states
    num_heads, key_dim, value_dim = states.shape[1:]
    channels, width = weights.conv1d.shape
    num_rows = fused.shape[0] // max(1, rows.state_slots.shape[0])
    ints = (rows.state_slots, rows.query_lens, rows.context_lens, rows.num_pending)
    dense = (fused, weights.conv1d, weights.A_log, weights.dt_bias, weights.norm, ring, states)
    if not (fused.is_cuda or IS_INTERPRETED):
        return f"fused is on {fused.device.type}, the kernel runs on CUDA"
    if fused.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"fused is in {fused.dtype}, the kernel takes float32, float16 and bfloat16"
    if ring.dtype != fused.dtype:
        return f"conv_ring is in {ring.dtype}, fused in {fused.dtype}"
    if width > MAX_WIDTH:
        return f"the convolution's width is {width}, limit {MAX_WIDTH}"
    if max(key_dim, value_dim) > MAX_HEAD_DIM:
        return f"K = {key_dim}, V = {value_dim}, limit {MAX_HEAD_DIM}"
    if num_rows > MAX_ROWS:
        return f"{num_rows} rows per sequence, limit {MAX_ROWS}"
    if ring.shape[1] < width - 1 + 2 * num_rows:
        return f"conv_ring holds {ring.shape[1]} rows, {width - 1 + 2 * num_rows} are needed"
    if any(values.dtype != torch.int32 for values in ints):
        return "slots and lengths must be int32"
    if not all(values.is_contiguous() for values in (*dense, *ints)):
        return "all inputs must be contiguous"
    if use_pdl and IS_INTERPRETED:
        return "programmatic dependent launch is for CUDA kernels"
    if use_pdl and torch.cuda.get_device_capability(fused.device) < (9, 0):
        return "programmatic dependent launch needs compute capability 9.0"
    return None
