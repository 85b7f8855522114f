"""Norm and choice of experts for the rows of a decode step, plain PyTorch."""

import torch
import torch.nn.functional as F

from qnext.kernels.rms_norm.reference import rms_norm_reference


def norm_router_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    gate: torch.Tensor,
    shared_gate: torch.Tensor | None,
    *,
    top_k: int,
    norm_topk_prob: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Norm, softmax over all experts in fp32, then the A most probable; ties to the lowest id.

    Experts are ordered by their logits: two that differ may round to one probability.

    Args:
        x: rows. [T, C]
        norm_weight: zero-centred scale of the RMS norm. [C]
        eps: of the norm.
        gate: one row per expert. [E, C]
        shared_gate: row of the shared expert's gate, None where there is no such expert. [1, C]
        top_k: experts per token, A.
        norm_topk_prob: divide the chosen weights by their sum.

    Returns:
        Normalised rows [T, C] in the dtype of x; weights [T, A], fp32, most probable first; expert
        ids [T, A], int32; logit of the shared gate [T], fp32, or None.
    """
    normed = rms_norm_reference(x, norm_weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(normed.to(wide), gate.to(wide))
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    top_ids = order[:, :top_k]
    top_weights = logits.softmax(-1).gather(1, top_ids)
    if norm_topk_prob:
        top_weights = top_weights / top_weights.sum(-1, keepdim=True)
    shared_logit = None
    if shared_gate is not None:
        shared_logit = F.linear(normed.to(wide), shared_gate.to(wide))[:, 0].float()
    return normed, top_weights.float(), top_ids.to(torch.int32), shared_logit
