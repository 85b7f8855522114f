"""Mixture of experts for the rows of a decode step, plain PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from qnext.kernels.experts.reference import experts_reference
from qnext.kernels.fp8_blocks import dequantized


class ExpertScales(NamedTuple):
    """Scales of the blocks of e4m3 expert weights, each as `fp8_blocks` says.

    Attributes:
        gate_up: [E, 2I / 128, ceil(C / 128)]
        down: [E, ceil(C / 128), I / 128]
        shared_gate_up: [2Is / 128, ceil(C / 128)], None without a shared expert.
        shared_down: [ceil(C / 128), Is / 128], None without a shared expert.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    shared_gate_up: torch.Tensor | None
    shared_down: torch.Tensor | None


NO_SCALES = (None, None, None, None)


def experts_rows_reference(
    normed: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    *,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared_logit: torch.Tensor | None,
    residual: torch.Tensor,
    scales: ExpertScales | None = None,
) -> torch.Tensor:
    """y_t = residual_t + sum_a w_ta * expert_a(x_t) + sigmoid(s_t) * shared(x_t), in fp32.

    An expert is down(silu(gate x) * up x).

    Args:
        normed: rows. [T, C]
        gate_up: gate rows, then up rows, of each expert. [E, 2I, C]
        down: [E, C, I]
        shared_gate_up: those of the shared expert, or None. [2Is, C]
        shared_down: [C, Is]
        top_weights: weight of each chosen expert. [T, A], fp32
        top_ids: which experts, distinct in a row. [T, A], int32
        shared_logit: s, logit of the shared expert's gate, or None. [T], fp32
        residual: added to the mixture. [T, C]
        scales: of e4m3 weights; None where the weights have the dtype of the rows.

    Returns:
        [T, C] in the dtype of the residual.
    """
    wide = torch.promote_types(normed.dtype, torch.float32)
    scale = NO_SCALES if scales is None else scales
    rows = normed.to(wide)
    y = experts_reference(
        rows,
        dequantized(gate_up, scale[0]),
        dequantized(down, scale[1]),
        top_weights,
        top_ids.long(),
    )
    if shared_gate_up is not None and shared_down is not None and shared_logit is not None:
        gate, up = F.linear(rows, dequantized(shared_gate_up, scale[2]).to(wide)).chunk(2, dim=-1)
        shared = F.linear(F.silu(gate) * up, dequantized(shared_down, scale[3]).to(wide))
        y = y + torch.sigmoid(shared_logit.to(wide))[:, None] * shared
    return (residual.to(wide) + y).to(residual.dtype)
