"""Kernels of a decode step for 1 to 16 rows, beside the time that their bytes need.

    python -m benchmarks.ops.rows            # every op, without and with overlapping launches
    python -m benchmarks.ops.rows --sweep    # other cuts than the ones chosen by shape

Each op is captured many times in one CUDA graph, on weights that take turns so that L2 holds none
of them when its turn comes; a time is that of a replay divided by the number of calls.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from qnext.kernels.experts_rows.reference import ExpertScales
from qnext.kernels.experts_rows.triton_fwd import ExpertTile, experts_rows_fwd
from qnext.kernels.fp8_blocks import DTYPE, scale_shape
from qnext.kernels.norm_router.triton_fwd import norm_router_fwd
from qnext.kernels.row_argmax.triton_fwd import row_argmax_fwd
from qnext.kernels.row_linear.triton_fwd import RowTile, row_linear_fwd

BYTES_PER_US = 3.0e6  # a large copy on an H100, bytes read and written
C, E, I, A, W = 2048, 512, 512, 10, 151936
ROWS = (1, 2, 4, 8, 16)
# More than four times what L2 holds.
ROTATED_BYTES = 220e6
# Calls in one replay, so that its start is no part of the time.
MIN_CALLS = 48
EPS = 1e-6
BF16 = torch.bfloat16
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


def graph_time(calls: Sequence[Callable[[], object]], num_replays: int = 9) -> float:
    """Median microseconds per call, all of them captured in one CUDA graph."""
    for call in calls[:2]:
        call()
    calls = [*calls] * -(-MIN_CALLS // len(calls))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(num_replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[2:])


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> torch.Tensor:
    """Normal values on the GPU, 64 million at a time: fp32 drafts of whole weights are large."""
    out = torch.empty(shape, dtype=dtype, device="cuda")
    for part in out.view(-1).split(1 << 26):
        part.copy_(torch.randn(part.shape, device="cuda") * scale)
    return out


def block_scales(weight: torch.Tensor) -> torch.Tensor:
    """Scales that make e4m3 normal values those of an initialised weight."""
    return torch.full(scale_shape(weight.shape), 0.02, device="cuda")


def num_copies(num_bytes: float, least: int = 4) -> int:
    """Copies of a weight that together outgrow L2."""
    return max(least, int(ROTATED_BYTES // num_bytes) + 1) if num_bytes < ROTATED_BYTES else 2


def product_calls(
    name: str, num_rows: int, *, is_fp8: bool = False
) -> tuple[list[tuple[torch.Tensor, ...]], Callable[..., torch.Tensor], float]:
    """Weights that take turns, a function of one of them, and its bytes."""
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

    out_bytes = num_rows * num_outputs * (4 if name == "head" else 2 * (1 + has_residual))
    return weights, run, num_bytes + out_bytes + x.numel() * 2


def bench_products(is_fp8: bool) -> Iterable[Line]:
    """Products, beside F.linear on rows that are already normalised."""
    for name, num_rows in itertools.product(PRODUCTS, ROWS):
        if is_fp8 and name == "head":
            continue
        weights, run, num_bytes = product_calls(name, num_rows, is_fp8=is_fp8)
        times = {
            label: graph_time([partial(run, *w, use_pdl=use_pdl) for w in weights])
            for label, use_pdl in (("ours", False), ("overlapped", True))
        }
        if num_rows == 1:
            times["as dots"] = graph_time([partial(run, *w, use_dot=True) for w in weights])
        if not is_fp8:
            x = random(num_rows, weights[0][0].shape[1])
            times["F.linear"] = graph_time([partial(F.linear, x, w[0]) for w in weights])
        yield Line(name + (" e4m3" if is_fp8 else ""), num_rows, num_bytes, times)


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
        self.counters = torch.zeros(max(ROWS), dtype=torch.int32, device="cuda")

    def route(
        self, x: torch.Tensor, turn: int, *, fuses: bool = True, use_pdl: bool = False
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
        )

    def mix(
        self,
        x: torch.Tensor,
        routing: tuple[torch.Tensor, ...],
        turn: int,
        *,
        use_pdl: bool = False,
        tile: ExpertTile | None = None,
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

    def num_bytes(self, routings: Sequence[tuple[torch.Tensor, ...]]) -> float:
        """Bytes of the distinct experts, the mean over turns, and of the shared one."""
        distinct = statistics.mean(len(routing[2].unique()) for routing in routings)
        return (distinct + 1) * 3 * I * C * self.element_bytes


def bench_mixture(mixture: Mixture, label: str) -> Iterable[Line]:
    """Router alone, experts alone, and the whole second half of a layer."""
    turns = range(len(mixture.gates))
    gate_bytes = (E + 1) * C * 2
    for num_rows in ROWS:
        xs = [random(num_rows, C) for _ in turns]
        routings = [mixture.route(xs[turn], turn) for turn in turns]
        num_bytes = mixture.num_bytes(routings)
        route = {
            name: graph_time([partial(mixture.route, xs[t], t, **how) for t in turns])
            for name, how in {
                "one launch": {"fuses": True},
                "two": {"fuses": False},
                "one overlapped": {"use_pdl": True},
                "two overlapped": {"fuses": False, "use_pdl": True},
            }.items()
        }
        yield Line(f"router{label}", num_rows, gate_bytes, route)
        mix = {
            name: graph_time(
                [partial(mixture.mix, xs[t], routings[t], t, use_pdl=use_pdl) for t in turns]
            )
            for name, use_pdl in (("ours", False), ("overlapped", True))
        }
        yield Line(f"experts{label}", num_rows, num_bytes, mix)

        def whole(x: torch.Tensor, turn: int, fuses: bool, use_pdl: bool) -> object:
            routing = mixture.route(x, turn, fuses=fuses, use_pdl=use_pdl)
            return mixture.mix(x, routing, turn, use_pdl=use_pdl)

        times = {
            name: graph_time([partial(whole, xs[t], t, *how) for t in turns])
            for name, how in {
                "ours": (True, False),
                "overlapped": (True, True),
                "two, overlapped": (False, True),
            }.items()
        }
        yield Line(f"mixture{label}", num_rows, num_bytes + gate_bytes, times)


def bench_layers(mixture: Mixture) -> Iterable[Line]:
    """In-projection, out-projection and mixture in a chain, as in a layer without its mixer."""
    turns = range(12)
    in_projs = [random(12352, C, scale=0.02) for _ in turns]
    out_projs = [random(C, 2 * C, scale=0.02) for _ in turns]
    for num_rows in ROWS:
        x0 = random(num_rows, C)
        inner = random(num_rows, 2 * C)
        routings: list[tuple[torch.Tensor, ...]] = []

        def step(
            use_pdl: bool,
            x: torch.Tensor = x0,
            inner: torch.Tensor = inner,
            routings: list[tuple[torch.Tensor, ...]] = routings,
        ) -> torch.Tensor:
            routings.clear()
            how = {"eps": EPS, "out_dtype": BF16, "use_pdl": use_pdl}
            norm = mixture.norm_weight
            for turn in turns:
                row_linear_fwd(x, in_projs[turn], norm, None, None, **how)  # type: ignore[arg-type]
                x = row_linear_fwd(inner, out_projs[turn], None, x, None, **how)  # type: ignore[arg-type]
                routings.append(mixture.route(x, turn, use_pdl=use_pdl))
                x = mixture.mix(x, routings[-1], turn, use_pdl=use_pdl)
            return x

        step(False)
        num_bytes = mixture.num_bytes(routings) + (12352 + 2 * C + E + 1) * C * 2
        times = {
            name: graph_time([partial(step, use_pdl)]) / len(turns)
            for name, use_pdl in (("ours", False), ("overlapped", True))
        }
        yield Line("layer, no mixer", num_rows, num_bytes, times)


def bench_argmax() -> Iterable[Line]:
    """The likeliest token, beside torch.argmax; logits of the last product lie in L2."""
    for num_rows in ROWS:
        logits = random(num_rows, W, dtype=torch.float32)
        times = {
            "ours": graph_time([partial(row_argmax_fwd, logits)] * 16),
            "torch": graph_time([partial(logits.argmax, -1)] * 16),
        }
        yield Line("argmax", num_rows, logits.numel() * 4, times)


def sweep_products(is_fp8: bool) -> None:
    """Other cuts of the products, best first."""
    for name, num_rows in itertools.product(PRODUCTS, (1, 4, 16)):
        if is_fp8 and name == "head":
            continue
        weights, run, num_bytes = product_calls(name, num_rows, is_fp8=is_fp8)
        size = PRODUCTS[name][1]
        if num_rows == 1:
            cuts = itertools.product((1, 2, 4, 8, 16), (size, 1024), (2, 4, 8), (1,))
        else:
            columns = (128,) if is_fp8 else (128, 256, 512)
            cuts = itertools.product((16, 32, 64, 128), columns, (4, 8), (3, 4, 5, 6))
        results = []
        for cut in cuts:
            # Tiles that spill, and pipelines that outgrow shared memory.
            if num_rows == 1 and not 16 <= cut[0] * cut[1] // (32 * cut[2]) <= 128:
                continue
            if num_rows > 1 and (cut[0] + 16) * cut[1] * 2 * cut[3] > 210_000:
                continue
            tile = RowTile(*cut)
            time = graph_time([partial(run, *w, tile=tile) for w in weights], 5)
            results.append((time, tile))
        label = name + (" e4m3" if is_fp8 else "")
        show_sweep(f"{label} T {num_rows}, limit {num_bytes / BYTES_PER_US:.1f}", results)


def sweep_experts(mixture: Mixture, label: str) -> None:
    """Other cuts of the experts, best first."""
    turns = range(len(mixture.gates))
    for num_rows in (1, 8):
        xs = [random(num_rows, C) for _ in turns]
        routings = [mixture.route(xs[turn], turn) for turn in turns]
        results = []
        ups = [(2, C, 2), (2, C, 4), (4, C, 4), (4, C, 8), (8, C, 8), (4, 1024, 4), (8, 1024, 8)]
        downs = [(1, 512, 2), (1, 512, 4), (2, 512, 4), (2, 512, 8), (4, 512, 8), (4, 256, 4)]
        pairs = [(up, downs[2]) for up in ups] + [(ups[3], down) for down in downs]
        for up, down in pairs:
            tile = ExpertTile(*up, *down)
            time = graph_time(
                [partial(mixture.mix, xs[t], routings[t], t, tile=tile) for t in turns],
                5,
            )
            results.append((time, tile))
        limit = mixture.num_bytes(routings) / BYTES_PER_US
        show_sweep(f"experts{label} T {num_rows}, limit {limit:.1f}", results)


def show_sweep(
    title: str, results: list[tuple[float, RowTile]] | list[tuple[float, ExpertTile]]
) -> None:
    """The best six and the worst."""
    ordered = sorted(results, key=lambda pair: pair[0])
    print(title)
    for time, tile in (*ordered[:6], ordered[-1]):
        print(f"  {time:8.1f}  {tile}")


def main() -> None:
    """Print the table, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="try other cuts instead")
    parser.add_argument(
        "--only", default="", help="part of the names to run: products, mixture ..."
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    parts: dict[str, Callable[[], Iterable[Line] | None]] = {
        "products": lambda: sweep_products(False) if args.sweep else bench_products(False),
        "products e4m3": lambda: sweep_products(True) if args.sweep else bench_products(True),
        "mixture": lambda: (
            sweep_experts(Mixture(), "") if args.sweep else bench_mixture(Mixture(), "")
        ),
        "mixture e4m3": lambda: (
            sweep_experts(Mixture(True), " e4m3")
            if args.sweep
            else bench_mixture(Mixture(True), " e4m3")
        ),
        "layers": lambda: None if args.sweep else bench_layers(Mixture()),
        "argmax": lambda: None if args.sweep else bench_argmax(),
    }
    print(torch.cuda.get_device_name(), "microseconds per call, torch", torch.__version__)
    lines: list[Line] = []
    for name, part in parts.items():
        if args.only not in name:
            continue
        for line in part() or ():
            lines.append(line)
            print(line.show(), flush=True)
        torch.cuda.empty_cache()
    record = [
        {"name": x.name, "rows": x.num_rows, "limit_us": x.num_bytes / BYTES_PER_US, "us": x.times}
        for x in lines
    ]
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "lines": record}))


if __name__ == "__main__":
    main()
