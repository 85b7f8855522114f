"""What a router did with the tokens of a batch, plain PyTorch."""

import torch


def router_stats_reference(
    logits: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means over all tokens, and the tokens of each expert.

    Args:
        logits: of the router. [T, E], fp32
        ids: chosen experts. [T, A], int64

    Returns:
        Mean softmax [E] and mean square of the log-sum-exp [], with gradients; between them pairs
        sent to each expert [E], fp32; last the mean entropy of the softmax [], in nats.
    """
    probs = logits.softmax(-1)
    log_sum = logits.logsumexp(-1)
    counts = torch.zeros(logits.shape[1], dtype=torch.float32, device=logits.device)
    flat = ids.reshape(-1)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.float32))
    with torch.no_grad():
        entropy = log_sum - (probs * logits).sum(-1)
    return probs.mean(0), counts, log_sum.pow(2).mean(), entropy.mean()
