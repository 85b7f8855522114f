"""Kernels of a decode step for 1 to 16 rows, beside the time that their bytes need.

    python -m benchmarks.ops.rows                 # every op, without and with overlapping launches
    python -m benchmarks.ops.rows --quick         # bf16 products and mixtures, fewer rows
    python -m benchmarks.ops.rows --quick --only e4m3
    python -m benchmarks.ops.rows --kernels       # each launch of a mixture by itself
    python -m benchmarks.ops.rows --sweep         # other cuts than the ones chosen by shape

How they are timed is told in `rows_cases`. Each part is checked against its references before it is
timed, see `rows_checks`; the run ends where one is wrong.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.ops.rows_cases import (
    BF16,
    BYTES_PER_US,
    EPS,
    PRODUCTS,
    QUICK_ROWS,
    ROWS,
    A,
    C,
    E,
    I,
    Line,
    Mixture,
    W,
    product_calls,
    random,
)
from benchmarks.ops.rows_checks import check_mixture, check_product
from benchmarks.ops.rows_sweep import sweep
from benchmarks.ops.timing import graph_time
from qnext.kernels.experts_rows.triton_config import rows_tile
from qnext.kernels.row_argmax.reference import row_argmax_reference
from qnext.kernels.row_argmax.triton_fwd import row_argmax_fwd
from qnext.kernels.row_linear.triton_fwd import row_linear_fwd

# Choice in the launch of the logits or in one of its own, and other cuts of the former.
ROUTER_WAYS: dict[str, dict[str, object]] = {
    "one launch": {},
    "two": {"fuses": False},
    "one overlapped": {"use_pdl": True},
    "two overlapped": {"fuses": False, "use_pdl": True},
    "1 rows 1 warps": {"cut": (1, 1)},
    "2 rows 2 warps": {"cut": (2, 2)},
    "4 rows 4 warps": {"cut": (4, 4)},
}


def bench_products(
    is_fp8: bool, rows: Sequence[int] = ROWS, *, is_quick: bool = False
) -> Iterable[Line]:
    """Products, beside PyTorch's: with its norm as the op calls it, and F.linear alone."""
    for name, num_rows in itertools.product(PRODUCTS, rows):
        calls = product_calls(name, num_rows, is_fp8=is_fp8)
        ways: dict[str, dict[str, bool]] = {"ours": {}}
        if not is_quick:
            ways["overlapped"] = {"use_pdl": True}
        if num_rows == 1 and not is_quick:
            ways["as dots"] = {"use_dot": True}
        check_product(f"{name} T {num_rows}", calls, ways)
        times = {
            label: graph_time([partial(calls.run, *w, **how) for w in calls.weights])
            for label, how in ways.items()
        }
        if not is_fp8:
            x = random(num_rows, calls.weights[0][0].shape[1])
            times["F.linear"] = graph_time([partial(F.linear, x, w[0]) for w in calls.weights])
        yield Line(name + (" e4m3" if is_fp8 else ""), num_rows, calls.num_bytes, times)


def bench_mixture(
    mixture: Mixture, label: str, rows: Sequence[int] = ROWS, *, is_quick: bool = False
) -> Iterable[Line]:
    """Router alone, experts alone, and the whole second half of a layer."""
    turns = range(len(mixture.gates))
    gate_bytes = (E + 1) * C * 2
    for num_rows in rows:
        check_mixture(mixture, num_rows, ROUTER_WAYS)
        xs = [random(num_rows, C) for _ in turns]
        routings = [mixture.route(xs[turn], turn) for turn in turns]
        num_bytes = mixture.num_bytes(routings)
        if not is_quick:
            yield Line(f"router{label}", num_rows, gate_bytes, router_times(mixture, xs))
        mix: dict[str, float] = {}
        for name, use_pdl in (("ours", False), ("overlapped", True)):
            mix_by = partial(mixture.mix, use_pdl=use_pdl)
            mix[name] = graph_time([partial(mix_by, xs[t], routings[t], t) for t in turns])
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


def router_times(mixture: Mixture, xs: Sequence[torch.Tensor]) -> dict[str, float]:
    """Each of ROUTER_WAYS."""
    return {
        name: graph_time([partial(mixture.route, x, t, **how) for t, x in enumerate(xs)])  # type: ignore[arg-type]
        for name, how in ROUTER_WAYS.items()
    }


def bench_kernels(mixture: Mixture, label: str, rows: Sequence[int] = ROWS) -> Iterable[Line]:
    """Each launch of a mixture by itself."""
    turns = range(len(mixture.gates))
    gate_bytes = (E + 1) * C * 2
    for num_rows in rows:
        check_mixture(mixture, num_rows, ROUTER_WAYS)
        xs = [random(num_rows, C) for _ in turns]
        routings = [mixture.route(xs[turn], turn) for turn in turns]
        num_bytes = mixture.num_bytes(routings)
        times = {"one launch": graph_time([partial(mixture.route, xs[t], t) for t in turns])}
        yield Line(f"router{label}", num_rows, gate_bytes, times)
        tile = rows_tile(C, I, mixture.element_bytes)
        kernels = [mixture.kernels(xs[t], routings[t], t, tile) for t in turns]
        up, down, added = (
            {"ours": graph_time([each[place] for each in kernels])} for place in range(3)
        )
        yield Line(f"up{label}", num_rows, num_bytes * 2 / 3, up)
        yield Line(f"down{label}", num_rows, num_bytes / 3, down)
        yield Line(f"sum{label}", num_rows, num_rows * (A + 1) * C * 4, added)


def bench_layers(mixture: Mixture) -> Iterable[Line]:
    """In-projection, out-projection and mixture in a chain, as in a layer without its mixer."""
    turns = range(12)
    in_projs = [random(12352, C, scale=0.02) for _ in turns]
    out_projs = [random(C, 2 * C, scale=0.02) for _ in turns]
    for num_rows in ROWS:
        # The chain's links: its own result is that of 12 layers, where small differences grow.
        for name in ("in_proj", "out_proj"):
            calls = product_calls(name, num_rows)
            check_product(name, calls, {"ours": {}, "overlapped": {"use_pdl": True}})
            del calls
        check_mixture(mixture, num_rows, {"ours": {}, "overlapped": {"use_pdl": True}})
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
        if not torch.equal(row_argmax_fwd(logits), row_argmax_reference(logits)):
            raise ValueError(f"argmax T {num_rows}: not the reference's: it is not timed")
        times = {
            "ours": graph_time([partial(row_argmax_fwd, logits)] * 16),
            "torch": graph_time([partial(logits.argmax, -1)] * 16),
        }
        yield Line("argmax", num_rows, logits.numel() * 4, times)


def parts_to_run(args: argparse.Namespace) -> dict[str, Callable[[], Iterable[Line]]]:
    """What the options ask for, by name; weights are made when a part begins."""
    rows = QUICK_ROWS if args.quick else ROWS
    if args.kernels:
        return {
            "kernels": lambda: bench_kernels(Mixture(), "", rows),
            "kernels e4m3": lambda: bench_kernels(Mixture(True), " e4m3", rows),
        }
    quick = {"is_quick": args.quick}
    parts: dict[str, Callable[[], Iterable[Line]]] = {
        "mixture": lambda: bench_mixture(Mixture(), "", rows, **quick),
        "products": lambda: bench_products(False, rows, **quick),
    }
    # Most of a short run is compiling, so e4m3 is part of it only where it is named.
    if not args.quick or "e4m3" in args.only:
        parts |= {
            "mixture e4m3": lambda: bench_mixture(Mixture(True), " e4m3", rows, **quick),
            "products e4m3": lambda: bench_products(True, rows, **quick),
        }
    if not args.quick:
        parts |= {"layers": lambda: bench_layers(Mixture()), "argmax": bench_argmax}
    return parts


def main() -> None:
    """Print the table, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="try other cuts instead")
    parser.add_argument("--quick", action="store_true", help="products and mixtures, fewer rows")
    parser.add_argument("--kernels", action="store_true", help="each launch of a mixture alone")
    parser.add_argument(
        "--only", default="", help="part of the names to run: products, mixture ..."
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "microseconds per call, torch", torch.__version__)
    if args.sweep:
        sweep(args.only)
        return
    lines: list[Line] = []
    for name, part in parts_to_run(args).items():
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
