"""Sum of the chosen experts, plain PyTorch."""

import torch
import torch.nn.functional as F

from qnext.kernels.int8_rows import widened


def experts_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    row_stable: bool = False,
) -> torch.Tensor:
    """Weighted sum of SwiGLU experts: y_t = sum_a w_ta * down_e(silu(gate_e x) * up_e x).

    One expert at a time, over those that have a token.

    Args:
        x: rows. [T, C]
        gate_up: gate rows, then up rows, of each expert. [E, 2I, C]
        down: [E, C, I]
        top_weights: weight of each chosen expert. [T, A]
        top_ids: which experts. [T, A], int64
        row_stable: one row per product, and the sum over experts in the order of top_ids.

    Returns:
        [T, C] in the dtype of x.
    """
    num_tokens, num_active = top_ids.shape
    gate_up, down = widened(gate_up, x.dtype), widened(down, x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    slots = torch.zeros(num_tokens * num_active, x.shape[1], dtype=wide, device=x.device)
    flat_ids = top_ids.reshape(-1)
    for expert_idx in flat_ids.unique().tolist():
        pair_idx = (flat_ids == expert_idx).nonzero()[:, 0]
        rows = x[pair_idx // num_active]
        rows_out = [
            _swiglu(part, gate_up[expert_idx], down[expert_idx])
            for part in (rows.split(1) if row_stable else [rows])
        ]
        slots = slots.index_put((pair_idx,), torch.cat(rows_out).to(wide))
    weighted = slots.view(num_tokens, num_active, -1) * top_weights[..., None].to(wide)
    return weighted.sum(1).to(x.dtype)


def _swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x.clone(), gate_up.to(x.dtype)).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down.to(x.dtype))
