"""What the benchmarks of few rows run: products and mixtures of the flagship, and their timing.

Each op is captured many times in one CUDA graph, on weights that take turns so that L2 holds none
of them when its turn comes; a time is that of a replay divided by the number of calls.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from qnext.kernels.experts_rows.reference import ExpertScales, experts_rows_reference
from qnext.kernels.experts_rows.triton_config import RowsTile
from qnext.kernels.experts_rows.triton_fwd import experts_rows_fwd
from qnext.kernels.experts_rows.triton_tiles import sum_slots, tile_down, tile_up
from qnext.kernels.fp8_blocks import DTYPE, scale_shape
from qnext.kernels.norm_router.triton_fwd import norm_router_fwd
from qnext.kernels.row_linear.reference import row_linear_reference
from qnext.kernels.row_linear.triton_fwd import RowTile, row_linear_fwd

BYTES_PER_US = 3.0e6  # a large copy on an H100, bytes read and written
C, E, I, A, W = 2048, 512, 512, 10, 151936
ROWS: tuple[int, ...] = (1, 2, 4, 8, 16)
QUICK_ROWS = (1, 2, 8, 16)
# More than four times what L2 holds.
ROTATED_BYTES = 220e6
# Calls in one replay, so that its start is no part of the time.
EPS = 1e-6
BF16 = torch.bfloat16
DEVICE = "cuda"
# Outputs and columns of the flagship's products, with a norm, with a residual.
PRODUCTS = {
    "in_proj": (12352, 2048, True, False),
    "qkv_proj": (9216, 2048, True, False),
    "out_proj": (2048, 4096, False, True),
    "head": (W, 2048, True, False),
}


@dataclass(frozen=True)
class Line:
    """One row of the table: what ran, its least number of bytes, and microseconds per call."""

    name: str
    num_rows: int
    num_bytes: float
    times: dict[str, float]

    def show(self) -> str:
        """Times beside the limit, and the limit as a part of the best of them."""
        limit = self.num_bytes / BYTES_PER_US
        cells = "".join(f"{name} {time:8.1f}   " for name, time in self.times.items())
        best = min(self.times.values())
        head = f"{self.name:<16} T {self.num_rows:>2}   limit {limit:7.1f}   "
        return head + cells + f"{limit / best:5.0%}"


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> torch.Tensor:
    """Normal values on the GPU, 64 million at a time: fp32 drafts of whole weights are large."""
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    for part in out.view(-1).split(1 << 26):
        part.copy_(torch.randn(part.shape, device=DEVICE) * scale)
    return out


def block_scales(weight: torch.Tensor) -> torch.Tensor:
    """Scales that make e4m3 normal values those of an initialised weight."""
    return torch.full(scale_shape(weight.shape), 0.02, device=DEVICE)


def num_copies(num_bytes: float, least: int = 4) -> int:
    """Copies of a weight that together outgrow L2."""
    return max(least, int(ROTATED_BYTES // num_bytes) + 1) if num_bytes < ROTATED_BYTES else 2


@dataclass(frozen=True)
class ProductCalls:
    """One product at one number of rows.

    Attributes:
        weights: one per turn, with its scales where it is e4m3.
        run: ours, of a weight.
        reference: the same in plain PyTorch.
        num_bytes: read and written at least.
    """

    weights: list[tuple[torch.Tensor, ...]]
    run: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    num_bytes: float


def product_calls(name: str, num_rows: int, *, is_fp8: bool = False) -> ProductCalls:
    """Draw the flagship's product of this name."""
    num_outputs, size, has_norm, has_residual = PRODUCTS[name]
    num_bytes = num_outputs * size * (1 if is_fp8 else 2)
    x, norm_weight = random(num_rows, size), random(size, scale=0.1)
    residual = random(num_rows, num_outputs) if has_residual else None
    out_dtype = torch.float32 if name == "head" else BF16
    weights: list[tuple[torch.Tensor, ...]] = []
    for _ in range(num_copies(num_bytes)):
        weight = random(num_outputs, size, dtype=DTYPE if is_fp8 else BF16, scale=0.02)
        weights.append((weight, block_scales(weight)) if is_fp8 else (weight,))

    def run(
        weight: torch.Tensor,
        scale: torch.Tensor | None = None,
        *,
        use_pdl: bool = False,
        use_dot: bool | None = None,
        tile: RowTile | None = None,
    ) -> torch.Tensor:
        return row_linear_fwd(
            x,
            weight,
            norm_weight if has_norm else None,
            residual,
            scale,
            eps=EPS,
            out_dtype=out_dtype,
            use_dot=use_dot,
            use_pdl=use_pdl,
            tile=tile,
        )

    def reference(weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        norm = norm_weight if has_norm else None
        return row_linear_reference(
            x, weight, norm, residual, scale, eps=EPS, out_dtype=torch.float32
        )

    out_bytes = num_rows * num_outputs * (4 if name == "head" else 2 * (1 + has_residual))
    return ProductCalls(weights, run, reference, num_bytes + out_bytes + x.numel() * 2)


class Mixture:
    """The weights of one layer's mixture, with rows and choices that take turns."""

    def __init__(self, is_fp8: bool = False) -> None:
        dtype = DTYPE if is_fp8 else BF16
        scale = 1.0 if is_fp8 else 0.02
        self.element_bytes = 1 if is_fp8 else 2
        self.gate_up = random(E, 2 * I, C, dtype=dtype, scale=scale)
        self.down = random(E, C, I, dtype=dtype, scale=scale)
        copies = num_copies(3 * I * C * self.element_bytes)
        self.shared = [
            (random(2 * I, C, dtype=dtype, scale=scale), random(C, I, dtype=dtype, scale=scale))
            for _ in range(copies)
        ]
        self.gates = [(random(E, C, scale=0.02), random(1, C, scale=0.02)) for _ in range(copies)]
        self.norm_weight = random(C, scale=0.1)
        self.scales = None
        if is_fp8:
            each = (self.gate_up, self.down, *self.shared[0])
            self.scales = ExpertScales(*(block_scales(weight) for weight in each))
        self.counters = torch.zeros(max(ROWS), dtype=torch.int32, device=DEVICE)

    def route(
        self,
        x: torch.Tensor,
        turn: int,
        *,
        fuses: bool = True,
        use_pdl: bool = False,
        cut: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Norm and choice of a turn's gate."""
        return norm_router_fwd(  # type: ignore[return-value]
            x,
            self.norm_weight,
            EPS,
            *self.gates[turn],
            top_k=A,
            norm_topk_prob=True,
            counters=self.counters if fuses else None,
            use_pdl=use_pdl,
            cut=cut,
        )

    def mix(
        self,
        x: torch.Tensor,
        routing: tuple[torch.Tensor, ...],
        turn: int,
        *,
        use_pdl: bool = False,
        tile: RowsTile | None = None,
    ) -> torch.Tensor:
        """Experts of a turn."""
        normed, top_weights, top_ids, shared_logit = routing
        return experts_rows_fwd(
            normed,
            self.gate_up,
            self.down,
            *self.shared[turn],
            top_weights=top_weights,
            top_ids=top_ids,
            shared_logit=shared_logit,
            residual=x,
            scales=self.scales,
            use_pdl=use_pdl,
            tile=tile,
        )

    def mix_reference(
        self, x: torch.Tensor, routing: tuple[torch.Tensor, ...], turn: int
    ) -> torch.Tensor:
        """Experts of a turn in plain PyTorch, in fp32."""
        normed, top_weights, top_ids, shared_logit = routing
        return experts_rows_reference(
            normed,
            self.gate_up,
            self.down,
            *self.shared[turn],
            top_weights=top_weights,
            top_ids=top_ids,
            shared_logit=shared_logit,
            residual=x.float(),
            scales=self.scales,
        )

    def kernels(
        self,
        x: torch.Tensor,
        routing: tuple[torch.Tensor, ...],
        turn: int,
        tile: RowsTile,
    ) -> list[Callable[[], torch.Tensor]]:
        """The launches of a turn's experts, each on inputs that are there already."""
        normed, top_weights, top_ids, shared_logit = routing
        shared_up, shared_down = self.shared[turn]
        weights = (self.gate_up, self.down, shared_up, shared_down)
        hidden = random(x.shape[0], A + 1, I)
        products = random(x.shape[0], A + 1, C, dtype=torch.float32)
        down = (hidden, self.down, shared_down, top_ids, self.scales, tile)
        return [
            partial(tile_up, normed, weights, top_ids, self.scales, tile, use_pdl=False),
            partial(tile_down, *down, use_pdl=False),
            partial(sum_slots, products, top_weights, shared_logit, x, use_pdl=False),
        ]

    def num_bytes(self, routings: Sequence[tuple[torch.Tensor, ...]]) -> float:
        """Bytes of the distinct experts, the mean over turns, and of the shared one."""
        distinct = statistics.mean(len(routing[2].unique()) for routing in routings)
        return (distinct + 1) * 3 * I * C * self.element_bytes
