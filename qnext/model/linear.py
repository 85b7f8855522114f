"""Projections inside the model, which in a window leave the padding rows out."""

import torch
import torch.nn.functional as F

from qnext.kernels import dispatch
from qnext.model.batch import ForwardBatch


def project(x: torch.Tensor, weight: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    """Multiply rows by a weight; the padding rows of a window give zeros.

    Args:
        x: [T, C]
        weight: [N, C]
        batch: what the rows belong to.

    Returns:
        [T, N]
    """
    if not batch.row_stable:
        out: torch.Tensor = dispatch.linear(x, weight)
        return out
    return fill_rows(dispatch.linear(x[: batch.num_rows], weight, row_stable=True), x.shape[0])


def fill_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Rows of zeros added up to num_rows in all."""
    missing = num_rows - x.shape[0]
    return F.pad(x, [0, 0, 0, missing]) if missing else x
