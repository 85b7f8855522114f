"""Sum of the chosen experts through grouped matrix products."""

from typing import Any

import torch
import torch.nn.functional as F

from qnext.kernels.fp8_blocks import DTYPE as EIGHT_BITS
from qnext.kernels.int8_rows import widened
from qnext.kernels.linear.torch import aligned_rows, empty_rows

# Elements that torch's vector loops take at a time on the widest CPUs, twice 512 bits of fp32.
WHOLE_VECTORS = 32


def supports(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    row_stable: bool = False,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if gate_up.dtype == EIGHT_BITS:
        return "grouped_mm takes no e4m3 weights"
    if row_stable:
        return "row by row it has no gradient" if x.requires_grad else None
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
    compiled and captured. row_stable takes one matrix-vector product per pair instead, because
    grouped products choose their blocking from the number of rows.
    """
    gate_up, down = _float_rows(gate_up, x), _float_rows(down, x)
    if row_stable:
        return _row_by_row(x, gate_up, down, top_weights, top_ids)
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


def _float_rows(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """An int8 weight in the dtype of x; others are cast where they are used, one by one."""
    return widened(weight, x.dtype) if weight.dtype == torch.int8 else weight


def _row_by_row(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
) -> torch.Tensor:
    """Each pair by itself, the sum over experts in the order of top_ids."""
    num_tokens, num_active = top_ids.shape
    expert_ids = top_ids.reshape(-1).tolist()
    x = aligned_rows(x)
    hidden = empty_rows(x, len(expert_ids), gate_up.shape[1])
    for pair_idx, expert_idx in enumerate(expert_ids):
        torch.mv(gate_up[expert_idx].to(x.dtype), x[pair_idx // num_active], out=hidden[pair_idx])
    gate, up = hidden.chunk(2, dim=-1)
    # Whole vectors whatever the number of rows: the tail of a vector loop rounds silu differently.
    size = down.shape[2]
    padded = -(-size // WHOLE_VECTORS) * WHOLE_VECTORS
    acted = aligned_rows(F.silu(F.pad(gate, [0, padded - size]))[:, :size] * up)
    slots = empty_rows(x, len(expert_ids), down.shape[1])
    for pair_idx, expert_idx in enumerate(expert_ids):
        torch.mv(down[expert_idx].to(x.dtype), acted[pair_idx], out=slots[pair_idx])
    wide = torch.promote_types(x.dtype, torch.float32)
    weighted = (
        slots.unflatten(0, (num_tokens, num_active)).to(wide) * top_weights.to(wide)[..., None]
    )
    return weighted.sum(1).to(x.dtype)


def _grouped_linear(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(rows, weight.to(rows.dtype).transpose(-2, -1), offs=ends)
