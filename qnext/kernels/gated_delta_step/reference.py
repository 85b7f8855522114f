"""A DeltaNet layer between its projections, for a few new rows per sequence, plain PyTorch."""

import torch

from qnext.kernels.causal_conv1d.reference import causal_conv1d_reference
from qnext.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from qnext.kernels.gated_delta_step.inputs import L2_EPS, StepMemory, StepRows, StepWeights
from qnext.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from qnext.kernels.l2_norm.reference import l2_norm_reference


def gated_delta_step_reference(
    fused: torch.Tensor,
    weights: StepWeights,
    memory: StepMemory,
    rows: StepRows,
    *,
    use_pdl: bool = False,
) -> torch.Tensor:
    """Convolution, gates, delta rule, read-out and gated norm of N sequences' windows of Q rows.

    Row 0 of a window is certain, the rows after it are drafts. The state in memory becomes the
    one after row 0, whatever the drafts are; all rows' raw inputs go to the ring, and the next
    call replays the drafts that were accepted: its num_pending. A sequence whose state holds no
    token yet starts from zero, whatever its slot contains.

    Everything is computed in fp32 at least and rounded once, at the end.

    Args:
        fused: the in-projection's rows [qkv | z | b | a]; row n * Q + i is row i of sequence n.
            [N * Q, D + Hv * V + 2 * Hv]
        weights: the layer's parameters.
        memory: the layer's memory, changed in place. R >= width - 1 + 2 * Q
        rows: slots, lengths and positions.
        use_pdl: start before the kernel in front has ended (programmatic dependent launch), and
            wait for it only before `fused` is read. All else must come from earlier kernels. For
            CUDA kernels; it changes no value.

    Returns:
        Gated heads [N * Q, Hv * V] in the dtype of fused; rows past query_lens are zero.

    Source: Gated Delta Networks, https://arxiv.org/abs/2412.06464
    """
    ring, states = memory.conv_ring, memory.states
    _, num_heads, key_dim, value_dim = states.shape
    channels, width = weights.conv1d.shape
    wide = torch.promote_types(fused.dtype, torch.float32)
    num_rows = fused.shape[0] // rows.state_slots.shape[0]  # Q
    out = torch.zeros(fused.shape[0], num_heads * value_dim, dtype=fused.dtype, device=fused.device)
    lists = (rows.state_slots, rows.query_lens, rows.context_lens, rows.num_pending)
    for seq_idx, (slot, count, context, pending) in enumerate(
        zip(*(values.tolist() for values in lists), strict=True)
    ):
        if count == 0:
            continue
        own = slice(seq_idx * num_rows, seq_idx * num_rows + count)
        mixed, z, gates = fused[own].split([channels, num_heads * value_dim, 2 * num_heads], dim=-1)
        inputs = torch.cat([mixed, gates], dim=-1)
        start = context - pending
        past = range(start - (width - 1), context)
        held = ring[slot, [position % ring.shape[1] for position in past]].to(wide)
        held[: max(0, width - 1 - start)] = 0  # positions before the sequence
        history, known = held[: width - 1, :channels], torch.cat([held[width - 1 :], inputs])
        state = states[slot].to(wide) if start > 0 else torch.zeros_like(states[slot], dtype=wide)
        heads, state = _advance(known, history, state, weights, num_certain=pending + 1)
        states[slot] = state.to(states.dtype)
        z = z.to(wide).view(count, num_heads, value_dim)
        gated = gated_rms_norm_reference(heads[pending:], z, weights.norm, weights.norm_eps)
        out[own] = gated.flatten(1).to(out.dtype)
        ring[slot, [(context + i) % ring.shape[1] for i in range(count)]] = inputs.to(ring.dtype)
    return out


def _advance(
    inputs: torch.Tensor,
    history: torch.Tensor,
    state: torch.Tensor,
    weights: StepWeights,
    *,
    num_certain: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read-out of all rows [T, Hv, V], and the state after the first num_certain. [Hv, K, V]

    inputs: raw rows [q | k | v | b | a]. [T, D + 2 * Hv]; history: [width - 1, D]
    """
    num_heads, key_dim, value_dim = state.shape
    channels = weights.conv1d.shape[0]
    mixed, b, a = inputs.split([channels, num_heads, num_heads], dim=-1)
    positions = torch.arange(inputs.shape[0], device=inputs.device)
    mixed = causal_conv1d_reference(mixed, weights.conv1d, positions, history.t())
    key_size = (channels - num_heads * value_dim) // 2
    q, k, v = mixed.split([key_size, key_size, num_heads * value_dim], dim=-1)
    q = l2_norm_reference(q.unflatten(-1, (-1, key_dim)), L2_EPS, key_dim**-0.5)
    k = l2_norm_reference(k.unflatten(-1, (-1, key_dim)), L2_EPS)
    v = v.unflatten(-1, (num_heads, value_dim))
    bias = weights.dt_bias.to(a.dtype)
    g = -weights.A_log.to(a.dtype).exp() * torch.nn.functional.softplus(a + bias)
    beta = torch.sigmoid(b)

    def run(part: slice, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bounds = torch.tensor([0, q[part].shape[0]], dtype=torch.int32)
        heads, final = gated_delta_rule_reference(
            q[part],
            k[part],
            v[part],
            g[part],
            beta[part],
            cu_seqlens=bounds,
            initial_state=state[None],
        )
        assert final is not None, "an initial state was given"
        return heads, final[0]

    certain, state = run(slice(0, num_certain), state)
    if num_certain == inputs.shape[0]:
        return certain, state
    drafts, _ = run(slice(num_certain, None), state)
    return torch.cat([certain, drafts]), state
