"""How experts are cut for few rows, and the sizes that all kernels of the op take."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from qnext.kernels.fp8_blocks import BLOCK
from qnext.kernels.gpu_decode import overlap_options

# gate_up, down, shared_gate_up, shared_down
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class RowsTile:
    """How an expert is cut where all rows read it once.

    Attributes:
        BN: hidden channels per program of the first kernel, gate and up of each.
        BK: columns of gate_up at once.
        up_warps, up_stages: of the first kernel.
        BO: output channels per program of the second kernel.
        BD: columns of down at once.
        down_warps, down_stages: of the second kernel.
    """

    BN: int
    BK: int
    up_warps: int
    up_stages: int
    BO: int
    BD: int
    down_warps: int
    down_stages: int


def rows_tile(C: int, width: int, element_bytes: int) -> RowsTile:
    """Cut by shape: several programs and 100 to 150 KB in flight on each SM.

    A block of e4m3 has one scale, so a step is a block's columns.
    """
    if element_bytes == 4:
        tile = RowsTile(16, 32, 4, 2, 16, 32, 4, 2)
    elif element_bytes == 2:
        tile = RowsTile(32, 128, 2, 4, 64, 128, 4, 3)
    else:
        tile = RowsTile(64, BLOCK, 4, 4, 64, BLOCK, 4, 3)
    channels, columns = triton.next_power_of_2(C), triton.next_power_of_2(width)
    return RowsTile(
        max(16, min(tile.BN, columns)),
        max(16, min(tile.BK, channels)),
        tile.up_warps,
        tile.up_stages,
        max(16, min(tile.BO, channels)),
        max(16, min(tile.BD, columns)),
        tile.down_warps,
        tile.down_stages,
    )


def common_options(
    down: torch.Tensor, shared_down: torch.Tensor | None, num_active: int, use_pdl: bool
) -> dict[str, Any]:
    """Sizes that all kernels of the op take, and how they are launched."""
    _, C, I = down.shape
    IS = 0 if shared_down is None else shared_down.shape[1]
    return {
        "C": C,
        "I": I,
        "IS": IS,
        "A": num_active,
        "SLOTS": num_active + (IS > 0),
        "IH": max(I, IS),
        "BLOCK_SIZE": BLOCK,
        **overlap_options(use_pdl),
    }
