"""Cross-entropy of a linear head on a GPU: cuBLAS for the products, Triton for what lies between.

A chunk's logits are read twice and overwritten once, by their own gradient.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.fp8_blocks import DTYPE as EIGHT_BITS
from qnext.kernels.gpu_rows import IS_INTERPRETED
from qnext.kernels.grad_sums import leaf_of, sum_to_extend
from qnext.kernels.graph_ops import graph_op
from qnext.kernels.int8_rows import widened

IGNORED = -100
# Of the logits held at a time. 640 MiB are 2,208 rows of 151,936 words in bf16: fewer rows would
# read and write the fp32 gradient of the weight too often beside the product that adds to it.
CHUNK_BYTES = 640 << 20
# Products run best on whole tiles of rows.
ROW_STEP = 128
# Logits that a thread of the loss kernel reads at once: two loads of 16 bytes in half precision.
PER_THREAD = 16
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SCALE_BLOCK = 4096


@triton.jit
def linear_cross_entropy_fwd_kernel(
    p_logits: tl.tensor,
    p_targets: tl.tensor,
    p_losses: tl.tensor,
    p_loss: tl.tensor,
    W: tl.tensor,
    stride_row: tl.tensor,
    z_weight: tl.tensor,
    IGNORED: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Loss of one row of logits, and the loss's gradient in their place.

    Each of the BR threads keeps a maximum and a sum of its own, so that warps meet once per row,
    not once per block.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    LN_2: tl.constexpr = 0.6931471805599453
    BLOCK: tl.constexpr = BR * BC
    i_t = tl.program_id(0)
    p_row = p_logits + i_t.to(tl.int64) * stride_row
    o_block = tl.arange(0, BR)[:, None] * BC + tl.arange(0, BC)[None, :]
    num_blocks = tl.cdiv(W, BLOCK)
    target = tl.load(p_targets + i_t)
    if target == IGNORED:
        # Not even read: the row's hidden state may be padding.
        tl.store(p_losses + i_t, 0.0)
        tl.store(p_loss + i_t, 0.0)
        if HAS_GRAD:
            for i_b in range(num_blocks):
                o_w = i_b * BLOCK + o_block
                tl.store(p_row + o_w, tl.zeros([BR, BC], p_row.dtype.element_ty), mask=o_w < W)
    else:
        # Before the barrier of the sums below, after which the place is overwritten.
        chosen = tl.load(p_row + target).to(tl.float32)
        b_max = tl.full([BR], float("-inf"), tl.float32)
        b_sum = tl.zeros([BR], tl.float32)
        for i_b in range(num_blocks):
            o_w = i_b * BLOCK + o_block
            b_x = tl.load(
                p_row + o_w, mask=o_w < W, other=float("-inf"), eviction_policy="evict_last"
            )
            b_x = b_x.to(tl.float32)
            b_top = tl.maximum(b_max, tl.max(b_x, 1))
            # A thread past the end of its row has seen nothing, and -inf - -inf would be NaN.
            b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
            # The difference before the factor: large logits lose nothing.
            b_p = tl.exp2((b_x - b_base[:, None]) * LOG2_E)
            b_sum = b_sum * tl.exp2((b_max - b_base) * LOG2_E) + tl.sum(b_p, 1)
            b_max = b_top
        top = tl.max(b_max, 0)
        log2_sum = tl.log2(tl.sum(b_sum * tl.exp2((b_max - top) * LOG2_E), 0))
        log_sum = top + log2_sum * LN_2
        loss = top - chosen + log2_sum * LN_2
        tl.store(p_losses + i_t, loss + z_weight * log_sum * log_sum)
        tl.store(p_loss + i_t, loss)
        if HAS_GRAD:
            factor = 1.0 + 2.0 * z_weight * log_sum
            # From the end back: what was read last is the likeliest to be in the caches still.
            for i_b in range(num_blocks):
                o_w = (num_blocks - 1 - i_b) * BLOCK + o_block
                b_x = tl.load(p_row + o_w, mask=o_w < W, other=0.0, eviction_policy="evict_first")
                b_grad = tl.exp2((b_x.to(tl.float32) - top) * LOG2_E - log2_sum) * factor
                b_grad = tl.where(o_w == target, b_grad - 1.0, b_grad)
                tl.store(p_row + o_w, b_grad.to(p_row.dtype.element_ty), mask=o_w < W)


@triton.jit
def linear_cross_entropy_scale_kernel(
    p_x: tl.tensor,
    p_factor: tl.tensor,
    p_y: tl.tensor,
    size: tl.tensor,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """y = x * factor, or y += x * factor: in fp32, rounded once."""
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(p_factor).to(tl.float32)
    b_x = tl.load(p_x + o_x, mask=o_x < size, other=0.0).to(tl.float32)
    b_x *= factor
    if ADDS:
        b_x += tl.load(p_y + o_x, mask=o_x < size, other=0.0).to(tl.float32)
    tl.store(p_y + o_x, b_x.to(p_y.dtype.element_ty), mask=o_x < size)


def loss_fwd(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    z_weight: float,
    *,
    has_grad: bool,
) -> None:
    """Losses of a chunk's rows into losses [2, rows], with z and without; logits become gradients.

    logits: rows may lie further apart than they are long. [rows, W]
    """
    num_rows, num_words = logits.shape
    # One program of 32 warps fills an SM, so that the rows in flight (40 MB) fit in the L2 cache.
    num_warps = 32 if num_words >= 32 * 32 * PER_THREAD else 4
    linear_cross_entropy_fwd_kernel[(num_rows,)](
        logits, targets, losses[0], losses[1], num_words, logits.stride(0), z_weight,
        IGNORED=IGNORED, HAS_GRAD=has_grad, BR=32 * num_warps, BC=PER_THREAD, num_warps=num_warps,
    )  # fmt: skip


@graph_op(
    "linear_cross_entropy_scaled", shapes=lambda x, factor, dtype: x.new_empty(x.shape, dtype=dtype)
)
def scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x times a scalar on the device, in dtype, without a wide copy."""
    out = torch.empty_like(x, dtype=dtype)
    _scale(x, factor, out, adds=False)
    return out


def _scale(x: torch.Tensor, factor: torch.Tensor, out: torch.Tensor, *, adds: bool) -> None:
    """out = x factor, or out += x factor."""
    grid = (triton.cdiv(x.numel(), SCALE_BLOCK),)
    linear_cross_entropy_scale_kernel[grid](x, factor, out, x.numel(), ADDS=adds, BLOCK=SCALE_BLOCK)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, is_first: bool) -> None:
    """total = a b, or total += a b: total in fp32, summed in fp32, whatever a and b are."""
    beta = 0.0 if is_first else 1.0  # cuBLAS does not read what zero multiplies
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def rows_per_chunk(num_tokens: int, num_words: int, element_bytes: int) -> int:
    """Rows of a chunk: chunks are about equal, and their logits take CHUNK_BYTES at most."""
    most = max(1, CHUNK_BYTES // (num_words * element_bytes))
    num_chunks = -(-num_tokens // most)
    size = -(-num_tokens // max(1, num_chunks))
    whole = -(-size // ROW_STEP) * ROW_STEP
    return whole if whole <= most else size


def _shapes(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_weight: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0, dtype=torch.float32),
    )


@graph_op("linear_cross_entropy", shapes=_shapes)
def linear_cross_entropy_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_weight: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of the losses, with z and without; gradients of the first where needed, else empty.

    Returns:
        Two scalars in fp32; gradients of hidden in its dtype [T, C], of the weight in fp32 [W, C].
    """
    num_tokens, num_words = hidden.shape[0], weight.shape[0]
    head = weight.to(hidden.dtype)
    size = rows_per_chunk(num_tokens, num_words, hidden.element_size())
    # Rows start at multiples of 128 bytes, whatever the number of words.
    room = hidden.new_empty(min(size, num_tokens), -(-num_words // 64) * 64)
    losses = hidden.new_empty(2, num_tokens, dtype=torch.float32)
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else 0)
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0, dtype=torch.float32)
    for start in range(0, num_tokens, size):
        own = slice(start, min(start + size, num_tokens))
        logits = room[: own.stop - start, :num_words]
        torch.mm(hidden[own], head.t(), out=logits)
        has_grad = needs_hidden or needs_weight
        loss_fwd(logits, targets[own], losses[:, own], z_weight, has_grad=has_grad)
        if needs_hidden:
            torch.mm(logits, head, out=grad_hidden[own])
        if needs_weight:
            add_product(grad_weight, logits.t(), hidden[own], is_first=start == 0)
    return losses[0].sum(), losses[1].sum(), grad_hidden, grad_weight


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The loss is a sum, so its gradients are known up to one factor in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        z_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (hidden, weight, targets, z_weight, *ctx.needs_input_grad[:2])
        output = linear_cross_entropy_fwd(*inputs)
        LinearCrossEntropyFunction.keep(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        hidden, weight, _, _, needs_hidden, needs_weight = inputs
        _, loss, grad_hidden, grad_weight = output
        ctx.save_for_backward(
            grad_hidden if needs_hidden else None, grad_weight if needs_weight else None
        )
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.leaf = leaf_of(weight)
        ctx.mark_non_differentiable(loss)

    @staticmethod
    def backward(
        ctx: Any, grad_total: torch.Tensor, grad_loss: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        dtype, weight_dtype = ctx.dtypes
        d_hidden = None if grad_hidden is None else scaled(grad_hidden, grad_total, dtype)
        total = sum_to_extend(ctx.leaf)
        if grad_weight is None:
            d_weight = None
        elif total is None:
            d_weight = scaled(grad_weight, grad_total, weight_dtype)
        else:
            d_weight = None
            _scale(grad_weight, grad_total, total, adds=True)
        return d_hidden, d_weight, None, None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    LinearCrossEntropyFunction.keep(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _formula(
    ctx: Any, grad_total: torch.Tensor, *_unused: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    grads = LinearCrossEntropyFunction.backward(ctx, grad_total, grad_total)
    return *grads, None, None


torch.library.register_autograd("qnext::linear_cross_entropy", _formula, setup_context=_keep)


def supports(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_weight: float = 0.0,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if not hidden.is_cuda and not IS_INTERPRETED:
        return f"rows on {hidden.device}, not on a GPU"
    if hidden.dtype not in FLOAT_DTYPES:
        return f"rows of {hidden.dtype}, not fp16, bf16 or fp32"
    if weight.dtype not in (*FLOAT_DTYPES, torch.int8, EIGHT_BITS):
        return f"a head of {weight.dtype}, not fp16, bf16, fp32, int8 or e4m3"
    if hidden.shape[0] == 0:
        return "there are no rows"
    return None


def linear_cross_entropy_triton(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `linear_cross_entropy_reference`; the gradients are made along with the loss.

    Memory beside the results: the logits of a chunk, and the weight's gradient in fp32.
    """
    if weight.dtype.itemsize == 1:
        weight = widened(weight, hidden.dtype)
    if not torch.is_grad_enabled():
        # Autograd asks for gradients of whatever requires them, even where none can be used.
        hidden, weight = hidden.detach(), weight.detach()
    hidden, targets = hidden.contiguous(), targets.contiguous()
    if torch.compiler.is_compiling():  # the op has a gradient of its own
        needs = (hidden.requires_grad, weight.requires_grad)
        total, loss = linear_cross_entropy_fwd(hidden, weight, targets, float(z_weight), *needs)[:2]
    else:
        total, loss = LinearCrossEntropyFunction.apply(hidden, weight, targets, float(z_weight))
    return total, loss, (targets != IGNORED).sum()
