"""Cross-entropy of a linear head in chunks of tokens: [T, W] is never built whole."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from qnext.kernels.int8_rows import widened

IGNORED = -100
# Logits held at a time: 2^26 are 128 MiB in bf16 and still large matrix products.
CHUNK_LOGITS = 1 << 26


def supports(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_weight: float = 0.0,
) -> str | None:
    """Say why this backend cannot run, or None."""
    return None


def linear_cross_entropy_torch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `linear_cross_entropy_reference`; the gradients are made along with the loss."""
    if weight.dtype.itemsize == 1:
        weight = widened(weight, hidden.dtype)
    total, loss = _LinearCrossEntropy.apply(hidden, weight, targets, z_weight)
    return total, loss, (targets != IGNORED).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss is a sum, so its gradients are known up to one factor in the forward pass.

    Making them there saves a second product with the head; only grad_hidden [T, C] and
    grad_weight [W, C] are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        z_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(hidden.dtype)
        size = max(1, CHUNK_LOGITS // weight.shape[0])
        totals = torch.zeros(2, dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        chunk_loss = _chunk_loss_for(hidden.device.type)
        for start in range(0, hidden.shape[0], size):
            rows = hidden[start : start + size]
            logits = rows @ head.t()  # [size, W]
            sums, grad_logits = chunk_loss(logits, targets[start : start + size], z_weight, wide)
            totals += sums
            if grad_hidden is not None:
                torch.mm(grad_logits, head, out=grad_hidden[start : start + size])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        total, loss = totals.unbind()
        ctx.mark_non_differentiable(loss)
        return total, loss

    @staticmethod
    def backward(
        ctx: Any, grad_total: torch.Tensor, grad_loss: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def _chunk_loss(
    logits: torch.Tensor, targets: torch.Tensor, z_weight: float, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [sum of the loss with z, sum without] [2], and the loss's gradient [size, W]."""
    is_counted = targets != IGNORED
    words = torch.where(is_counted, targets, 0)
    log_sum = logits.to(wide).logsumexp(-1)  # [size]
    chosen = logits.gather(1, words[:, None])[:, 0].to(wide)
    loss = torch.where(is_counted, log_sum - chosen, 0.0)
    total = loss + z_weight * torch.where(is_counted, log_sum, 0.0).square()
    probs = (logits.to(wide) - log_sum[:, None]).exp()
    is_target = torch.arange(logits.shape[1], device=logits.device) == words[:, None]
    grad = probs * (1 + 2 * z_weight * log_sum)[:, None] - is_target.to(wide)
    grad = torch.where(is_counted[:, None], grad, 0.0).to(logits.dtype)
    return torch.stack((total.sum(), loss.sum())), grad


@cache
def _chunk_loss_for(device_type: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """On a GPU the chunk's dozen passes over the logits are compiled into two."""
    return torch.compile(_chunk_loss, dynamic=False) if device_type == "cuda" else _chunk_loss
