"""Time of the routed experts on a GPU, beside its limit and beside grouped products in PyTorch.

    python -m benchmarks.ops.experts --tokens 64 256 1024 4096 32768 --train-tokens 4096 32768

Output and gradients are checked first against the reference in fp32, at the sizes that are timed,
up to 4096 tokens; nothing is timed if one is wrong.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.ops.checks import require_right
from benchmarks.ops.timing import time_us
from benchmarks.report import Measurement, Skipped, environment, print_report
from qnext.kernels.experts.reference import experts_reference
from qnext.kernels.experts.torch import experts_torch
from qnext.kernels.experts.triton_fwd import experts_triton

# Measured on an H100 80GB HBM3: a device-to-device copy, and a large bf16 product.
BYTES_PER_S = 3.0e12
FLOPS_PER_S = 760e12
ERROR_LIMIT = 1e-2  # as in the op's tests
# The reference visits all experts with copies of all rows: more would take longer than the timing.
MAX_CHECKED_TOKENS = 4096
BACKENDS: dict[str, Callable[..., torch.Tensor]] = {
    "torch": experts_torch,
    "triton": experts_triton,
}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of one mixture; the defaults are the flagship's."""

    num_experts: int = 512
    num_active: int = 10
    width: int = 512
    size: int = 2048


def draw_weights(shape: Shape, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    """Random gate_up [E, 2I, C] and down [E, C, I], bf16, scaled so that outputs stay near 1."""
    gate_up = torch.empty(
        shape.num_experts, 2 * shape.width, shape.size, device=device, dtype=torch.bfloat16
    ).normal_(std=shape.size**-0.5)
    down = torch.empty(
        shape.num_experts, shape.size, shape.width, device=device, dtype=torch.bfloat16
    ).normal_(std=shape.width**-0.5)
    return gate_up, down


def draw_inputs(
    num_tokens: int, shape: Shape, weights: tuple[torch.Tensor, torch.Tensor]
) -> Inputs:
    """Random rows, and experts that a router of random logits would choose."""
    device = weights[0].device
    x = torch.randn(num_tokens, shape.size, device=device, dtype=torch.bfloat16)
    logits = torch.randn(num_tokens, shape.num_experts, device=device)
    top_weights, top_ids = logits.softmax(-1).topk(shape.num_active, dim=-1)
    return x, *weights, top_weights / top_weights.sum(-1, keepdim=True), top_ids


def forward_limit_us(inputs: Inputs, saves_pre: bool = False) -> float:
    """The larger of bytes over bandwidth and flops over their rate, from the routing at hand.

    The weights of the experts that have a token are read once, x, ids and router weights too, and
    the output, with saves_pre also gate and up of each pair, is written once.
    """
    x, gate_up, down, top_weights, top_ids = inputs
    num_used = int(top_ids.unique().numel())
    item, per_expert = x.element_size(), gate_up[0].numel() + down[0].numel()
    num_bytes = num_used * per_expert * item + 2 * x.numel() * item
    num_bytes += top_weights.numel() * top_weights.element_size() + top_ids.numel() * 8
    num_bytes += top_ids.numel() * gate_up.shape[1] * item if saves_pre else 0
    return _limit_us(num_bytes, 2 * top_ids.numel() * per_expert)


def backward_limit_us(inputs: Inputs) -> float:
    """As `forward_limit_us`: all experts' gradients are written, those of idle ones as zeros."""
    x, gate_up, down, _, top_ids = inputs
    num_used = int(top_ids.unique().numel())
    item, per_expert = x.element_size(), gate_up[0].numel() + down[0].numel()
    num_bytes = (num_used + gate_up.shape[0]) * per_expert * item + 3 * x.numel() * item
    num_bytes += top_ids.numel() * gate_up.shape[1] * item
    return _limit_us(num_bytes, 4 * top_ids.numel() * per_expert)


def _limit_us(num_bytes: int, num_flops: int) -> float:
    return 1e6 * max(num_bytes / BYTES_PER_S, num_flops / FLOPS_PER_S)


def results(
    function: Callable[..., torch.Tensor], inputs: Inputs, trains: bool
) -> list[torch.Tensor]:
    """Output, and where it trains the gradients of a sum with fixed weights."""
    leaves = [tensor.detach().requires_grad_(trains) for tensor in inputs[:4]]
    out = function(*leaves, inputs[4])
    if not trains:
        return [out]
    goal = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, goal)]


def check(inputs: Inputs, trains: bool) -> None:
    """Refuse to time a backend that is wrong.

    Raises:
        ValueError: by how much.
    """
    wide = tuple(tensor.float() for tensor in inputs[:4])
    expected = results(experts_reference, (*wide[:4], inputs[4]), trains)  # type: ignore[arg-type]
    for backend, function in BACKENDS.items():
        what = f"{backend}, {inputs[0].shape[0]} tokens, {'gradients' if trains else 'output'}"
        require_right(what, results(function, inputs, trains), expected, ERROR_LIMIT)


def measure(
    all_tokens: Sequence[int], train_tokens: Sequence[int], num_repeats: int, shape: Shape
) -> tuple[list[Measurement], list[Skipped]]:
    """Forward at all_tokens, and forward with backward at train_tokens, of both backends."""
    weights = draw_weights(shape)
    found: list[Measurement] = []
    skipped: list[Skipped] = []
    for trains, tokens_list in ((False, all_tokens), (True, train_tokens)):
        work = "forward + backward" if trains else "forward"
        for num_tokens in sorted({min(size, MAX_CHECKED_TOKENS) for size in tokens_list}):
            check(draw_inputs(num_tokens, shape, weights), trains)
            torch.cuda.empty_cache()
        for num_tokens in tokens_list:
            inputs = draw_inputs(num_tokens, shape, weights)
            limit = forward_limit_us(inputs, trains)
            limit += backward_limit_us(inputs) if trains else 0
            for backend, function in BACKENDS.items():
                name = f"{work}, {num_tokens} tokens, {backend}"
                try:
                    values = time_us(_run(function, inputs, trains), num_repeats, not trains)
                except torch.OutOfMemoryError as fault:
                    skipped.append(Skipped(name, str(fault).splitlines()[0]))
                    continue
                finally:
                    torch.cuda.empty_cache()
                each = Measurement(
                    name,
                    "us",
                    values,
                    baseline=None if backend == "torch" else f"{work}, {num_tokens} tokens, torch",
                    labels={"work": work, "tokens": str(num_tokens), "backend": backend},
                )
                note = f"limit {limit:,.0f} us, {100 * limit / each.median:.0f} % of it reached"
                found.append(Measurement(**{**vars(each), "note": note}))
    return found, skipped


def _run(
    function: Callable[..., torch.Tensor], inputs: Inputs, trains: bool
) -> Callable[[], object]:
    if not trains:

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:4]]
    grad = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(function(*leaves, inputs[4]), leaves, grad)


def main() -> None:
    """Parse, measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 256, 1024, 4096, 32768])
    parser.add_argument("--train-tokens", type=int, nargs="*", default=[4096, 32768])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    found, skipped = measure(options.tokens, options.train_tokens, options.repeats, Shape())
    print_report(found, environment(torch.get_num_threads()), skipped)


if __name__ == "__main__":
    main()
