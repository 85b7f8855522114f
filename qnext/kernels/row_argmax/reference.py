"""The likeliest token of each row, plain PyTorch."""

import torch


def row_argmax_reference(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest element of each row; ties to the lowest index, NaN never wins.

    A row of nothing but NaN gives 0.

    Args:
        logits: [T, W], fp32

    Returns:
        [T], int64
    """
    is_nan = logits.isnan()
    known = logits.masked_fill(is_nan, -torch.inf)
    # Minus infinity beats NaN, so the place of the best is looked for among what was no NaN.
    is_best = (known == known.amax(-1, keepdim=True)) & ~is_nan
    return is_best.to(torch.int8).argmax(-1)
