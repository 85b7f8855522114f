"""Cross-entropy of a linear head, plain PyTorch: the logits of all tokens at once."""

import torch
import torch.nn.functional as F

from qnext.kernels.int8_rows import widened

IGNORED = -100


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum over tokens of -log softmax(W h)[target], with a pull of the logits' scale towards 0.

        loss_t = logsumexp(W h_t) - (W h_t)[target_t] + z_weight * logsumexp(W h_t)^2

    Args:
        hidden: rows entering the head. [T, C]
        weight: one row per word. [W, C]
        targets: word ids; -100 leaves a row out. [T], int64
        z_weight: weight of the z-loss; 0 is off.

    Returns:
        Sum of loss_t with gradient; sum of the cross-entropy alone, without; number of rows that
        count, int64. All [], the sums in fp32 (float64 for float64 inputs), in nats.

    Source: z-loss, PaLM, https://arxiv.org/abs/2204.02311
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ widened(weight, hidden.dtype).t()).to(wide)  # [T, W]
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    is_counted = targets != IGNORED
    total = loss
    if z_weight:
        log_sum = torch.where(is_counted, logits.logsumexp(-1), 0.0)
        total = total + z_weight * log_sum.square().sum()
    return total, loss.detach(), is_counted.sum()
