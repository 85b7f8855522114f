"""Gated delta rule token by token, plain PyTorch."""

import torch


def gated_delta_rule_reference(
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
    """Linear attention whose state decays, erases what it held under k_t, and writes v_t there.

        S_t = a_t S_{t-1} + beta_t k_t (v_t - (a_t S_{t-1})^T k_t)^T,  a_t = exp(g_t)
        o_t = S_t^T q_t

    The state starts anew at each bound of cu_seqlens.

    Args:
        q, k: queries and keys, L2-normalised and q scaled by the caller; value head h reads key
            head h // (Hv // Hk). [T, Hk, K]
        v: values. [T, Hv, V]
        g: log of the decay, natural log, <= 0. [T, Hv], fp32
        beta: how much of the old value is replaced, 0 to 1. [T, Hv], fp32
        cu_seqlens: bounds of packed sequences, 0 to T. [N + 1], int32
        initial_state: state before each sequence; zero if not given. [N, Hv, K, V], fp32
        row_tokens: a promise that a sequence starts at every multiple of it, and that T is one;
            chunked backends then run the rows in parallel.

    Returns:
        Output [T, Hv, V] in the dtype of v; the state after each sequence [N, Hv, K, V] in fp32,
        or None when initial_state is None (training reads no states).

    Raises:
        ValueError: Hv is not a multiple of Hk.

    Source: Gated Delta Networks, https://arxiv.org/abs/2412.06464
    """
    if v.shape[1] % k.shape[1]:
        raise ValueError(f"Hv = {v.shape[1]} must be a multiple of Hk = {k.shape[1]}")
    wide = torch.promote_types(v.dtype, torch.float32)
    group = v.shape[1] // k.shape[1]
    q = q.to(wide).repeat_interleave(group, dim=1)  # [T, Hv, K]
    k = k.to(wide).repeat_interleave(group, dim=1)
    decay, beta = g.to(wide).exp(), beta.to(wide)
    outputs, finals = [], []
    bounds = cu_seqlens.tolist()
    for seq_idx, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if initial_state is None:
            state = torch.zeros(*k.shape[1:], v.shape[2], dtype=wide, device=v.device)
        else:
            state = initial_state[seq_idx].to(wide)
        for t in range(start, end):
            state = state * decay[t, :, None, None]
            held = (state * k[t, :, :, None]).sum(1)  # [Hv, V]: what the state holds under k_t
            change = (v[t].to(wide) - held) * beta[t, :, None]
            state = state + k[t, :, :, None] * change[:, None]
            outputs.append((state * q[t, :, :, None]).sum(1))
        finals.append(state)
    out = torch.stack(outputs).to(v.dtype) if outputs else torch.zeros_like(v)
    return out, None if initial_state is None else torch.stack(finals)
