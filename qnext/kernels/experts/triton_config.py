"""Tile sizes of the grouped products: measured ones from tuned.json, else a rule by shape."""

import json
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE_PATH = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Tile:
    """One grouped product's columns and depth per step, and how its program is compiled.

    Attributes:
        is_persistent: take the kernel of `gluon_products.py`, where it can run.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    is_persistent: bool = False


@dataclass(frozen=True)
class WeightTile:
    """A weight gradient's tile: rows and columns of the weight, and rows of x per step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpertsConfig:
    """Tiles of all products of the op, for one shape and range of tokens.

    Attributes:
        block_m: rows of a tile, shared by all products over rows.
        up: x by gate and up; block_n counts columns of each of the two.
        down: hidden by down.
        hidden_grad: gradient of the output by down, transposed.
        input_grad: gradient of gate and up, by gate and up transposed.
        weight_grad: gradients of both weights.
    """

    block_m: int
    up: Tile
    down: Tile
    hidden_grad: Tile
    input_grad: Tile
    weight_grad: WeightTile


# Below some 256 rows to an expert the time of a weight gradient is that of writing it, and several
# small programs share a multiprocessor. Above, large blocks. The rows' indices take stages too.
FEW_ROWS_WEIGHT_TILE = WeightTile(128, 128, 64, 4, 3)
MANY_ROWS_WEIGHT_TILE = WeightTile(128, 256, 64, 8, 5)
MANY_ROWS = 256

# By rows of a tile. Up to 32 rows the time is that of reading weights: deep steps, and two programs
# to a multiprocessor. From 64 rows on warpgroups multiply.
HALF_CONFIGS = {
    16: ExpertsConfig(
        16,
        up=Tile(64, 128, 4, 4),
        down=Tile(128, 128, 4, 4),
        hidden_grad=Tile(64, 128, 4, 4),
        input_grad=Tile(128, 128, 4, 4),
        weight_grad=WeightTile(128, 128, 16, 4, 3),
    ),
    32: ExpertsConfig(
        32,
        up=Tile(64, 64, 4, 5),
        down=Tile(128, 64, 4, 5),
        hidden_grad=Tile(64, 64, 4, 5),
        input_grad=Tile(128, 64, 4, 5),
        weight_grad=WeightTile(128, 128, 32, 4, 3),
    ),
    64: ExpertsConfig(
        64,
        up=Tile(64, 64, 4, 4),
        down=Tile(128, 64, 4, 4),
        hidden_grad=Tile(128, 64, 4, 4),
        input_grad=Tile(128, 64, 4, 4),
        weight_grad=FEW_ROWS_WEIGHT_TILE,
    ),
    128: ExpertsConfig(
        128,
        up=Tile(128, 64, 8, 4),
        down=Tile(256, 64, 8, 4),
        hidden_grad=Tile(128, 64, 8, 4),
        input_grad=Tile(256, 64, 8, 4),
        weight_grad=FEW_ROWS_WEIGHT_TILE,
    ),
}
# fp32 multiplies outside the tensor cores, from registers: small tiles.
_FLOAT_TILE = Tile(32, 32, 4, 2)
_FLOAT_CONFIG = ExpertsConfig(
    32,
    *(_FLOAT_TILE,) * 4,
    weight_grad=WeightTile(32, 32, 32, 4, 2),
)
# The one configuration of products whose rows must not depend on their company.
STABLE_ROWS = 16


def default_config(
    num_tokens: int, num_active: int, num_experts: int, is_half: bool
) -> ExpertsConfig:
    """The rule: one tile should hold almost every expert's rows, so that weights are read once.

    Under even routing an expert's rows are about Poisson distributed; two and a half deviations
    above the mean leave one expert in a hundred with a second tile.
    """
    if not is_half:
        return _FLOAT_CONFIG
    mean_rows = num_tokens * num_active / num_experts
    rows = mean_rows + 2.5 * math.sqrt(mean_rows)
    config = HALF_CONFIGS[next((size for size in (16, 32, 64) if rows <= size), 128)]
    if mean_rows < MANY_ROWS:
        return config
    return replace(config, weight_grad=MANY_ROWS_WEIGHT_TILE)


def stable_config(is_half: bool) -> ExpertsConfig:
    """The configuration that `row_stable` takes for any number of tokens."""
    return HALF_CONFIGS[STABLE_ROWS] if is_half else _FLOAT_CONFIG


def table_key(device_name: str, num_experts: int, width: int, size: int, dtype: torch.dtype) -> str:
    """Name of one shape in the table, such as "H100 E512 I512 C2048 bfloat16"."""
    family = re.search(r"\b[A-Z]{1,3}\d+[A-Z]*\b", device_name)
    name = family.group(0) if family else device_name
    return f"{name} E{num_experts} I{width} C{size} {str(dtype).removeprefix('torch.')}"


def to_data(config: ExpertsConfig) -> dict[str, Any]:
    """As `from_data` reads it: lists of numbers in the order of the fields."""
    parts = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        name: part if isinstance(part, int) else list(asdict(part).values())
        for name, part in parts.items()
    }


def from_data(data: dict[str, Any]) -> ExpertsConfig:
    """A configuration from one entry of the table."""
    return ExpertsConfig(
        data["block_m"],
        Tile(*data["up"]),
        Tile(*data["down"]),
        Tile(*data["hidden_grad"]),
        Tile(*data["input_grad"]),
        WeightTile(*data["weight_grad"]),
    )


@cache
def _table() -> dict[str, dict[int, ExpertsConfig]]:
    data = json.loads(TABLE_PATH.read_text(encoding="utf-8"))
    return {
        key: {int(tokens): from_data(entry) for tokens, entry in entries.items()}
        for key, entries in data.items()
    }


@cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def config_for(
    x: torch.Tensor, num_active: int, num_experts: int, width: int, row_stable: bool
) -> ExpertsConfig:
    """The configuration for rows x [T, C]: that of the nearest measured T, or the rule.

    Nearest is meant as a ratio. The last entry serves all larger numbers, the first none below half
    of its own.
    """
    num_tokens, is_half = x.shape[0], x.dtype != torch.float32
    if row_stable:
        return stable_config(is_half)
    entries: dict[int, ExpertsConfig] = {}
    if x.device.type == "cuda":
        name = _device_name(x.device.index or 0)
        entries = _table().get(table_key(name, num_experts, width, x.shape[1], x.dtype), {})
    if entries and 2 * num_tokens >= min(entries):
        return entries[min(entries, key=lambda tokens: abs(math.log(tokens / num_tokens)))]
    return default_config(num_tokens, num_active, num_experts, is_half)
