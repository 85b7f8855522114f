"""Mixture of experts for the rows of a decode step: by pairs, or by tiles of all rows.

One or two tokens rarely share an expert: each pair then reads its expert by itself, without dots
and in two launches. More tokens read each distinct expert once, in three launches.
"""

import torch

from qnext.kernels.experts_rows.reference import NO_SCALES, ExpertScales
from qnext.kernels.experts_rows.triton_gather import (
    GatherTile,
    gather_down,
    gather_tile,
    gather_up,
)
from qnext.kernels.experts_rows.triton_tiles import (
    TILE_ROWS,
    RowsTile,
    rows_tile,
    sum_slots,
    tile_down,
    tile_up,
)
from qnext.kernels.fp8_blocks import BLOCK
from qnext.kernels.gpu_decode import rows_objection, weight_objection

MAX_ROWS = TILE_ROWS
MAX_ACTIVE = 32
# Up to so many rows each pair reads its expert by itself. By estimate: at 2 rows both ways read 21
# experts and tiles take one launch more; from 3 on the shared expert's repeats cost more than that.
GATHERED_ROWS = 0


def choose_tile(
    num_tokens: int, C: int, width: int, num_slots: int, element_bytes: int
) -> GatherTile | RowsTile:
    """How experts of this width are read for so many tokens."""
    if num_tokens <= GATHERED_ROWS:
        return gather_tile(C, width, num_slots, element_bytes)
    return rows_tile(C, width, element_bytes)


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
    tile: GatherTile | RowsTile | None = None,
) -> torch.Tensor:
    """Launch two kernels or three; arguments as in `experts_rows_reference`.

    Args:
        use_pdl: see `overlap_options`.
        tile: another cut, and with it another way, than the one chosen by shape.
    """
    num_active, width = top_ids.shape[1], down.shape[2]
    if shared_down is not None:
        width = max(width, shared_down.shape[1])
    num_slots = num_active + (shared_down is not None)
    if tile is None:
        num_tokens, C = normed.shape
        tile = choose_tile(num_tokens, C, width, num_slots, gate_up.element_size())
    weights = (gate_up, down, shared_gate_up, shared_down)
    if isinstance(tile, GatherTile):
        hidden = gather_up(normed, weights, top_ids, scales, tile, use_pdl=use_pdl)
        return gather_down(
            hidden,
            down,
            shared_down,
            top_weights=top_weights,
            top_ids=top_ids,
            shared_logit=shared_logit,
            residual=residual,
            scales=scales,
            tile=tile,
            use_pdl=use_pdl,
        )
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
    has the same bits in any company of up to `GATHERED_ROWS` rows, and in any larger one. A
    token's experts are distinct, as `norm_router` makes them.
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
