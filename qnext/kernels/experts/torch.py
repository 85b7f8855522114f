"""Sum of the chosen experts through grouped matrix products."""

from typing import Any

import torch
import torch.nn.functional as F


def supports(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    row_stable: bool = False,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if row_stable:
        return "grouped products choose their blocking from the number of rows; row_stable is on"
    if x.dtype == torch.float64:
        return "grouped_mm has no float64"
    if x.device.type == "cuda" and x.dtype != torch.bfloat16:
        return f"grouped_mm on a GPU takes bfloat16, not {x.dtype}"
    item = x.element_size()
    if x.shape[1] * item % 16 or down.shape[2] * item % 16:
        return f"grouped_mm needs rows of whole 16 bytes, not {x.shape[1]} and {down.shape[2]}"
    return None


class _Gather(torch.autograd.Function):
    """rows[index] where index holds each row `fan` times; its gradient is a gather and a sum.

    The stock gradient of indexing is a scatter with atomic adds: slow, and in no fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, fan: int
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.fan = fan
        return rows[order // fan]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(-1, ctx.fan, grad.shape[-1]).sum(1), None, None, None


def experts_torch(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    row_stable: bool = False,
) -> torch.Tensor:
    """As `experts_reference`: pairs sorted by expert, then two grouped products over all of them.

    No value is read back to the host, and shapes depend on T alone, so that a step can be
    compiled and captured.
    """
    num_tokens, num_active = top_ids.shape
    num_experts = gate_up.shape[0]
    flat_ids = top_ids.reshape(-1)
    order = torch.argsort(flat_ids, stable=True)  # [T * A]: pairs, grouped by expert
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=x.device)
    edges = torch.arange(1, num_experts + 1, device=x.device)
    ends = torch.searchsorted(flat_ids[order], edges).to(torch.int32)  # [E]: end of each group
    rows = _Gather.apply(x, order, inverse, num_active)  # [T * A, C]
    hidden = _grouped_linear(rows, gate_up, ends)
    gate, up = hidden.chunk(2, dim=-1)
    outputs = _grouped_linear((F.silu(gate) * up).contiguous(), down, ends)
    slots = _Gather.apply(outputs, inverse, order, 1).view(num_tokens, num_active, -1)
    # Compiled, this is one pass that sums in fp32; a product per token, [1, A] x [A, C], took
    # ten times as long.
    wide = torch.promote_types(x.dtype, torch.float32)
    return (slots.to(wide) * top_weights.to(wide)[..., None]).sum(1).to(x.dtype)


def _grouped_linear(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(rows, weight.to(rows.dtype).transpose(-2, -1), offs=ends)
