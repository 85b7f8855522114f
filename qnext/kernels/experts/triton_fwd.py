"""Sum of the chosen experts on a GPU: a sort, two grouped products, a sum of each token's rows."""

from typing import Any

import torch

from qnext.kernels.experts.triton_bwd import experts_bwd
from qnext.kernels.experts.triton_config import config_for
from qnext.kernels.experts.triton_fp8 import experts_fp8_held, held_supports
from qnext.kernels.experts.triton_products import combine, multiply_rows, multiply_up
from qnext.kernels.experts.triton_sort import PairTable, sort_pairs, tile_room
from qnext.kernels.fp8_blocks import DTYPE as EIGHT_BITS
from qnext.kernels.gpu_rows import IS_INTERPRETED
from qnext.kernels.grad_sums import leaf_of, sum_to_extend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
        if torch.compiler.is_compiling():
            return "e4m3 weights inside a compiled graph"
        return held_supports(x, gate_up, down, top_weights, top_ids)
    if x.device.type != "cuda" and not IS_INTERPRETED:
        return f"rows are on {x.device}, and Triton runs on a GPU"
    if x.dtype not in DTYPES:
        return f"rows are fp32, fp16 or bf16 here, not {x.dtype}"
    if gate_up.dtype not in DTYPES or down.dtype not in DTYPES:
        return f"weights are fp32, fp16 or bf16 here, not {gate_up.dtype} and {down.dtype}"
    if top_ids.dtype != torch.int64:
        return f"ids are int64 here, not {top_ids.dtype}"
    return None


def experts_triton(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    row_stable: bool = False,
) -> torch.Tensor:
    """As `experts_reference`; gate, up and their SwiGLU are rounded once, products once.

    Shapes depend on T alone and nothing goes through the host, so that a call can be captured in a
    CUDA graph. row_stable fixes the tiles whatever T is; a row's sums then always run in one order.
    """
    return experts_shared_triton(x, gate_up, down, top_weights, top_ids, None, None, row_stable)


def experts_shared_triton(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared: torch.Tensor | None,
    shared_gate: torch.Tensor | None,
    row_stable: bool = False,
) -> torch.Tensor:
    """As `experts_triton`, plus sigmoid(shared_gate) * shared, added before the one rounding.

    Args:
        shared: output of the shared expert, in the dtype of x. [T, C]
        shared_gate: logits of its gate. [T, 1]

    Raises:
        ValueError: one of shared and shared_gate is given without the other.
    """
    if (shared is None) != (shared_gate is None):
        raise ValueError("shared and shared_gate come together, and one of them is None")
    if gate_up.dtype == EIGHT_BITS:
        return experts_fp8_held(x, gate_up, down, top_weights, top_ids, shared, shared_gate)
    inputs = (x, gate_up, down, top_weights, shared, shared_gate)
    saves_pre = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out: torch.Tensor = torch.ops.qnext.experts_grouped(
        x, gate_up, down, top_weights, top_ids, shared, shared_gate, saves_pre, row_stable
    )[0]
    return out


@torch.library.custom_op("qnext::experts_grouped", mutates_args=())
def experts_fwd(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared: torch.Tensor | None,
    shared_gate: torch.Tensor | None,
    saves_pre: bool,
    row_stable: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [T, C], and what the backward pass reads: outputs of gate and up, and the pair table.

    An op of torch.library, which compiled graphs step over, costs some 25 us of host time more than
    a bare call; the shortest call keeps the GPU busy far longer.

    Saving gate and up costs 2I elements a pair (84 MB at 4,096 tokens, 671 MB at 32,768 of the
    flagship in bf16). Computing them again would cost two thirds of the forward products; their
    SwiGLU, which is cheap, is computed again.
    """
    num_active, (num_experts, _, width) = top_ids.shape[1], down.shape
    if x.shape[0] == 0:
        return _shapes(x, gate_up, down, top_weights, top_ids, shared, shared_gate, False, False)
    x, top_weights = x.contiguous(), top_weights.contiguous()
    gate_up, down = gate_up.to(x.dtype).contiguous(), down.to(x.dtype).contiguous()
    config = config_for(x, num_active, num_experts, width, row_stable)
    table = sort_pairs(top_ids.contiguous(), num_experts, config.block_m)
    hidden, pre = multiply_up(x, gate_up, table, num_active, config.block_m, config.up, saves_pre)
    slots = multiply_rows(hidden, down, table, config.block_m, config.down)
    if shared is not None and shared_gate is not None:
        shared, shared_gate = shared.contiguous(), shared_gate.contiguous()
    out = combine(slots, table.inverse, num_active, top_weights, shared, shared_gate)
    return out, pre, *table


@experts_fwd.register_fake
def _shapes(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared: torch.Tensor | None,
    shared_gate: torch.Tensor | None,
    saves_pre: bool,
    row_stable: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_pairs, num_experts = x.shape[0] * top_ids.shape[1], gate_up.shape[0]

    def ints(*shape: int) -> torch.Tensor:
        return top_ids.new_empty(shape, dtype=torch.int32)

    return (
        x.new_empty(x.shape),
        x.new_empty(num_pairs if saves_pre else 0, gate_up.shape[1]),
        ints(num_pairs),
        ints(num_pairs),
        ints(num_experts + 1),
        ints(tile_room(num_pairs, num_experts), 3),
    )


@torch.library.custom_op("qnext::experts_grouped_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    pre: torch.Tensor,
    table: list[torch.Tensor],
    needs: list[bool],
    row_stable: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, gate_up, down and top_weights; empty tensors in place of unwanted ones."""
    inputs = (x, gate_up, down, top_weights)
    if x.shape[0] == 0:
        zeros = [t.new_zeros(t.shape if n else 0) for t, n in zip(inputs, needs, strict=True)]
        return zeros[0], zeros[1], zeros[2], zeros[3]
    config = config_for(x, top_weights.shape[1], down.shape[0], down.shape[2], row_stable)
    grads = experts_bwd(
        grad.to(x.dtype).contiguous(),
        x.contiguous(),
        gate_up,
        down,
        top_weights.contiguous(),
        pre,
        PairTable(*table),
        config,
        (needs[0], needs[1], needs[2], needs[3]),
    )
    made = [t.new_empty(0) if g is None else g for t, g in zip(inputs, grads, strict=True)]
    return made[0], made[1], made[2], made[3]


@_backward.register_fake
def _grad_shapes(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    pre: torch.Tensor,
    table: list[torch.Tensor],
    needs: list[bool],
    row_stable: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = (x, gate_up, down, top_weights)
    shapes = [t.shape if need else (0,) for t, need in zip(inputs, needs, strict=True)]
    made = [t.new_empty(shape) for t, shape in zip(inputs, shapes, strict=True)]
    return made[0], made[1], made[2], made[3]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, gate_up, down, top_weights, _, shared, shared_gate, _, row_stable = inputs
    ctx.set_materialize_grads(False)
    ctx.row_stable = row_stable
    ctx.leaves = (leaf_of(gate_up), leaf_of(down))
    ctx.save_for_backward(x, gate_up, down, top_weights, shared, shared_gate, *output[1:])


def _autograd(ctx: Any, grad: torch.Tensor | None, *_unused: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 9
    x, gate_up, down, top_weights, shared, shared_gate, pre, *table = ctx.saved_tensors
    needs = list(ctx.needs_input_grad)
    grads: list[torch.Tensor | None] = [None] * 4
    sums = (sum_to_extend(ctx.leaves[0]), sum_to_extend(ctx.leaves[1]))
    if any(total is not None for total in sums) and x.shape[0]:
        # Not an op of torch.library, which may not write to what autograd does not know of.
        config = config_for(x, top_weights.shape[1], down.shape[0], down.shape[2], ctx.row_stable)
        grads = list(
            experts_bwd(
                grad.to(x.dtype), x.contiguous(), gate_up, down, top_weights.contiguous(), pre,
                PairTable(*table), config, (needs[0], needs[1], needs[2], needs[3]), sums,
            )
        )  # fmt: skip
    elif any(needs[:4]):
        made = torch.ops.qnext.experts_grouped_backward(
            grad, x, gate_up, down, top_weights, pre, table, needs[:4], ctx.row_stable
        )
        grads = [g if need else None for g, need in zip(made, needs[:4], strict=True)]
    shared_grad = gate_grad = None
    if needs[5] or needs[6]:
        gate, wide = torch.sigmoid(shared_gate.float()), grad.float()
        shared_grad = (gate * wide).to(shared.dtype)
        gate_sum = (wide * shared.float()).sum(-1, keepdim=True)
        gate_grad = (gate * (1 - gate) * gate_sum).to(shared_gate.dtype)
    return (*grads, None, shared_grad, gate_grad, None, None)


torch.library.register_autograd("qnext::experts_grouped", _autograd, setup_context=_setup_context)
