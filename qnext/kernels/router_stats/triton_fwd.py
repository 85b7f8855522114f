"""A router's statistics on a GPU: one pass over the logits forward, and one backward."""

from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.gpu_rows import column_sums, num_processors, rows_objection
from qnext.kernels.graph_ops import graph_op

MAX_EXPERTS = 1024
# Programs of the first stage of the sums; each warp takes whole rows.
_PROGRAMS_PER_PROCESSOR = 4
_TILE_ELEMENTS = 4096


def supports(logits: torch.Tensor, ids: torch.Tensor) -> str | None:
    """Say why this backend cannot run, or None."""
    if logits.shape[1] > MAX_EXPERTS:
        return f"{logits.shape[1]} experts, more than {MAX_EXPERTS}"
    if logits.dtype != torch.float32:
        return f"logits are fp32 here, not {logits.dtype}"
    return rows_objection(logits)


def router_stats_triton(
    logits: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `router_stats_reference`."""
    logits, ids = logits.contiguous(), ids.contiguous()
    # In a graph the op has a gradient of its own.
    run = router_stats_fwd if torch.compiler.is_compiling() else RouterStatsFunction.apply
    prob_mean, counts, z_mean, entropy_mean = run(logits, ids)
    return prob_mean, counts, z_mean, entropy_mean


class RouterStatsFunction(torch.autograd.Function):
    """Keeps the logits alone: the softmax is computed again."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = router_stats_fwd(logits, ids)
        RouterStatsFunction.keep(ctx, (logits, ids), output)
        return output

    @staticmethod
    def keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0])
        _, counts, _, entropy_mean = output
        ctx.mark_non_differentiable(counts, entropy_mean)

    @staticmethod
    def backward(
        ctx: Any, d_probs: torch.Tensor, d_counts: Any, d_z: torch.Tensor, d_entropy: Any
    ) -> tuple[torch.Tensor, None]:
        return router_stats_bwd(d_probs, d_z, *ctx.saved_tensors), None


def _shapes(
    logits: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_experts = logits.shape[1]
    return (
        logits.new_empty(num_experts),
        logits.new_empty(num_experts),
        logits.new_empty(()),
        logits.new_empty(()),
    )


@graph_op("router_stats", shapes=_shapes)
def router_stats_fwd(
    logits: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward kernel and the sums over its programs. Both arguments are contiguous."""
    num_rows, num_experts = logits.shape
    rows, columns, num_programs = _tile(logits)
    # Columns of a program: sums of the softmax, of log-sum-exp squared and of the entropy.
    partials = torch.empty(num_programs, num_experts + 2, dtype=torch.float32, device=logits.device)
    counts = torch.zeros(num_experts, dtype=torch.float32, device=logits.device)
    router_stats_fwd_kernel[(num_programs,)](
        logits, ids, partials, counts, num_rows,
        E=num_experts, A=ids.shape[1], BR=rows, BE=columns,
        BA=triton.next_power_of_2(ids.shape[1]), num_warps=4,
    )  # fmt: skip
    sums = column_sums(partials, torch.float32) / num_rows
    prob_mean, z_mean, entropy_mean = (part.clone() for part in sums.split((num_experts, 1, 1)))
    return prob_mean, counts, z_mean[0], entropy_mean[0]


@graph_op("router_stats_backward", "logits")
def router_stats_bwd(
    d_probs: torch.Tensor, d_z: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """Gradient of the logits from those of the mean probabilities and of z_mean."""
    num_rows, num_experts = logits.shape
    rows, columns, num_programs = _tile(logits)
    d_logits = torch.empty_like(logits)
    router_stats_bwd_kernel[(num_programs,)](
        logits, d_probs.contiguous(), d_z, d_logits, num_rows,
        E=num_experts, BR=rows, BE=columns, num_warps=4,
    )  # fmt: skip
    return d_logits


torch.library.register_autograd(
    "qnext::router_stats",
    RouterStatsFunction.backward,
    setup_context=RouterStatsFunction.keep,
)


def _tile(logits: torch.Tensor) -> tuple[int, int, int]:
    """Rows and columns of a tile, and programs."""
    num_rows, num_experts = logits.shape
    columns = triton.next_power_of_2(num_experts)
    rows = max(1, _TILE_ELEMENTS // columns)
    most = _PROGRAMS_PER_PROCESSOR * num_processors(logits.device)
    return rows, columns, min(most, triton.cdiv(num_rows, rows))


@triton.jit
def softmax_rows(
    p_logits: tl.tensor, o_r: tl.tensor, num_rows: tl.tensor, E: tl.constexpr, BE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Logits less their log-sum-exp, the softmax, and the log-sum-exp; 0 in rows past the end."""
    o_e = tl.arange(0, BE)
    is_row = o_r < num_rows
    o_x = o_r.to(tl.int64)[:, None] * E + o_e[None, :]
    b_x = tl.load(p_logits + o_x, is_row[:, None] & (o_e < E)[None, :], float("-inf"))
    # A row past the end has no maximum: -inf - -inf would be NaN.
    b_top = tl.where(is_row, tl.max(b_x, 1), 0.0)
    b_x -= b_top[:, None]
    b_exp = tl.exp(b_x)
    b_sum = tl.where(is_row, tl.sum(b_exp, 1), 1.0)
    b_log = tl.log(b_sum)
    return b_x - b_log[:, None], b_exp / b_sum[:, None], b_top + b_log


@triton.jit(do_not_specialize=["num_rows"])
def router_stats_fwd_kernel(
    p_logits: tl.tensor,
    p_ids: tl.tensor,
    p_partial: tl.tensor,
    p_counts: tl.tensor,
    num_rows: tl.tensor,
    E: tl.constexpr,
    A: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
    BA: tl.constexpr,
) -> None:
    """Each program takes every P-th tile of rows. Counts are whole, so their order is free."""
    o_e, o_a = tl.arange(0, BE), tl.arange(0, BA)
    b_probs = tl.zeros([BE], tl.float32)
    b_z = tl.zeros([BR], tl.float32)
    b_entropy = tl.zeros([BR], tl.float32)
    for i_r in range(tl.program_id(0), tl.cdiv(num_rows, BR), tl.num_programs(0)):
        o_r = i_r * BR + tl.arange(0, BR)
        b_log_p, b_p, b_log_sum = softmax_rows(p_logits, o_r, num_rows, E, BE)
        b_probs += tl.sum(b_p, 0)
        b_z += b_log_sum * b_log_sum
        # 0 log 0 is 0, not NaN.
        b_entropy -= tl.sum(tl.where(b_p > 0.0, b_p * b_log_p, 0.0), 1)
        m_pair = (o_r < num_rows)[:, None] & (o_a < A)[None, :]
        b_ids = tl.load(p_ids + o_r.to(tl.int64)[:, None] * A + o_a[None, :], m_pair, 0)
        tl.atomic_add(p_counts + b_ids, tl.full([BR, BA], 1.0, tl.float32), m_pair, sem="relaxed")
    p_own = p_partial + tl.program_id(0) * (E + 2)
    tl.store(p_own + o_e, b_probs, o_e < E)
    tl.store(p_own + E, tl.sum(b_z, 0))
    tl.store(p_own + E + 1, tl.sum(b_entropy, 0))


@triton.jit(do_not_specialize=["num_rows"])
def router_stats_bwd_kernel(
    p_logits: tl.tensor,
    p_dprobs: tl.tensor,
    p_dz: tl.tensor,
    p_dlogits: tl.tensor,
    num_rows: tl.tensor,
    E: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
) -> None:
    """d x_e = p_e (d_e - sum_f p_f d_f + 2 L d_z) / T, with L the log-sum-exp."""
    o_e = tl.arange(0, BE)
    b_d = tl.load(p_dprobs + o_e, o_e < E, 0.0) / num_rows
    d_z = 2.0 * tl.load(p_dz) / num_rows
    for i_r in range(tl.program_id(0), tl.cdiv(num_rows, BR), tl.num_programs(0)):
        o_r = i_r * BR + tl.arange(0, BR)
        _, b_p, b_log_sum = softmax_rows(p_logits, o_r, num_rows, E, BE)
        b_shift = d_z * b_log_sum - tl.sum(b_p * b_d[None, :], 1)
        o_x = o_r.to(tl.int64)[:, None] * E + o_e[None, :]
        mask = (o_r < num_rows)[:, None] & (o_e < E)[None, :]
        tl.store(p_dlogits + o_x, b_p * (b_d[None, :] + b_shift[:, None]), mask)
