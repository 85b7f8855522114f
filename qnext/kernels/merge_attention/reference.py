"""Attention over two sets of keys from attention over each, plain PyTorch."""

import torch


def merge_attention_reference(
    first: torch.Tensor,
    first_sums: torch.Tensor,
    second: torch.Tensor,
    second_sums: torch.Tensor,
) -> torch.Tensor:
    """Weigh two read-outs by their share of the softmax's denominator.

        out = (e^{l_1} o_1 + e^{l_2} o_2) / (e^{l_1} + e^{l_2})

    Args:
        first, second: read-outs of the same queries over different keys. [T, Hq, D]
        first_sums, second_sums: natural logarithms of the denominators, sum of e^score. [Hq, T],
            fp32

    Returns:
        Read-out over both sets of keys, rounded once, in the dtype of first. [T, Hq, D]

    Source: Flash-Decoding and its like; the identity is the softmax's own.
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    share = torch.sigmoid(second_sums.to(wide) - first_sums.to(wide)).t()[..., None]  # of second
    return (first.to(wide) * (1 - share) + second.to(wide) * share).to(first.dtype)
