"""Measure tiles of the grouped products on this GPU and write the best to the op's table.

    python -m benchmarks.ops.tune_experts --tokens 16 64 256 1024 4096 32768

Each number of tokens is one entry; entries of other shapes and numbers of tokens stay as they are.
All candidates are compiled first, by as many processes as there are cores. The experts are checked
against the reference before, and a candidate whose result is not that of the rule's own tile is
named and not timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from benchmarks.ops.checks import largest_error
from benchmarks.ops.compile_ahead import compile_ahead
from benchmarks.ops.experts import (
    ERROR_LIMIT,
    MAX_CHECKED_TOKENS,
    Inputs,
    Shape,
    check,
    draw_inputs,
    draw_weights,
)
from benchmarks.ops.timing import time_us
from qnext.kernels.experts.triton_bwd import hidden_grad, weight_grad
from qnext.kernels.experts.triton_config import (
    HALF_CONFIGS,
    TABLE_PATH,
    ExpertsConfig,
    Tile,
    WeightTile,
    default_config,
    table_key,
    to_data,
)
from qnext.kernels.experts.triton_products import HAS_GLUON, multiply_rows, multiply_up
from qnext.kernels.experts.triton_sort import PairTable, sort_pairs

if HAS_GLUON:
    from qnext.kernels.experts import gluon_products

SHARED_BYTES = 227 * 1024  # of one program, on Hopper
ROW_PRODUCTS = ("up", "down")
GRADS = ("hidden_grad", "input_grad")
AnyTile = TypeVar("AnyTile", Tile, WeightTile)

# Columns, depth, warps and stages. Few rows: many bytes on the way, or programs side by side.
_FEW_ROWS = (
    (32, 128, 4, 4), (32, 128, 4, 5), (32, 256, 4, 3), (64, 64, 4, 5), (64, 128, 4, 3),
    (64, 128, 4, 4), (64, 128, 8, 4), (64, 256, 8, 3), (128, 64, 4, 4), (128, 64, 8, 4),
    (128, 128, 4, 3), (128, 128, 8, 3), (128, 128, 8, 4),
)  # fmt: skip
_MANY_ROWS = (
    (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 64, 8, 4), (128, 64, 4, 3),
    (128, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3), (256, 64, 8, 3),
    (256, 64, 8, 4),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Rows, weights and their grouping for the products of one number of tokens and block_m."""

    inputs: Inputs
    table: PairTable
    block_m: int
    hidden: torch.Tensor  # [T * A, I]
    pre: torch.Tensor  # [T * A, 2I]


def row_tiles(product: str, block_m: int) -> list[Tile]:
    """Candidates of a product over rows."""
    num_weights = 2 if product == "up" else 1
    sizes = _FEW_ROWS if block_m <= 32 else _MANY_ROWS
    tiles = [
        tile for tile in (Tile(*size) for size in sizes) if is_sane(block_m, tile, num_weights)
    ]
    if product in ROW_PRODUCTS and block_m == 128 and HAS_GLUON:
        tiles += [Tile(256 // num_weights, 64, 8, stages, True) for stages in (3, 4)]
    return tiles


def is_sane(block_m: int, tile: Tile, num_weights: int) -> bool:
    """Fits in shared memory and registers, and keeps enough bytes on the way."""
    columns = tile.block_n * num_weights
    step_bytes = 2 * tile.block_k * (block_m + columns)
    flying = step_bytes * (tile.num_stages - 1)
    sums = block_m * columns / (32 * tile.num_warps)  # registers of a thread
    is_enough = flying >= 32 * 1024 and columns * tile.block_k >= 4096
    return step_bytes * tile.num_stages <= SHARED_BYTES and sums <= 128 and is_enough


def weight_tiles() -> list[WeightTile]:
    """Candidates of the weight gradients."""
    blocks = ((128, 128, 4), (128, 256, 8), (256, 128, 8))
    depths = ((32, 4), (32, 5), (64, 3), (64, 4), (64, 5))
    return [
        WeightTile(block_m, block_n, block_k, num_warps, num_stages)
        for block_m, block_n, num_warps in blocks
        for block_k, num_stages in depths
    ]


def run_product(case: Case, product: str, tile: AnyTile) -> object:
    """One product of a case."""
    x, gate_up, down, top_weights, top_ids = case.inputs
    num_active = top_ids.shape[1]
    if isinstance(tile, WeightTile):
        return weight_grad(case.pre, x, gate_up, case.table, num_active, tile, gathers_left=False)
    if product == "up":
        return multiply_up(x, gate_up, case.table, num_active, case.block_m, tile, False)
    if product == "down":
        return multiply_rows(case.hidden, down, case.table, case.block_m, tile)
    if product == "hidden_grad":
        return hidden_grad(x, down, top_weights, case.pre, case.table, case.block_m, tile)
    return multiply_rows(case.pre, gate_up, case.table, case.block_m, tile, is_transposed=True)


def launch_candidate(shape: Shape, product: str, block_m: int, tile: AnyTile) -> None:
    """Launch one candidate on small tensors of the CPU, for processes that only compile."""
    x = torch.empty(1, shape.size, dtype=torch.bfloat16)
    gate_up = x.new_empty(1, 2 * shape.width, shape.size)
    down = x.new_empty(1, shape.size, shape.width)
    ids = torch.zeros(1, shape.num_active, dtype=torch.int64)
    places = ids.new_zeros(shape.num_active, dtype=torch.int32)
    table = PairTable(places, places, places, places)
    inputs = (x, gate_up, down, torch.empty(1, shape.num_active), ids)
    hidden = x.new_empty(shape.num_active, shape.width)
    pre = x.new_empty(shape.num_active, 2 * shape.width)
    if isinstance(tile, Tile) and tile.is_persistent:
        # By name, since on a CPU the products choose other kernels.
        if product == "up":
            gluon_products.multiply_up(x, gate_up, table, shape.num_active, tile.num_stages, False)
        else:
            gluon_products.multiply_rows(hidden, down, table, tile.num_stages)
        return
    run_product(Case(inputs, table, block_m, hidden, pre), product, tile)


def candidates(
    block_ms: Sequence[int], train_block_ms: Sequence[int]
) -> list[tuple[str, int, Tile | WeightTile]]:
    """All that is to be compiled: product, rows of a tile, and tile."""
    found: list[tuple[str, int, Tile | WeightTile]] = []
    for products, sizes in ((ROW_PRODUCTS, block_ms), (GRADS, train_block_ms)):
        for product in products:
            for block_m in sizes:
                found += [(product, block_m, tile) for tile in row_tiles(product, block_m)]
    if train_block_ms:
        found += [("weight_grad", 0, tile) for tile in weight_tiles()]
    return found


def compared(result: object) -> list[torch.Tensor]:
    """What a product returns, as far as it does not depend on the tile."""
    if isinstance(result, torch.Tensor):
        return [result]
    assert isinstance(result, tuple), f"a product returned {type(result).__name__}"
    # The third of hidden_grad's is one part per block of columns.
    return [x.sum(-1) if place == 2 else x for place, x in enumerate(result)]


def fastest(
    run: Callable[[AnyTile], object],
    tiles: Iterable[AnyTile],
    usual: AnyTile,
    num_repeats: int,
    captures: bool,
) -> tuple[float, AnyTile]:
    """Median microseconds of the best tile, and that tile.

    Args:
        usual: the rule's tile, whose result the others must have.

    Raises:
        ValueError: none of them could run, or had that result.
    """
    expected = compared(run(usual))
    times: list[tuple[float, AnyTile]] = []
    for tile in tiles:
        try:
            error = largest_error(compared(run(tile)), expected)
            if not error < ERROR_LIMIT:
                print(f"not timed: {tile}: error {error:.1e}, limit {ERROR_LIMIT:.0e}", flush=True)
                continue
            times.append(
                (statistics.median(time_us(partial(run, tile), num_repeats, captures)), tile)
            )
        except (OutOfResources, PTXASError):
            continue
    if not times:
        raise ValueError("no candidate fits this GPU and is right")
    return min(times, key=lambda entry: entry[0])


def tune(
    inputs: Inputs, block_m: int, trains: bool, num_repeats: int
) -> tuple[float, ExpertsConfig]:
    """Microseconds of the forward products, and the best tiles for this block_m."""
    x, _, down, _, top_ids = inputs
    num_experts, _, width = down.shape
    num_pairs = top_ids.numel()
    default = default_config(x.shape[0], top_ids.shape[1], num_experts, True)
    config = replace(HALF_CONFIGS[block_m], weight_grad=default.weight_grad)
    case = Case(
        inputs,
        sort_pairs(top_ids, num_experts, block_m),
        block_m,
        hidden=x.new_empty(num_pairs, width).normal_(),
        pre=x.new_empty(num_pairs, 2 * width).normal_(),
    )
    # Long runs hide their launches, and a graph would keep their outputs.
    timing = (num_repeats, x.shape[0] < 4096)
    best: dict[str, tuple[float, Tile]] = {}
    for product in (*ROW_PRODUCTS, *(GRADS if trains else ())):
        run = partial(run_product, case, product)
        usual = getattr(config, product)
        best[product] = fastest(run, row_tiles(product, block_m), usual, *timing)
    config = replace(config, up=best["up"][1], down=best["down"][1])
    if trains:
        run = partial(run_product, case, "weight_grad")
        config = replace(
            config,
            hidden_grad=best["hidden_grad"][1],
            input_grad=best["input_grad"][1],
            weight_grad=fastest(run, weight_tiles(), config.weight_grad, *timing)[1],
        )
    return best["up"][0] + best["down"][0], config


def block_ms_of(num_tokens: int, shape: Shape, num_neighbours: int) -> list[int]:
    """Rows of a tile that are tried: the rule's and its neighbours."""
    rule = default_config(num_tokens, shape.num_active, shape.num_experts, True)
    sizes = sorted(HALF_CONFIGS)
    middle = sizes.index(rule.block_m)
    return sizes[max(0, middle - num_neighbours) : middle + num_neighbours + 1]


def main() -> None:
    """Parse, compile, measure, write the table, print what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, nargs="*", default=[16, 64, 256, 1024, 4096, 32768])
    parser.add_argument(
        "--train-from", type=int, default=4096, help="tokens from which gradients are tuned too"
    )
    parser.add_argument(
        "--neighbours", type=int, default=1, help="row blocks tried beside the rule's, on each side"
    )
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    shape, start = Shape(), time.perf_counter()
    tried = {tokens: block_ms_of(tokens, shape, options.neighbours) for tokens in options.tokens}
    trained = {tokens: sizes for tokens, sizes in tried.items() if tokens >= options.train_from}
    found = candidates(*(sorted(set(sum(each.values(), []))) for each in (tried, trained)))
    faults = compile_ahead(launch_candidate, [(shape, *candidate) for candidate in found])
    seconds = time.perf_counter() - start
    print(f"{len(found)} candidates compiled in {seconds:.0f} s", *faults, sep="\n", flush=True)
    weights = draw_weights(shape)
    name = torch.cuda.get_device_name()
    key = table_key(name, shape.num_experts, shape.width, shape.size, torch.bfloat16)
    for num_tokens, block_ms in tried.items():
        inputs = draw_inputs(num_tokens, shape, weights)
        trains = num_tokens in trained
        check(draw_inputs(min(num_tokens, MAX_CHECKED_TOKENS), shape, weights), trains)
        torch.cuda.empty_cache()
        results = [tune(inputs, block_m, trains, options.repeats) for block_m in block_ms]
        best_us, config = min(results, key=lambda result: result[0])
        data = json.loads(TABLE_PATH.read_text(encoding="utf-8"))
        entries = {**data.get(key, {}), str(num_tokens): to_data(config)}
        data[key] = dict(sorted(entries.items(), key=lambda entry: int(entry[0])))
        TABLE_PATH.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"{key}, {num_tokens} tokens: products {best_us:,.0f} us, {config}", flush=True)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
