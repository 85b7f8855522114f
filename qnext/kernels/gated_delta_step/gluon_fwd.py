"""The DeltaNet decode step with layouts chosen by hand, for heads of 128 x 128.

Triton spreads the rows of a state over warps, so each of a row's sums over K meets at barriers.
Here a warp owns columns of V with all of K, so those sums stay inside it, and the barriers of a
program are few and don't grow with its rows.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qnext.kernels.gated_delta_step import triton_gates
from qnext.kernels.gated_delta_step.inputs import L2_EPS, StepMemory, StepRows, StepWeights

HEAD_DIM = 128  # K and V
NUM_WARPS = 8
WINDOW: gl.constexpr = gl.constexpr(8)  # most rows per sequence, all normed at once
KINDS: gl.constexpr = gl.constexpr(4)  # vectors of a row: q, k, v and an empty one
REGISTERS = {4: 255, 8: 128}  # of a thread by warps, so that two programs share a multiprocessor

silu = gluon.jit(triton_gates.silu.fn)
softplus = gluon.jit(triton_gates.softplus.fn)


@gluon.jit
def row_pointer(
    p_ring: tl.tensor, p_fused: tl.tensor, position: tl.tensor, context: tl.tensor,
    D: gl.constexpr, HV: gl.constexpr, B: gl.constexpr, R: gl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Start of the raw row at each position: in the ring before `context`, in `fused` from it."""
    p_past = p_ring + position % R * (D + 2 * HV)
    p_new = p_fused + (position - context) * (D + HV * B + 2 * HV)
    return gl.where(position < context, p_past, p_new)


@gluon.jit
def channel(
    i_h: tl.tensor, o_warp: tl.tensor, o_b: tl.tensor,
    HK: gl.constexpr, HV: gl.constexpr, B: gl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Where element o_b of a warp's vector is in a row of q, k and v."""
    kind = o_warp % KINDS
    head = i_h // (HV // HK)
    return gl.where(kind == 0, head, gl.where(kind == 1, HK + head, 2 * HK + i_h)) * B + o_b


@gluon.jit
def load_rows(
    p_ring: tl.tensor, p_fused: tl.tensor, i_h: tl.tensor, base: tl.tensor,
    context: tl.tensor, end: tl.tensor,
    HK: gl.constexpr, HV: gl.constexpr, B: gl.constexpr, WIDTH: gl.constexpr, R: gl.constexpr,
    STEPS: gl.constexpr, WARPS: gl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Raw inputs of the rows from `base`, STEPS + 3 tensors [WARPS, B], and b and a of the rows.

    A warp has one of q, k and v in STEPS consecutive rows, and in the three before them.
    """
    VECTORS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    GATES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    D: gl.constexpr = (2 * HK + HV) * B
    o_warp = gl.arange(0, WARPS, gl.SliceLayout(1, VECTORS))[:, None]
    o_b = gl.arange(0, B, gl.SliceLayout(0, VECTORS))[None, :]
    o_c = channel(i_h, o_warp, o_b, HK, HV, B)
    inputs = ()
    for i in gl.static_range(STEPS + 3):
        position = base + o_warp // KINDS * STEPS + (i - 3)
        p_x = row_pointer(p_ring, p_fused, position, context, D, HV, B, R) + o_c
        # Older inputs than the convolution is wide may never have been written: not read.
        m_row = (position >= 0) & (position < end) & (i + WIDTH >= 4) & (o_warp % KINDS < 3)
        x = gl.load(p_x, mask=m_row & (o_b >= 0), other=0.0)
        inputs = inputs + (x,)  # type: ignore[assignment]
    position = base + gl.arange(0, STEPS * WARPS // KINDS, GATES)
    p_b = row_pointer(p_ring, p_fused, position, context, D, HV, B, R) + i_h
    p_b += gl.where(position < context, D, D + HV * B)
    b = gl.load(p_b, mask=position < end, other=0.0)
    a = gl.load(p_b + HV, mask=position < end, other=0.0)
    return inputs, b, a


@gluon.jit
def load_taps(
    p_conv1d: tl.tensor, i_h: tl.tensor, HK: gl.constexpr, HV: gl.constexpr, B: gl.constexpr,
    WIDTH: gl.constexpr, WARPS: gl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Weights of the inputs 3, 2, 1 and 0 rows back, each [WARPS, B].

    A channel's taps are neighbours in memory and come in one load, then are dealt out.
    """
    VECTORS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    TAPS: gl.constexpr = gl.BlockedLayout([1, 4, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    o_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, TAPS)))[:, None, None]
    o_b = gl.arange(0, B, gl.SliceLayout(0, gl.SliceLayout(2, TAPS)))[None, :, None]
    o_tap = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, TAPS)))[None, None, :]
    o_c = channel(i_h, o_warp, o_b, HK, HV, B)
    m_taps = (o_warp % KINDS < 3) & (o_b >= 0) & (o_tap + WIDTH >= 4)
    taps = gl.load(p_conv1d + o_c * WIDTH + (o_tap + (WIDTH - 4)), mask=m_taps, other=0.0)
    even, odd = gl.split(gl.reshape(taps, [WARPS, B, 2, 2]))
    lag3, lag1 = gl.split(even)
    lag2, lag0 = gl.split(odd)
    return (
        gl.convert_layout(lag3, VECTORS, assert_trivial=True),
        gl.convert_layout(lag2, VECTORS, assert_trivial=True),
        gl.convert_layout(lag1, VECTORS, assert_trivial=True),
        gl.convert_layout(lag0, VECTORS, assert_trivial=True),
    )


@gluon.jit
def store_rows(
    p_ring: tl.tensor, inputs: tl.tensor, b: tl.tensor, a: tl.tensor, i_h: tl.tensor,
    base: tl.tensor, context: tl.tensor, end: tl.tensor,
    HK: gl.constexpr, HV: gl.constexpr, B: gl.constexpr, R: gl.constexpr,
    STEPS: gl.constexpr, WARPS: gl.constexpr,
) -> None:  # fmt: skip
    """Write the window's raw inputs to the ring; the first head that has a q and k writes them."""
    VECTORS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    GATES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    D: gl.constexpr = (2 * HK + HV) * B
    o_warp = gl.arange(0, WARPS, gl.SliceLayout(1, VECTORS))[:, None]
    o_b = gl.arange(0, B, gl.SliceLayout(0, VECTORS))[None, :]
    o_c = channel(i_h, o_warp, o_b, HK, HV, B)
    kind = o_warp % KINDS
    m_x = (kind == 2) | ((kind < 2) & (i_h % (HV // HK) == 0))
    for i in gl.static_range(STEPS):
        position = base + o_warp // KINDS * STEPS + i
        m_row = m_x & (position >= context) & (position < end)
        p_x = p_ring + position % R * (D + 2 * HV) + o_c
        gl.store(p_x, inputs[i + 3], mask=m_row & (o_b >= 0))
    position = base + gl.arange(0, STEPS * WARPS // KINDS, GATES)
    m_b = (position >= context) & (position < end)
    p_b = p_ring + position % R * (D + 2 * HV) + D + i_h
    gl.store(p_b, b, mask=m_b)
    gl.store(p_b + HV, a, mask=m_b)


@gluon.jit
def prepare_rows(
    vectors: gl.shared_memory_descriptor, inputs: tl.tensor, taps: tl.tensor,
    EPS: gl.constexpr, STEPS: gl.constexpr, WARPS: gl.constexpr, B: gl.constexpr,
) -> None:  # fmt: skip
    """Convolution, SiLU and, for q and k, unit length; q is scaled by K**-0.5 too."""
    VECTORS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    kind = gl.arange(0, WARPS, gl.SliceLayout(1, VECTORS)) % KINDS
    scale = gl.where(kind == 0, B**-0.5, 1.0)
    steps = vectors._reinterpret(gl.float32, [STEPS, WARPS, B], PLAIN)
    for i in gl.static_range(STEPS):
        x = inputs[i].to(gl.float32) * taps[0].to(gl.float32)
        # Named, since windows of other sizes, other programs, must round alike.
        x = gl.fma(inputs[i + 1].to(gl.float32), taps[1].to(gl.float32), x)
        x = gl.fma(inputs[i + 2].to(gl.float32), taps[2].to(gl.float32), x)
        x = gl.fma(inputs[i + 3].to(gl.float32), taps[3].to(gl.float32), x)
        x = silu(x)
        factor = gl.rsqrt(gl.sum(x * x, 1) + EPS) * scale
        steps.index(i).store(x * gl.where(kind < 2, factor, 1.0)[:, None])


@gluon.jit
def prefetch_state(
    p_states: tl.tensor, p_slots: tl.tensor, p_query_lens: tl.tensor, AHEAD: gl.constexpr,
    HV: gl.constexpr, B: gl.constexpr, WARPS: gl.constexpr,
) -> None:  # fmt: skip
    """Call the state of the program AHEAD places later into the second cache.

    Multiprocessors then find their next state near when a program ends, and memory has no pause.
    """
    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    BYTES: gl.constexpr = B * B * p_states.dtype.element_ty.primitive_bitwidth // 8 // (WARPS * 32)
    i_later = gl.program_id(1) * HV + gl.program_id(0) + AHEAD
    i_n = gl.minimum(i_later // HV, gl.num_programs(1) - 1)
    slot = gl.load(p_slots + i_n).to(gl.int64)
    is_there = (i_later // HV == i_n) & (gl.load(p_query_lens + i_n) > 0)
    line = gl.arange(0, WARPS * 32, LINES)
    p_line = p_states + (slot * HV + i_later % HV) * (B * B) + line * (B * B // (WARPS * 32))
    num_bytes = gl.where((line >= 0) & is_there, BYTES, 0)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [p_line.to(gl.int64), num_bytes],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit(
    do_not_specialize=["Q"],
    do_not_specialize_on_alignment=["p_slots", "p_query_lens", "p_context_lens", "p_pending"],
)
def gated_delta_step_gluon_kernel(
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
    HK: gl.constexpr,
    HV: gl.constexpr,
    B: gl.constexpr,
    WIDTH: gl.constexpr,
    R: gl.constexpr,
    EPS: gl.constexpr,
    STEPS: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    USE_PDL: gl.constexpr,
) -> None:
    """One value head of one sequence: its whole state in registers, its rows one by one.

    Rows come in chunks. Convolution, norms and gates of a chunk's rows are computed by all warps
    together and laid into shared memory; then the rows change the state, each warp its columns,
    with no barrier from row to row. Replayed, certain and draft rows run through the same
    instructions, so drafts change no bit of the rest.
    """
    D: gl.constexpr = (2 * HK + HV) * B
    CHUNK: gl.constexpr = STEPS * WARPS // KINDS
    LANES_V: gl.constexpr = B // (4 * WARPS)  # 4 columns, 16 bytes, in a thread
    STATE: gl.constexpr = gl.BlockedLayout([4, 4], [32 // LANES_V, LANES_V], [1, WARPS], [1, 0])
    HEADS: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES_V, LANES_V], [1, WARPS], [1, 0])
    ALONG_K: gl.constexpr = gl.SliceLayout(1, STATE)
    ALONG_V: gl.constexpr = gl.SliceLayout(0, STATE)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN_2D: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    i_h = gl.program_id(0)
    i_n = gl.program_id(1).to(gl.int64)
    slot = gl.load(p_slots + i_n).to(gl.int64)
    query_len = gl.load(p_query_lens + i_n)
    context = gl.load(p_context_lens + i_n)
    pending = gl.load(p_pending + i_n)
    is_real = query_len > 0
    # Padding reads and runs nothing: all its positions are outside 0 .. end - 1.
    context = gl.where(is_real, context, 0)
    start = context - gl.where(is_real, pending, 0)
    end = context + query_len
    taps = load_taps(p_conv1d, i_h, HK, HV, B, WIDTH, WARPS)
    A_log = gl.load(p_A_log + i_h, mask=is_real, other=0.0)
    dt_bias = gl.load(p_dt_bias + i_h, mask=is_real, other=0.0)
    p_ring += slot * (R * (D + 2 * HV))
    p_fused += i_n * Q * (D + HV * B + 2 * HV)

    o_k = gl.arange(0, B, ALONG_K)[:, None]
    o_v = gl.arange(0, B, ALONG_V)[None, :]
    p_s = p_states + (slot * HV + i_h) * (B * B) + o_k * B + o_v
    # A state with no token in it is zero, so a new sequence needs no cleared slot.
    m_old = (o_v >= 0) & (start > 0)
    if USE_PDL:
        # The state doesn't depend on the kernel in front: it is on its way while that one ends.
        b_s = gl.load(p_s, mask=m_old, other=0.0)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    inputs, b, a = load_rows(
        p_ring, p_fused, i_h, start, context, end, HK, HV, B, WIDTH, R, STEPS, WARPS
    )
    o_r = gl.arange(0, WINDOW, gl.SliceLayout(1, HEADS))[:, None]
    o_c = gl.arange(0, B, gl.SliceLayout(0, HEADS))[None, :]
    p_z = p_fused + o_r * (D + HV * B + 2 * HV) + D + i_h * B + o_c
    z = gl.load(p_z, mask=(o_r < query_len) & (o_c >= 0), other=0.0)
    norm = gl.load(p_norm + o_c)
    if not USE_PDL:
        # After the rows: they are few, and are worked on while the state is on its way.
        b_s = gl.load(p_s, mask=m_old, other=0.0)
    if AHEAD > 0:
        prefetch_state(p_states, p_slots, p_query_lens, AHEAD, HV, B, WARPS)

    vectors = gl.allocate_shared_memory(gl.float32, [STEPS * WARPS, B], PLAIN)
    decays = gl.allocate_shared_memory(gl.float32, [CHUNK, 1], PLAIN)
    betas = gl.allocate_shared_memory(gl.float32, [CHUNK, 1], PLAIN)
    gates = gl.allocate_shared_memory(gl.float32, [WINDOW, B], PLAIN_2D)
    gates.store(norm.to(gl.float32) * silu(z.to(gl.float32)))
    b_s = b_s.to(gl.float32)
    heads = gl.full([WINDOW, B], 0.0, gl.float32, HEADS)
    for base in range(start, end, CHUNK):
        prepare_rows(vectors, inputs, taps, EPS, STEPS, WARPS, B)
        store_rows(p_ring, inputs, b, a, i_h, base, context, end, HK, HV, B, R, STEPS, WARPS)
        rate = gl.exp(A_log.to(gl.float32))
        b_decay = gl.exp(-rate * softplus(a.to(gl.float32) + dt_bias.to(gl.float32)))
        decays._reinterpret(gl.float32, [CHUNK], PLAIN).store(b_decay)
        b_beta = 1.0 / (1.0 + gl.exp(-b.to(gl.float32)))
        betas._reinterpret(gl.float32, [CHUNK], PLAIN).store(b_beta)
        # Here and not, as the compiler would, before the first read, which is inside the loop.
        tl.debug_barrier()
        for i in range(gl.minimum(end - base, CHUNK)):
            position = base + i
            place = i % STEPS * WARPS + i // STEPS * KINDS
            b_k = vectors.index(place + 1).load(ALONG_K)[:, None]
            b_v = vectors.index(place + 2).load(ALONG_V)
            decay = decays.index(i).load(ALONG_V)
            beta = betas.index(i).load(ALONG_V)
            held = gl.sum(b_s * b_k, 0)
            change = beta * (b_v - decay * held)
            b_s = gl.fma(b_k, change[None, :], decay[None, :] * b_s)
            if position == context:
                gl.store(p_s, b_s.to(p_states.dtype.element_ty))
            if position >= context:
                b_q = vectors.index(place).load(ALONG_K)[:, None]
                b_o = gl.convert_layout(
                    gl.sum(b_s * b_q, 0), gl.SliceLayout(0, HEADS), assert_trivial=True
                )
                heads = gl.where(o_r == position - context, b_o[None, :], heads)
        if base + CHUNK < end:
            # Unknown to the compiler, so that it doesn't keep this rare branch's addresses in
            # registers all along.
            i_again = gl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [i_h], dtype=gl.int32, is_pure=False, pack=1
            )
            taps = load_taps(p_conv1d, i_again, HK, HV, B, WIDTH, WARPS)
            A_log = gl.load(p_A_log + i_again)
            dt_bias = gl.load(p_dt_bias + i_again)
            inputs, b, a = load_rows(
                p_ring, p_fused, i_again, base + CHUNK, context, end,
                HK, HV, B, WIDTH, R, STEPS, WARPS,
            )  # fmt: skip

    inverse = gl.rsqrt(gl.sum(heads * heads, 1) / B + norm_eps)[:, None]
    gated = heads * inverse * gates.load(HEADS)
    gated = gl.where(o_r < query_len, gated, 0.0).to(p_heads.dtype.element_ty)
    p_heads += i_n * Q * (HV * B) + i_h * B
    gl.store(p_heads + o_r * (HV * B) + o_c, gated, mask=(o_r < Q) & (o_c >= 0))


def gated_delta_step_gluon_fwd(
    fused: torch.Tensor,
    weights: StepWeights,
    memory: StepMemory,
    rows: StepRows,
    *,
    use_pdl: bool = False,
    num_warps: int | None = None,
    num_ahead: int = 0,
) -> torch.Tensor:
    """Launch one program per value head of each sequence; see `gated_delta_step_fwd`."""
    num_seqs = rows.state_slots.shape[0]
    num_heads = memory.states.shape[1]
    channels, width = weights.conv1d.shape
    num_rows = fused.shape[0] // num_seqs
    num_warps = num_warps or NUM_WARPS
    heads = torch.empty(
        fused.shape[0], num_heads * HEAD_DIM, dtype=fused.dtype, device=fused.device
    )
    # A chunk holds a whole window after a window of the same size, up to the 8 rows (4 in fp32)
    # whose inputs fit in registers beside the state.
    num_chunk = min(triton.next_power_of_2(2 * num_rows - 1), 16 // fused.element_size())
    options: dict[str, int] = {"launch_pdl": True} if use_pdl else {}
    gated_delta_step_gluon_kernel[(num_heads, num_seqs)](
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
        num_rows,
        weights.norm_eps,
        HK=(channels // HEAD_DIM - num_heads) // 2,
        HV=num_heads,
        B=HEAD_DIM,
        WIDTH=width,
        R=memory.conv_ring.shape[1],
        EPS=L2_EPS,
        STEPS=max(1, num_chunk * KINDS.value // num_warps),
        WARPS=num_warps,
        AHEAD=num_ahead,
        USE_PDL=use_pdl,
        num_warps=num_warps,
        maxnreg=REGISTERS[num_warps],
        **options,
    )
    return heads
