"""Mixture of experts for the rows of a decode step: each distinct expert is read once."""

import torch

from qnext.kernels.experts_rows.reference import NO_SCALES, ExpertScales
from qnext.kernels.experts_rows.triton_config import RowsTile, rows_tile
from qnext.kernels.experts_rows.triton_one import experts_one_fwd, one_tile
from qnext.kernels.experts_rows.triton_tiles import (
    TILE_ROWS,
    sum_slots,
    tile_down,
    tile_up,
)
from qnext.kernels.fp8_blocks import BLOCK
from qnext.kernels.gpu_decode import rows_objection, weight_objection

MAX_ROWS = TILE_ROWS
MAX_ACTIVE = 32


def experts_rows_fwd(
    normed: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    *,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared_logit: torch.Tensor | None,
    residual: torch.Tensor,
    scales: ExpertScales | None,
    use_pdl: bool = False,
    tile: RowsTile | None = None,
) -> torch.Tensor:
    """Launch two kernels for one row, three for more; arguments as in `experts_rows_reference`.

    Args:
        use_pdl: see `overlap_options`.
        tile: another cut than the one chosen by shape; one row takes tiles too then.
    """
    weights = (gate_up, down, shared_gate_up, shared_down)
    if normed.shape[0] == 1 and tile is None and scales is not None:
        one = one_tile(weights, top_ids.shape[1])
        if one is not None:
            routing = (top_weights, top_ids, shared_logit)
            return experts_one_fwd(
                normed, weights, *routing, residual, scales, one, use_pdl=use_pdl
            )
    width = down.shape[2] if shared_down is None else max(down.shape[2], shared_down.shape[1])
    tile = tile or rows_tile(normed.shape[1], width, gate_up.element_size())
    hidden = tile_up(normed, weights, top_ids, scales, tile, use_pdl=use_pdl)
    products = tile_down(hidden, down, shared_down, top_ids, scales, tile, use_pdl=use_pdl)
    return sum_slots(products, top_weights, shared_logit, residual, use_pdl=use_pdl)


def supports(
    normed: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    *,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared_logit: torch.Tensor | None,
    residual: torch.Tensor,
    scales: ExpertScales | None = None,
) -> str | None:
    """Why these kernels cannot run, or None."""
    if top_ids.shape[1] > MAX_ACTIVE:
        return f"{top_ids.shape[1]} experts per token, more than {MAX_ACTIVE}"
    given = (shared_gate_up is not None, shared_down is not None, shared_logit is not None)
    if len(set(given)) != 1:
        return "the shared expert needs gate_up, down and logit, or none of them"
    if not (residual.is_contiguous() and top_weights.is_contiguous() and top_ids.is_contiguous()):
        return "residual, weights or ids are not contiguous"
    scale = NO_SCALES if scales is None else scales
    weights = {
        "gate_up": (gate_up, scale[0]),
        "down": (down, scale[1]),
        "shared_gate_up": (shared_gate_up, scale[2]),
        "shared_down": (shared_down, scale[3]),
    }
    for name, (weight, weight_scale) in weights.items():
        if weight is None:
            continue
        reason = weight_objection(name, weight, weight_scale, normed.dtype)
        if reason is not None:
            return reason
        if scales is not None and "gate_up" in name and weight.shape[-2] % (2 * BLOCK):
            return f"{name} in e4m3 of width {weight.shape[-2] // 2}, not a multiple of {BLOCK}"
    return rows_objection(normed, MAX_ROWS)


def experts_rows_triton(
    normed: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    *,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared_logit: torch.Tensor | None,
    residual: torch.Tensor,
    scales: ExpertScales | None = None,
) -> torch.Tensor:
    """See `experts_rows_reference`. Up to 16 rows.

    The hidden channels are rounded to the dtype of the rows once, between the two products. A row
    has the same bits in any company of 2 to 16; alone it may be summed in another order. A token's
    experts are distinct, as `norm_router` makes them.
    """
    return experts_rows_fwd(
        normed,
        gate_up,
        down,
        shared_gate_up,
        shared_down,
        top_weights=top_weights,
        top_ids=top_ids,
        shared_logit=shared_logit,
        residual=residual,
        scales=scales,
    )
