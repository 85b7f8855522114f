"""Gated Attention between its projections over paged keys, beside the time that its bytes need.

    python -m benchmarks.ops.paged_attention
    python -m benchmarks.ops.paged_attention --sweep    # other cuts than the chosen one

Flagship heads (16 query, 2 key, of 256), bf16. Each case is captured many times in one CUDA graph,
on pages that take turns so that L2 holds none of them when their turn comes; a time is that of a
replay divided by the number of calls. The page table allows --max-context, as an engine's would.
Output and caches are checked first, on shorter contexts; nothing is timed if one is wrong.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.ops.checks import require_right
from benchmarks.ops.timing import graph_time
from qnext.kernels.paged_attention_window import triton_fwd
from qnext.kernels.paged_attention_window.reference import (
    HeadWeights,
    Window,
    paged_attention_window_reference,
)
from qnext.kernels.paged_attention_window.triton_fwd import paged_attention_window_triton

BYTES_PER_US = 3.0e6  # a large copy on an H100, bytes read and written
ERROR_LIMIT = 1e-2  # as in the op's tests
HQ, HKV, D, R = 16, 2, 256, 64
CASES = ((1, 1024), (8, 1024), (32, 1024), (128, 1024), (1, 32768), (8, 32768), (1, 131072))
WINDOWS = (1, 2, 4)
# More than four times what L2 holds.
ROTATED_BYTES = 220e6
# Calls in one replay, so that its start is no part of the time.
MIN_CALLS = 24
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlapped": {"use_pdl": True},
    "fixed 512": {"keys_per_split": 512},
}
SWEEP = {"NUM_PROGRAMS": (132, 264, 396), "MIN_KEYS": (64, 128, 256), "NUM_STAGES": (3, 4)}


@dataclass(frozen=True)
class Inputs:
    """One pool of keys and values, and windows on different pages of it."""

    fused: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    weights: HeadWeights
    windows: tuple[Window, ...]

    def calls(self, **options: Any) -> list[Callable[[], torch.Tensor]]:
        """One call per window."""
        return [
            partial(
                paged_attention_window_triton, self.fused, self.k_cache, self.v_cache,
                self.weights, window, scale=D**-0.5, **options,
            )
            for window in self.windows
        ]  # fmt: skip


def num_bytes(num_seqs: int, context: int, max_window: int) -> int:
    """Keys and values read and written, rows read and written, bf16."""
    cached = num_seqs * (context + max_window) * 2 * HKV * D
    rows = num_seqs * max_window * (3 * HQ + 2 * HKV) * D
    return 2 * (cached + rows)


def draw(num_seqs: int, context: int, max_window: int, page_size: int, max_context: int) -> Inputs:
    """Random rows and keys; every window has shuffled pages of its own."""
    used = -(-(context + max_window) // page_size)
    num_windows = max(2, int(ROTATED_BYTES // num_bytes(num_seqs, context, max_window)) + 1)
    num_pages = num_windows * num_seqs * used
    k_cache = torch.empty(num_pages * page_size, HKV, D, device="cuda", dtype=torch.bfloat16)
    k_cache.normal_()
    v_cache = torch.empty_like(k_cache).normal_()
    tables = torch.zeros(
        num_windows, num_seqs, max(used, -(-max_context // page_size)),
        dtype=torch.int32, device="cuda",
    )  # fmt: skip
    shuffled = torch.randperm(num_pages, device="cuda").int()
    tables[:, :, :used] = shuffled.view(num_windows, num_seqs, used)
    contexts = torch.full((num_seqs,), context, dtype=torch.int32, device="cuda")
    query_lens = torch.full_like(contexts, max_window)
    positions = torch.arange(context + max_window, device="cuda", dtype=torch.float32)
    angles = positions[:, None] * 1e7 ** -(torch.arange(0, R, 2, device="cuda") / R)
    norms = torch.randn(2, D, device="cuda", dtype=torch.bfloat16) * 0.1
    fused = torch.randn(
        num_seqs * max_window, 2 * (HQ + HKV) * D, device="cuda", dtype=torch.bfloat16
    )
    weights = HeadWeights(norms[0], norms[1], 1e-6, angles.cos(), angles.sin())
    windows = tuple(Window(table, contexts, query_lens, page_size) for table in tables)
    return Inputs(fused, k_cache, v_cache, weights, windows)


def check(modes: dict[str, dict[str, Any]] = MODES) -> None:
    """Refuse to time a kernel that is wrong.

    Raises:
        ValueError: by how much.
    """
    inputs = draw(3, 1000, 2, 64, 2048)
    caches = inputs.k_cache, inputs.v_cache
    before = [cache.clone() for cache in caches]

    def results(call: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        """Output, and what the call changed in the caches: whole, they would hide a wrong row."""
        for cache, old in zip(caches, before, strict=True):
            cache.copy_(old)
        out = call()
        changes = (new.float() - old.float() for new, old in zip(caches, before, strict=True))
        return [out, *changes]

    expected = results(
        lambda: paged_attention_window_reference(
            inputs.fused, *caches, inputs.weights, inputs.windows[0], scale=D**-0.5
        )
    )
    for name, options in modes.items():
        require_right(name, results(inputs.calls(**options)[0]), expected, ERROR_LIMIT)


def measure_sweep(inputs: Inputs) -> dict[str, float]:
    """Times with other constants than the module's, each checked first."""
    times = {}
    chosen = {name: getattr(triton_fwd, name) for name in SWEEP}
    try:
        for values in itertools.product(*SWEEP.values()):
            for name, value in zip(SWEEP, values, strict=True):
                setattr(triton_fwd, name, value)
            label = "/".join(map(str, values))
            check({label: {}})
            times[label] = graph_time(inputs.calls(), min_calls=MIN_CALLS)
    finally:
        for name, value in chosen.items():
            setattr(triton_fwd, name, value)
    return times


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a line per case, and all of them as JSON last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--max-context", type=int, default=135168, help="the page table's")
    parser.add_argument("--windows", type=int, nargs="+", default=list(WINDOWS), help="Q")
    parser.add_argument("--sweep", action="store_true", help="/".join(SWEEP))
    args = parser.parse_args(argv)
    check()
    print(f"{torch.cuda.get_device_name()}, page_size {args.page_size}; us per call")
    record = {}
    for max_window, (num_seqs, context) in itertools.product(args.windows, CASES):
        inputs = draw(num_seqs, context, max_window, args.page_size, args.max_context)
        limit = num_bytes(num_seqs, context, max_window) / BYTES_PER_US
        if args.sweep:
            times = measure_sweep(inputs)
        else:
            times = {
                name: graph_time(inputs.calls(**options), min_calls=MIN_CALLS)
                for name, options in MODES.items()
            }
        name = f"{num_seqs} x {context}, Q {max_window}"
        cells = "   ".join(f"{mode} {time:7.1f}" for mode, time in times.items())
        print(f"{name:<18} limit {limit:6.1f}   {cells}   {limit / min(times.values()):5.0%}")
        record[name] = {"limit": limit, **times}
        del inputs
        torch.cuda.empty_cache()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
