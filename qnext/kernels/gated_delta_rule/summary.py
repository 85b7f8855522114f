"""What a stretch of tokens does to the state, token by token: S_out = M S_in + U."""

import torch

from qnext.kernels.gated_delta_rule.reference import gated_delta_rule_reference


def gated_delta_summary_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The affine map from the state before a sequence to the state after it.

    Args:
        k, v, g, beta: as in `gated_delta_rule_reference`.
        cu_seqlens: bounds of packed sequences; one sequence if not given. [N + 1], int32

    Returns:
        M [N, Hv, K, K] and U [N, Hv, K, V] in fp32, with S_out = M S_in + U.
    """
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, v.shape[0]], dtype=torch.int32, device=v.device)
    wide = torch.promote_types(v.dtype, torch.float32)
    shape = (cu_seqlens.shape[0] - 1, v.shape[1], k.shape[2])
    zero = torch.zeros(*shape, v.shape[2], dtype=wide, device=v.device)
    eye = torch.eye(shape[2], dtype=wide, device=v.device).expand(*shape, shape[2])
    # A state of K columns that starts as the identity and to which nothing is written becomes M.
    nothing = v.new_zeros(*v.shape[:2], shape[2])
    through = gated_delta_rule_reference(
        k, k, nothing, g, beta, cu_seqlens=cu_seqlens, initial_state=eye
    )[1]
    written = gated_delta_rule_reference(
        k, k, v, g, beta, cu_seqlens=cu_seqlens, initial_state=zero
    )[1]
    assert through is not None and written is not None
    return through, written
