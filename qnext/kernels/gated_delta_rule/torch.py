"""Gated delta rule in chunks of 64 tokens: matrix products and one short scan.

The derivation is in this folder's README.
"""

from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 64


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    row_tokens: int | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    return None


def gated_delta_rule_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    row_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `gated_delta_rule_reference`, in the chunked form."""
    if v.shape[1] % k.shape[1]:
        raise ValueError(f"Hv = {v.shape[1]} must be a multiple of Hk = {k.shape[1]}")
    if initial_state is None:
        index = torch.arange(v.shape[0], device=v.device)
        segment = torch.bucketize(index, cu_seqlens[1:].to(index.dtype), right=True)
        return _rows(q, k, v, g, beta, segment, None, row_tokens)[0], None
    # With states the sequences run one by one: each brings its own into its first chunk.
    bounds = cu_seqlens.tolist()
    outputs, finals = [], []
    for seq_idx, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        segment = torch.zeros(end - start, dtype=torch.int64, device=v.device)
        own = slice(start, end)
        parts = (q[own], k[own], v[own], g[own], beta[own])
        out, final = _rows(*parts, segment, initial_state[seq_idx], None)
        outputs.append(out)
        finals.append(final)
    return torch.cat(outputs), torch.stack(finals)


def _rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    segment: torch.Tensor,
    initial_state: torch.Tensor | None,
    row_tokens: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay tokens out as [chunks, rows x heads, CHUNK, ...], run, and lay the output back."""
    num_tokens, num_heads, value_dim = v.shape
    if num_tokens == 0:
        assert initial_state is not None
        return torch.zeros_like(v), initial_state
    wide = torch.promote_types(v.dtype, torch.float32)
    group = num_heads // k.shape[1]
    length = row_tokens or num_tokens
    rows, padding = num_tokens // length, -length % CHUNK
    num_chunks = (length + padding) // CHUNK

    def chunks(x: torch.Tensor) -> torch.Tensor:  # [T, H, ...] -> [n, rows, H, CHUNK, ...]
        x = x.view(rows, length, *x.shape[1:])
        if padding:
            x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, padding])
        x = x.view(rows, num_chunks, CHUNK, *x.shape[2:])
        return x.permute(1, 0, 3, 2, *range(4, x.dim()))

    # Zero keys, betas and log decays leave the state as it is: padding needs no other care.
    q_c = chunks(q.to(wide).repeat_interleave(group, dim=1))
    k_c = chunks(k.to(wide).repeat_interleave(group, dim=1))
    v_c, g_c, beta_c = chunks(v.to(wide)), chunks(g.to(wide)), chunks(beta.to(wide))
    seg = segment.view(rows, length)
    if padding:
        seg = torch.cat([seg, seg[:, -1:].expand(rows, padding)], dim=1)
    seg = seg.view(rows, num_chunks, CHUNK).transpose(0, 1)[:, :, None]  # [n, rows, 1, CHUNK]
    if initial_state is None:
        initial_state = v.new_zeros(rows, num_heads, k.shape[2], value_dim, dtype=wide)
    else:
        initial_state = initial_state[None].to(wide)
    out, final = _chunked(q_c, k_c, v_c, g_c, beta_c, seg, initial_state)
    out = out.permute(1, 0, 3, 2, 4).reshape(rows, -1, num_heads, value_dim)[:, :length]
    return out.reshape(v.shape).to(v.dtype), final[0]


def _chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    seg: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes: q, k [n, R, H, L, K]; v [n, R, H, L, V]; g, beta [n, R, H, L]; seg [n, R, 1, L]."""
    num_chunks, rows, heads, size = g.shape
    seg_out = seg[..., -1:]  # the sequence that leaves a chunk goes on in the next
    seg_in = torch.cat([seg[:1, ..., :1], seg_out[:-1]])
    log_decay, within = _decay(g, seg)
    reaches_in = (seg == seg_in).to(g.dtype)
    from_start = (log_decay.exp() * reaches_in)[..., None]  # [n, R, H, L, 1]
    to_end = (log_decay[..., -1:] - log_decay).exp() * (seg == seg_out)

    overlap = (k @ k.transpose(-1, -2)) * within.tril(-1) * beta[..., None]
    inverse = _UnitLowerInverse.apply(overlap)  # [n, R, H, L, L]
    fresh = inverse @ (v * beta[..., None])  # [n, R, H, L, V]
    erase = inverse @ (k * (from_start * beta[..., None]))  # [n, R, H, L, K]

    keys_out = (k * to_end[..., None]).transpose(-1, -2)  # [n, R, H, K, L]
    through = from_start[..., -1, :, None] * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    flat = (num_chunks, rows * heads)
    states = _affine_scan(
        (through - keys_out @ erase).reshape(*flat, k.shape[-1], k.shape[-1]),
        (keys_out @ fresh).reshape(*flat, k.shape[-1], v.shape[-1]),
        state.reshape(rows * heads, k.shape[-1], v.shape[-1]),
    ).view(num_chunks + 1, rows, heads, k.shape[-1], v.shape[-1])

    before = states[:-1]
    change = fresh - erase @ before  # d_t of the recurrence
    scores = (q @ k.transpose(-1, -2)) * within
    return (q * from_start) @ before + scores @ change, states[-1]


def _decay(g: torch.Tensor, seg: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of g since the chunk's start [..., L], and exp of their differences [..., L, L].

    The differences are masked before the exponential, so that no inf * 0 can appear. Sums of up
    to 64 x 50 would leave differences of slow tokens with too few bits in fp32, hence a second
    word of the sum.
    """
    exact = _running_sum(g.double())
    high = exact.to(g.dtype)
    low = (exact - high).to(g.dtype)
    difference = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
    size = g.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=g.device).tril()
    visible = causal & (seg[..., :, None] == seg[..., None, :])
    return high, difference.masked_fill(~visible, -torch.inf).exp()


def _running_sum(x: torch.Tensor) -> torch.Tensor:
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        # torch's own has no fixed order there; a product with ones does.
        return x @ x.new_ones(x.shape[-1], x.shape[-1]).triu()
    return x.cumsum(-1)


class _UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 for strictly lower triangular A."""

    @staticmethod
    def forward(ctx: Any, lower: torch.Tensor) -> torch.Tensor:
        # Substitution, not the series I - A + A^2 - ...: powers of A grow like binomials where
        # keys are alike, and their sum cancels to nothing but rounding.
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        inverse: torch.Tensor = torch.linalg.solve_triangular(
            lower, eye.expand_as(lower), upper=False, unitriangular=True
        )
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ grad @ transposed).tril(-1)


@torch.library.custom_op("qnext::affine_scan", mutates_args=())
def _affine_scan(matrices: torch.Tensor, inputs: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """S_{i+1} = M_i S_i + U_i for all chunks; returns S_0 to S_n.

    Args:
        matrices: M. [n, X, K, K]
        inputs: U. [n, X, K, V]
        state: S_0. [X, K, V]

    Returns:
        [n + 1, X, K, V]
    """
    states = inputs.new_empty(inputs.shape[0] + 1, *state.shape)
    states[0] = state
    for chunk_idx in range(inputs.shape[0]):
        torch.baddbmm(
            inputs[chunk_idx], matrices[chunk_idx], states[chunk_idx], out=states[chunk_idx + 1]
        )
    return states


@torch.library.custom_op("qnext::affine_scan_backward", mutates_args=())
def _affine_scan_backward(grad: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Gradients of S_0 to S_n through all later states. grad: [n + 1, X, K, V]"""
    flows = torch.empty_like(grad)
    flows[-1] = grad[-1]
    for chunk_idx in range(matrices.shape[0] - 1, -1, -1):
        torch.baddbmm(
            grad[chunk_idx],
            matrices[chunk_idx].transpose(-1, -2),
            flows[chunk_idx + 1],
            out=flows[chunk_idx],
        )
    return flows


@_affine_scan.register_fake
def _(matrices: torch.Tensor, inputs: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return inputs.new_empty(inputs.shape[0] + 1, *state.shape)


@_affine_scan_backward.register_fake
def _(grad: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(grad)


def _save_scan(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _differentiate_scan(
    ctx: Any, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One scan and one product; autograd through the loop would keep a node per chunk."""
    matrices, states = ctx.saved_tensors
    flows = _affine_scan_backward(grad.contiguous(), matrices)
    return flows[1:] @ states[:-1].transpose(-1, -2), flows[1:].clone(), flows[0].clone()


_affine_scan.register_autograd(_differentiate_scan, setup_context=_save_scan)
