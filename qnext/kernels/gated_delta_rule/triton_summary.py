"""What a stretch of tokens does to the state: S_out = M S_in + U, for context parallelism."""

import torch

from qnext.kernels.gated_delta_rule.triton_chunks import Inputs, prepare_chunks, token_rows
from qnext.kernels.gated_delta_rule.triton_scan import scan_summary


def gated_delta_summary(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gated_delta_summary_reference`, on a GPU.

    It has no gradient. None is needed: backwards, a shard's state gradient goes through the same
    M, dS_in = M^T dS_out plus what the shard's own outputs give, and the shard's other gradients
    follow from the true S_in and dS_out through `gated_delta_rule_triton`.
    """
    if cu_seqlens is None:
        cu_seqlens = torch.arange(2, dtype=torch.int32, device=v.device) * v.shape[0]
    inputs = Inputs(
        None, token_rows(k), token_rows(v), g.contiguous(), beta.contiguous(), cu_seqlens
    )
    return scan_summary(inputs, prepare_chunks(inputs))
