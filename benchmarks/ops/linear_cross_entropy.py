"""Linear head and cross-entropy, forward and backward, beside the torch backend.

    python -m benchmarks.ops.linear_cross_entropy

Flagship head (C 2048, W 151936), bf16. The limit is that of the three products alone, at 760
TFLOP/s; the share is of that rate. Loss and gradients are checked first, on fewer tokens and words;
nothing is timed if one is wrong. Memory is the peak of a step above what it began with.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.ops.checks import require_right
from qnext.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from qnext.kernels.linear_cross_entropy.torch import linear_cross_entropy_torch
from qnext.kernels.linear_cross_entropy.triton_fwd import (
    linear_cross_entropy_triton,
    loss_fwd,
    rows_per_chunk,
)

FLOPS_PER_MS = 760e9  # a large bf16 product on an H100
BYTES_PER_MS = 3.0e9
C, W = 2048, 151936
TOKENS = (4096, 8192)
Z_WEIGHT = 1e-5
ERROR_LIMIT = 2e-2
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
BACKENDS = {"triton": linear_cross_entropy_triton, "torch": linear_cross_entropy_torch}


def draw(num_tokens: int, num_words: int = W) -> Inputs:
    """Hidden rows, a head and targets, a tenth of them left out."""
    hidden = torch.randn(num_tokens, C, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(num_words, C, device="cuda", dtype=torch.bfloat16) * C**-0.5
    targets = torch.randint(0, num_words, (num_tokens,), device="cuda")
    targets[::10] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def step(
    function: Callable[..., tuple[torch.Tensor, ...]], inputs: Inputs
) -> tuple[torch.Tensor, ...]:
    """Loss and both gradients."""
    total, _, _ = function(*inputs, Z_WEIGHT)
    return total, *torch.autograd.grad(total, inputs[:2])


def milliseconds(call: Callable[[], object], num_runs: int = 12) -> float:
    """Median over runs after two to warm up."""
    times = []
    for _ in range(num_runs + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def peak_bytes(call: Callable[[], object]) -> int:
    """Most memory held during a call, above what was held before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def check(backends: Sequence[str]) -> None:
    """Refuse to time a backend that is wrong.

    Raises:
        ValueError: by how much.
    """
    inputs = draw(300, 20001)
    expected = step(linear_cross_entropy_reference, inputs)
    for name in backends:
        require_right(name, step(BACKENDS[name], inputs), expected, ERROR_LIMIT)


def loss_kernel_ms(num_tokens: int) -> tuple[float, float, int]:
    """Time of the loss kernel on one chunk, its limit (read once, written once), and its rows."""
    rows = min(num_tokens, rows_per_chunk(num_tokens, W, 2))
    logits = torch.randn(rows, W, device="cuda", dtype=torch.bfloat16)
    losses = torch.empty(2, rows, device="cuda")
    targets = torch.randint(0, W, (rows,), device="cuda")
    time = milliseconds(lambda: loss_fwd(logits, targets, losses, Z_WEIGHT, has_grad=True))
    return time, 2 * logits.nbytes / BYTES_PER_MS, rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a line per size and backend, and all of them as JSON last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=list(BACKENDS))
    args = parser.parse_args(argv)
    check(args.backends)
    print(f"{torch.cuda.get_device_name()}, C {C}, W {W}, bf16, forward and backward")
    record = {}
    for num_tokens in args.tokens:
        time, least, rows = loss_kernel_ms(num_tokens)
        print(f"T {num_tokens}: loss kernel, {rows} rows: {time:.3f} ms, limit {least:.3f}")
        limit = 3 * 2 * num_tokens * C * W / FLOPS_PER_MS
        for name in args.backends:
            call = partial(step, BACKENDS[name], draw(num_tokens))
            time, memory = milliseconds(call), peak_bytes(call)
            print(
                f"T {num_tokens}  {name:<7} {time:7.2f} ms   limit {limit:6.2f}   "
                f"{limit / time:4.0%} of 760 TFLOP/s   peak {memory / 2**20:6.0f} MiB"
            )
            record[f"{name} {num_tokens}"] = {"ms": time, "limit_ms": limit, "peak": memory}
            del call
    print(json.dumps(record))


if __name__ == "__main__":
    main()
