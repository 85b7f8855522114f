"""Choice of experts, plain PyTorch."""

import torch


def router_reference(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, norm_topk_prob: bool, row_stable: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax over all experts in fp32, then the A most probable of them.

    Args:
        x: rows. [T, C]
        weight: one row per expert. [E, C]
        top_k: experts per token, A.
        norm_topk_prob: divide the chosen weights by their sum.
        row_stable: as in `linear_reference`.

    Returns:
        Weights [T, A] and expert ids [T, A], most probable first; logits [T, E], fp32.

    Source: Switch Transformers, https://arxiv.org/abs/2101.03961
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(x.dtype)
    if row_stable and x.shape[0] > 1:
        logits = torch.cat([row.clone() @ weight.t() for row in x.split(1)]).to(wide)
    else:
        logits = (x @ weight.t()).to(wide)
    top_weights, top_ids = torch.topk(logits.softmax(-1), top_k, dim=-1)
    if norm_topk_prob:
        top_weights = top_weights / top_weights.sum(-1, keepdim=True)
    return top_weights, top_ids, logits
