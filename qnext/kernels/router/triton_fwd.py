"""Choice of experts for many rows: a product, then a program for each row's softmax and top-k."""

from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.gpu_rows import rows_objection
from qnext.kernels.graph_ops import graph_op
from qnext.kernels.norm_router.triton_fwd import choose_experts

MAX_EXPERTS = 1024


def supports(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, norm_topk_prob: bool, row_stable: bool
) -> str | None:
    """Say why this backend cannot run, or None."""
    if row_stable:
        return "row by row it has no kernel"
    if weight.shape[0] > MAX_EXPERTS:
        return f"{weight.shape[0]} experts, more than {MAX_EXPERTS}"
    return rows_objection(x)


def router_triton(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, norm_topk_prob: bool, row_stable: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `router_reference`; equal logits go to the lowest id."""
    weight = weight.to(x.dtype)
    if torch.compiler.is_compiling():  # the ops have gradients of their own
        logits = router_logits(x, weight)
        return *router_fwd(logits, top_k, norm_topk_prob), logits
    logits = LogitsFunction.apply(x, weight)
    return *RouterFunction.apply(logits, top_k, norm_topk_prob), logits


class LogitsFunction(torch.autograd.Function):
    """x W^T in fp32, which autograd's own product of 16-bit rows would round.

    Experts that nearly tie are then the same ones with gradients and without.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = router_logits(x, weight)
        LogitsFunction.keep(ctx, (x, weight), logits)
        return logits

    @staticmethod
    def keep(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad_logits.to(x.dtype)
        return grad @ weight, grad.t() @ x


class RouterFunction(torch.autograd.Function):
    """Keeps the choice alone. Normalised weights are a softmax of the chosen logits by themselves.

    Then d logit_a = w_a (d w_a - sum_b w_b d w_b); else the sum runs on to the other experts, who
    get -p_e sum_b w_b d w_b.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, top_k: int, norm_topk_prob: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = router_fwd(logits, top_k, norm_topk_prob)
        RouterFunction.keep(ctx, (logits, top_k, norm_topk_prob), output)
        return output

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        logits, _, ctx.norm_topk_prob = inputs
        weights, ids = output
        ctx.save_for_backward(weights, ids, logits)
        ctx.mark_non_differentiable(ids)

    @staticmethod
    def backward(
        ctx: Any, grad_weights: torch.Tensor, grad_ids: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        weights, ids, logits = ctx.saved_tensors
        weighted = weights * grad_weights
        total = weighted.sum(-1, keepdim=True)
        if ctx.norm_topk_prob:
            return torch.zeros_like(logits).scatter_(1, ids, weighted - weights * total), None, None
        grad = -logits.softmax(-1) * total
        return grad.scatter_add_(1, ids, weighted), None, None


def _logits_shape(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@graph_op("router_logits", shapes=_logits_shape)
def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, C] times weight [E, C], fp32: [T, E]. A CPU rounds to the dtype of x."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return (x @ weight.t()).float()


torch.library.register_autograd(
    "qnext::router_logits", LogitsFunction.backward, setup_context=LogitsFunction.keep
)


def _shapes(
    logits: torch.Tensor, top_k: int, norm_topk_prob: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = (logits.shape[0], top_k)
    return logits.new_empty(chosen), logits.new_empty(chosen, dtype=torch.int64)


@graph_op("router", shapes=_shapes)
def router_fwd(
    logits: torch.Tensor, top_k: int, norm_topk_prob: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel. logits: [T, E], fp32. Returns weights [T, A], fp32, and ids, int64"""
    num_rows, num_experts = logits.shape
    weights = torch.empty(num_rows, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, top_k, dtype=torch.int64, device=logits.device)
    if num_rows:
        router_fwd_kernel[(num_rows,)](
            logits.contiguous(),
            weights,
            ids,
            E=num_experts,
            A=top_k,
            IS_NORMED=norm_topk_prob,
            BE=triton.next_power_of_2(num_experts),
            BA=triton.next_power_of_2(top_k),
            num_warps=1,
        )
    return weights, ids


torch.library.register_autograd(
    "qnext::router", RouterFunction.backward, setup_context=RouterFunction.keep
)


@triton.jit
def router_fwd_kernel(
    p_logits: tl.tensor,
    p_weights: tl.tensor,
    p_ids: tl.tensor,
    E: tl.constexpr,
    A: tl.constexpr,
    IS_NORMED: tl.constexpr,
    BE: tl.constexpr,
    BA: tl.constexpr,
) -> None:
    """One program per row."""
    i_t = tl.program_id(0).to(tl.int64)
    choose_experts(
        p_logits + i_t * E, p_weights + i_t * A, p_ids + i_t * A, E, A, IS_NORMED, BE, BA, True
    )
