"""Attention of training, forward and backward, by the kernels that PyTorch has for it.

    python -m benchmarks.ops.attention

Flagship heads (16 queries, 2 keys and values, D 256), bf16, one document. `sdpa` is what a long
lone document takes; `varlen` is what several take, with the bounds of this one and room for more,
see `--rooms`. Output and gradients are compared with the reference's first, on fewer tokens;
nothing is timed if one is wrong. The share is of 989 TFLOP/s, with 2.5 times the forward's products
in a backward and half of each for the mask.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.ops.checks import require_right
from benchmarks.ops.timing import kernel_times, time_us
from benchmarks.report import Measurement, environment, print_report
from qnext.kernels.attention.reference import attention_reference
from qnext.kernels.attention.torch import MANY_TOKENS, attention_torch

FLOPS_PER_US = 989e6
NUM_QUERIES, NUM_KEYS, HEAD_DIM = 16, 2, 256
SCALE = HEAD_DIM**-0.5
CHECKED_TOKENS = 4611
ERROR_LIMIT = 2e-2


def draw(num_tokens: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and the output's gradient. [T, H, 256]"""
    heads = (NUM_QUERIES, NUM_KEYS, NUM_KEYS, NUM_QUERIES)
    drawn = [
        torch.randn(num_tokens, count, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        for count in heads
    ]
    return *(x.requires_grad_() for x in drawn[:3]), drawn[3]


def bounds_of(num_tokens: int, room: int) -> torch.Tensor:
    """Of one document, and empty ones behind it up to `room`. [room + 1]"""
    bounds = torch.full((room + 1,), num_tokens, dtype=torch.int32, device="cuda")
    bounds[0] = 0
    return bounds


def forward(inputs: Sequence[torch.Tensor], bounds: torch.Tensor) -> torch.Tensor:
    """The output alone."""
    q, k, v, goal = inputs
    with torch.no_grad():
        return attention_torch(q, k, v, bounds, goal.shape[0], SCALE)


def step(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], bounds: torch.Tensor
) -> list[torch.Tensor]:
    """Output and the three gradients."""
    *taken, goal = inputs
    out = function(*taken, bounds, goal.shape[0], SCALE)
    return [out, *torch.autograd.grad(out, taken, goal)]


def check(room: int) -> None:
    """Refuse to time what is wrong.

    Raises:
        ValueError: of what, and by how much.
    """
    inputs = draw(CHECKED_TOKENS)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    expected = step(attention_reference, wide, bounds_of(CHECKED_TOKENS, 1))
    found = step(attention_torch, inputs, bounds_of(CHECKED_TOKENS, room))
    for name, ours, theirs in zip(("output", "q", "k", "v"), found, expected, strict=True):
        require_right(f"room {room}: {name}", ours, theirs, ERROR_LIMIT)


def measure(lengths: Sequence[int], rooms: Sequence[int], repeats: int) -> list[Measurement]:
    """Forward alone, and forward with backward, for every length and room."""
    found = []
    for num_tokens in lengths:
        flops = 2 * num_tokens**2 * NUM_QUERIES * HEAD_DIM  # of a forward under the mask
        for room in rooms:
            given = draw(num_tokens), bounds_of(num_tokens, room)
            runs: dict[str, tuple[Callable[[], object], float]] = {
                "forward": (partial(forward, *given), 1.0),
                "both": (partial(step, attention_torch, *given), 3.5),
            }
            is_public = room == 1 and num_tokens >= MANY_TOKENS
            way = "sdpa" if is_public else f"varlen, room {room}"
            for kind, (run, factor) in runs.items():
                times = time_us(run, repeats, captures=False)
                share = factor * flops / statistics.median(times) / FLOPS_PER_US
                name = kernel_times(run, 1)[0][0][:60]
                labels = {"tokens": str(num_tokens), "way": way, "kind": kind}
                note = f"{share:.0%} of 989 TFLOP/s; longest kernel {name}"
                found.append(
                    Measurement(f"{num_tokens} {way} {kind}", "us", times, note=note, labels=labels)
                )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--rooms", nargs="+", type=int, default=[1, 8, 512])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    for room in options.rooms:
        check(room)
    found = measure(options.lengths, options.rooms, options.repeats)
    print_report(found, environment(torch.get_num_threads()))


if __name__ == "__main__":
    main()
