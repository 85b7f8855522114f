"""Gated delta rule over a few new tokens per sequence, the committed state left as it is."""

import torch


def gated_delta_window_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    *,
    states: torch.Tensor,
    state_slots: torch.Tensor,
    query_lens: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence on copies of the committed states and return what it would write.

    All sequences take their first token together, then their second, and so on. Each row's sums
    run over K in one order, whatever the other rows are.

    Args:
        q, k: queries and keys, normalised and scaled. [T, Hk, K]
        v: values. [T, Hv, V]
        decay: exp(g). [T, Hv], fp32
        beta: [T, Hv], fp32
        states: one layer's committed states. [S, Hv, K, V], fp32
        state_slots: which state each sequence owns. [N], int64
        query_lens: rows of each sequence, one after another from row 0.

    Returns:
        Output [T, Hv, V] in the dtype of v, and the change d_t that token t writes under k_t,
        [T, Hv, V] in the dtype of the states. Rows past the sum of query_lens are zero.

    Source: Gated Delta Networks, https://arxiv.org/abs/2412.06464
    """
    group = v.shape[1] // k.shape[1]
    wide = states.dtype
    starts = [sum(query_lens[:seq_idx]) for seq_idx in range(len(query_lens))]
    out = torch.zeros(v.shape, dtype=wide, device=v.device)
    changes = torch.zeros_like(out)
    state = states[state_slots]
    live = list(range(len(query_lens)))
    for step in range(max(query_lens, default=0)):
        still = [idx for idx, seq_idx in enumerate(live) if query_lens[seq_idx] > step]
        if len(still) < len(live):
            state, live = state[still], [live[idx] for idx in still]
        rows = torch.tensor([starts[seq_idx] + step for seq_idx in live], device=v.device)
        key = k[rows].to(wide).repeat_interleave(group, dim=1)[..., None]  # [n, Hv, K, 1]
        query = q[rows].to(wide).repeat_interleave(group, dim=1)[..., None]
        state = state * decay[rows, :, None, None]
        held = (state * key).sum(2)  # [n, Hv, V]
        change = (v[rows].to(wide) - held) * beta[rows, :, None]
        # A product and a sum, not one fused operation: the replay in the cache does the same,
        # and the two must agree to the last bit.
        state = state + key * change[:, :, None]
        out[rows] = (state * query).sum(2)
        changes[rows] = change
    return out.to(v.dtype), changes
