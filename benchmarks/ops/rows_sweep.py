"""Other cuts of the kernels of few rows than those chosen by shape, best first.

A cut whose result is not the reference's is named and not timed.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.ops.checks import relative_error
from benchmarks.ops.rows_cases import (
    BYTES_PER_US,
    PRODUCTS,
    C,
    Mixture,
    product_calls,
    random,
)
from benchmarks.ops.rows_checks import ERROR_LIMIT
from benchmarks.ops.timing import graph_time
from qnext.kernels.experts_rows.triton_config import RowsTile
from qnext.kernels.row_linear.triton_fwd import RowTile


def sweep_products(is_fp8: bool) -> None:
    """Other cuts of the products, best first."""
    for name, num_rows in itertools.product(PRODUCTS, (1, 4, 16)):
        calls = product_calls(name, num_rows, is_fp8=is_fp8)
        expected = calls.reference(*calls.weights[0])
        size = PRODUCTS[name][1]
        if num_rows == 1:
            cuts = itertools.product((1, 2, 4, 8, 16), (size, 1024), (2, 4, 8), (1,))
        else:
            cuts = itertools.product((16, 32, 64), (128, 256, 512), (2, 4), (2, 3, 5, 8))
        results = []
        for cut in cuts:
            # Tiles that spill, and pipelines that outgrow shared memory.
            if num_rows == 1 and not 16 <= cut[0] * cut[1] // (32 * cut[2]) <= 128:
                continue
            if num_rows > 1 and (cut[0] * (1 if is_fp8 else 2) + 32) * cut[1] * cut[3] > 220_000:
                continue
            tile = RowTile(*cut)
            if not is_right(tile, calls.run(*calls.weights[0], tile=tile), expected):
                continue
            time = graph_time([partial(calls.run, *w, tile=tile) for w in calls.weights], 5)
            results.append((time, tile))
        label = name + (" e4m3" if is_fp8 else "")
        show_sweep(f"{label} T {num_rows}, limit {calls.num_bytes / BYTES_PER_US:.1f}", results)


def sweep_experts(mixture: Mixture, label: str) -> None:
    """Other cuts of the experts, best first."""
    turns = range(len(mixture.gates))
    for num_rows in (1, 2, 3, 4, 8, 16):
        xs = [random(num_rows, C) for _ in turns]
        routings = [mixture.route(xs[turn], turn) for turn in turns]
        # Without a residual, which is larger than the experts' sum and would hide its errors.
        alone = torch.zeros_like(xs[0])
        expected = mixture.mix_reference(alone, routings[0], 0)
        results = []
        for tile in tile_cuts(mixture.element_bytes):
            if not is_right(tile, mixture.mix(alone, routings[0], 0, tile=tile), expected):
                continue
            time = graph_time(
                [partial(mixture.mix, xs[t], routings[t], t, tile=tile) for t in turns], 5
            )
            results.append((time, tile))
        limit = mixture.num_bytes(routings) / BYTES_PER_US
        show_sweep(f"experts{label} T {num_rows}, limit {limit:.1f}", results)


def tile_cuts(element_bytes: int) -> list[RowsTile]:
    """Cuts of the tiled products; a step of e4m3 is a block's 128 columns."""
    if element_bytes == 1:
        ups = [(64, 128, 4, 4), (64, 128, 4, 3), (64, 128, 4, 5), (32, 128, 2, 4), (128, 128, 8, 3)]
        downs = [(64, 128, 4, 3), (64, 128, 4, 2), (32, 128, 2, 4), (128, 128, 4, 4)]
    else:
        ups = [(32, 128, 2, 4), (32, 128, 2, 3), (64, 128, 4, 3), (64, 128, 4, 4), (64, 64, 4, 5)]
        downs = [(64, 128, 4, 3), (64, 64, 4, 5), (128, 64, 4, 5), (32, 256, 4, 3)]
    cuts = [RowsTile(*up, *downs[0]) for up in ups]
    return cuts + [RowsTile(*ups[0], *down) for down in downs[1:]]


def is_right(tile: object, ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a cut may be timed; says so if not."""
    error = relative_error(ours, expected)
    if error < ERROR_LIMIT:
        return True
    print(f"not timed: {tile}: error {error:.1e}, limit {ERROR_LIMIT:.0e}")
    return False


def show_sweep(title: str, results: Sequence[tuple[float, object]]) -> None:
    """The best six and the worst."""
    ordered = sorted(results, key=lambda pair: pair[0])
    print(title)
    if not ordered:
        print("  no cut is right")
        return
    for time, tile in (*ordered[:6], ordered[-1]):
        print(f"  {time:8.1f}  {tile}")


def sweep(only: str) -> None:
    """Print the best cuts of each op whose name has `only` in it, and of each number of rows."""
    parts = {
        "products": lambda: sweep_products(False),
        "products e4m3": lambda: sweep_products(True),
        "mixture": lambda: sweep_experts(Mixture(), ""),
        "mixture e4m3": lambda: sweep_experts(Mixture(True), " e4m3"),
    }
    for name, part in parts.items():
        if only in name:
            part()
        torch.cuda.empty_cache()
