"""Measure tiles of the grouped products on this GPU and write the best to the op's table.

    python -m benchmarks.ops.tune_experts --tokens 16 64 256 1024 4096 32768

Each number of tokens is one entry; entries of other shapes and numbers of tokens stay as they are.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.ops.experts import Inputs, Shape, draw_inputs, draw_weights, time_us
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
from qnext.kernels.experts.triton_products import multiply_rows, multiply_up
from qnext.kernels.experts.triton_sort import sort_pairs

SHARED_BYTES = 227 * 1024  # of one program, on Hopper
AnyTile = TypeVar("AnyTile", Tile, WeightTile)


def row_tiles(block_m: int, num_weights: int) -> list[Tile]:
    """Candidates of a product over rows, whose step reads num_weights blocks of weights."""
    if block_m <= 32:
        sizes = itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 5))
    elif block_m == 64:
        sizes = itertools.product((64, 128, 256), (64, 128), (4, 8), (3, 4))
    else:
        sizes = itertools.product((64, 128, 256), (64,), (4, 8), (3, 4))
    tiles = [Tile(*size) for size in sizes]
    return [tile for tile in tiles if _is_sane(block_m, tile, num_weights)]


def _is_sane(block_m: int, tile: Tile, num_weights: int) -> bool:
    """Fits in shared memory and registers, and keeps enough bytes on the way."""
    columns = tile.block_n * num_weights
    step_bytes = 2 * tile.block_k * (block_m + columns)
    flying = step_bytes * (tile.num_stages - 1)
    sums = block_m * columns / (32 * tile.num_warps)  # registers of a thread
    is_enough = flying >= 48 * 1024 and columns * tile.block_k >= 4096
    return step_bytes * tile.num_stages <= SHARED_BYTES and sums <= 128 and is_enough


def weight_tiles() -> list[WeightTile]:
    """Candidates of the weight gradients."""
    blocks = ((128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8))
    return [
        WeightTile(block_m, block_n, block_k, num_warps, num_stages)
        for block_m, block_n, num_warps in blocks
        for block_k in (32, 64)
        for num_stages in (3, 4, 5)
    ]


def fastest(
    run: Callable[[AnyTile], object], tiles: Iterable[AnyTile], num_repeats: int, captures: bool
) -> tuple[float, AnyTile]:
    """Median microseconds of the best tile, and that tile.

    Raises:
        ValueError: none of them could run.
    """
    times: list[tuple[float, AnyTile]] = []
    for tile in tiles:
        try:
            times.append(
                (statistics.median(time_us(partial(run, tile), num_repeats, captures)), tile)
            )
        except OutOfResources:
            continue
    if not times:
        raise ValueError("no candidate fits this GPU")
    return min(times, key=lambda entry: entry[0])


def tune(
    inputs: Inputs, block_m: int, trains: bool, num_repeats: int
) -> tuple[float, ExpertsConfig]:
    """Microseconds of the forward products, and the best tiles for this block_m."""
    x, gate_up, down, top_weights, top_ids = inputs
    num_experts, num_active = down.shape[0], top_ids.shape[1]
    default = default_config(x.shape[0], num_active, num_experts, True)
    config = replace(HALF_CONFIGS[block_m], weight_grad=default.weight_grad)
    # Long runs hide their launches, and a graph would keep their outputs.
    timing = (num_repeats, x.shape[0] < 4096)
    table = sort_pairs(top_ids, num_experts, block_m)

    def up_product(tile: Tile, saves_pre: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        return multiply_up(x, gate_up, table, num_active, block_m, tile, saves_pre)

    up_us, up = fastest(up_product, row_tiles(block_m, 2), *timing)
    hidden, pre = up_product(up, trains)
    down_us, down_tile = fastest(
        lambda tile: multiply_rows(hidden, down, table, block_m, tile),
        row_tiles(block_m, 1),
        *timing,
    )
    config = replace(config, up=up, down=down_tile)
    if trains:
        _, hidden_tile = fastest(
            lambda tile: hidden_grad(x, down, top_weights, pre, table, block_m, tile),
            row_tiles(block_m, 1),
            *timing,
        )
        _, input_tile = fastest(
            lambda tile: multiply_rows(pre, gate_up, table, block_m, tile, is_transposed=True),
            row_tiles(block_m, 1),
            *timing,
        )
        _, weight_tile = fastest(
            lambda tile: weight_grad(pre, x, gate_up, table, num_active, tile, gathers_left=False),
            weight_tiles(),
            *timing,
        )
        config = replace(
            config, hidden_grad=hidden_tile, input_grad=input_tile, weight_grad=weight_tile
        )
    return up_us + down_us, config


def main() -> None:
    """Parse, measure, write the table, print what was chosen."""
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
    shape = Shape()
    weights = draw_weights(shape)
    name = torch.cuda.get_device_name()
    key = table_key(name, shape.num_experts, shape.width, shape.size, torch.bfloat16)
    for num_tokens in options.tokens:
        inputs = draw_inputs(num_tokens, shape, weights)
        rule = default_config(num_tokens, shape.num_active, shape.num_experts, True)
        sizes = sorted(HALF_CONFIGS)
        middle = sizes.index(rule.block_m)
        tried = sizes[max(0, middle - options.neighbours) : middle + options.neighbours + 1]
        trains = num_tokens >= options.train_from
        results = [tune(inputs, block_m, trains, options.repeats) for block_m in tried]
        time, config = min(results, key=lambda result: result[0])
        data = json.loads(TABLE_PATH.read_text(encoding="utf-8"))
        entries = {**data.get(key, {}), str(num_tokens): to_data(config)}
        data[key] = dict(sorted(entries.items(), key=lambda entry: int(entry[0])))
        TABLE_PATH.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"{key}, {num_tokens} tokens: products {time:,.0f} us, {config}", flush=True)


if __name__ == "__main__":
    main()
