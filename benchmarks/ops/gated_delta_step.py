"""DeltaNet's decode step on a GPU: microseconds per launch beside the time its bytes need.

    python -m benchmarks.ops.gated_delta_step [--kernel gluon triton] [--warps 4 8]
        [--ahead 0 264] [--state-dtype bfloat16] [--pdl] [--seqs 1 256]

Launches run in one CUDA graph and go round layers that are, together, several times the size of
the second cache, so that no state is still there when it is read again.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from qnext.kernels.gated_delta_step import triton_fwd
from qnext.kernels.gated_delta_step.inputs import StepMemory, StepRows, StepWeights
from qnext.kernels.gated_delta_step.reference import gated_delta_step_reference

MEMORY_BYTES_PER_S = 3.0e12  # measured copy rate of an H100, bytes read plus bytes written
HK, HV, K, V, WIDTH, RING = 16, 32, 128, 128, 4, 32
CHANNELS = 2 * HK * K + HV * V
ROTATED_BYTES = 256 * 2**20  # five times the second cache
MIN_LAUNCHES = 64  # per graph
REPEATS = 20
AIMS_US = {1: 8, 16: 30, 64: 98, 256: 390}  # of single rows with fp32 states


@dataclass(frozen=True)
class Case:
    """Sequences, rows of each, and rows that each replays first."""

    num_seqs: int
    num_rows: int
    num_pending: int

    def bytes_moved(self, dtype: torch.dtype, state_dtype: torch.dtype) -> int:
        """Fewest bytes of one launch: each input read once, each output written once."""
        states = 2 * HV * K * V * state_dtype.itemsize
        ring_row = CHANNELS + 2 * HV
        past = (WIDTH - 1) * CHANNELS + self.num_pending * ring_row
        new = self.num_rows * (CHANNELS + HV * V + 2 * HV)  # fused
        written = self.num_rows * (ring_row + HV * V)  # ring and heads
        lengths = 4 * 4
        per_seq = states + (past + new + written) * dtype.itemsize + lengths
        weights = (CHANNELS * WIDTH + V) * dtype.itemsize + 2 * HV * 4
        return self.num_seqs * per_seq + weights


CASES = tuple(
    Case(n, num_rows, num_pending)
    for num_rows, num_pending in ((1, 0), (2, 0), (2, 1), (4, 3))
    for n in (1, 16, 64, 256)
)


@dataclass(frozen=True)
class Layer:
    """Everything one launch reads."""

    fused: torch.Tensor
    weights: StepWeights
    memory: StepMemory
    rows: StepRows


def make_layer(case: Case, dtype: torch.dtype, state_dtype: torch.dtype) -> Layer:
    """Random rows and memory of one layer on the GPU; the first slot is no sequence's."""

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float32, device="cuda").to(dtype)

    n = case.num_seqs

    def ints(values: torch.Tensor) -> torch.Tensor:
        return values.to(device="cuda", dtype=torch.int32)

    return Layer(
        fused=random(n * case.num_rows, CHANNELS + HV * V + 2 * HV),
        weights=StepWeights(
            conv1d=random(CHANNELS, WIDTH),
            A_log=random(HV, dtype=torch.float32),
            dt_bias=random(HV, dtype=torch.float32),
            norm=random(V),
            norm_eps=1e-6,
        ),
        memory=StepMemory(
            random(n + 1, RING, CHANNELS + 2 * HV), random(n + 1, HV, K, V, dtype=state_dtype)
        ),
        rows=StepRows(
            state_slots=ints(torch.randperm(n) + 1),
            query_lens=ints(torch.full((n,), case.num_rows)),
            context_lens=ints(torch.randint(RING, 1024, (n,))),
            num_pending=ints(torch.full((n,), case.num_pending)),
        ),
    )


def check(
    dtype: torch.dtype, state_dtype: torch.dtype, launch: Callable[..., torch.Tensor]
) -> None:
    """Refuse to time a kernel that is wrong."""
    layer = make_layer(Case(3, 2, 1), dtype, state_dtype)
    reason = triton_fwd.supports(layer.fused, layer.weights, layer.memory, layer.rows)
    if reason:
        raise ValueError(f"the kernel cannot run: {reason}")
    memory = StepMemory(layer.memory.conv_ring.clone(), layer.memory.states.clone())
    expected = gated_delta_step_reference(layer.fused, layer.weights, memory, layer.rows)
    heads = launch(layer.fused, layer.weights, layer.memory, layer.rows)
    pairs = ((heads, expected), (layer.memory.states, memory.states))
    for ours, reference in pairs:
        error = float((ours.double() - reference.double()).norm() / reference.double().norm())
        if not error < 1e-2:
            raise ValueError(f"error {error} against the reference, limit 1e-2: nothing is timed")


def time_us(layers: Sequence[Layer], launch: Callable[..., torch.Tensor]) -> list[float]:
    """Microseconds per launch of each replay of a graph that goes round the layers."""
    rounds = -(-MIN_LAUNCHES // len(layers))

    def run() -> None:
        for _ in range(rounds):
            for layer in layers:
                launch(layer.fused, layer.weights, layer.memory, layer.rows)

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * len(layers)))
    return times


def registers() -> list[tuple[str, int, int, int]]:
    """Kernel, warps, registers and spilled bytes of every compiled variant."""
    functions = {"triton": triton_fwd.gated_delta_step_fwd_kernel}
    if triton_fwd.HAS_GLUON:
        functions["gluon"] = triton_fwd.gluon_fwd.gated_delta_step_gluon_kernel
    return sorted(
        {
            (name, kernel.metadata.num_warps, kernel.n_regs, kernel.n_spills)
            for name, function in functions.items()
            for caches in function.device_caches.values()
            for kernel in caches[0].values()
        }
    )


def time_case(
    case: Case,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    launch: Callable[..., torch.Tensor],
    name: str,
) -> dict[str, float]:
    """Time one case and print its line."""
    limit = case.bytes_moved(dtype, state_dtype) / MEMORY_BYTES_PER_S * 1e6
    state_bytes = case.num_seqs * HV * K * V * state_dtype.itemsize
    count = max(4, -(-ROTATED_BYTES // state_bytes))
    times = time_us([make_layer(case, dtype, state_dtype) for _ in range(count)], launch)
    median = statistics.median(times)
    aim = AIMS_US.get(case.num_seqs, "") if case.num_rows == 1 else ""
    print(
        f"{case.num_seqs:>4} {case.num_rows:>2} {case.num_pending:>8} {name:>16} "
        f"{median:>8.2f} {limit:>7.2f} {limit / median:>6.0%} {aim}",
        flush=True,
    )
    return {"us": median, "limit_us": limit, "spread_us": max(times) - min(times)}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description="Time DeltaNet's decode step on a GPU.")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--state-dtype", default="float32")
    parser.add_argument("--kernel", nargs="*", choices=("gluon", "triton"), default=["gluon"])
    parser.add_argument("--warps", type=int, nargs="*", help="numbers of warps; else the default")
    parser.add_argument(
        "--ahead",
        type=int,
        nargs="*",
        default=[0],
        help="programs ahead whose state is called into the second cache (Gluon only)",
    )
    parser.add_argument("--pdl", action="store_true", help="programmatic dependent launch")
    parser.add_argument("--seqs", type=int, nargs="*", help="numbers of sequences; else all")
    args = parser.parse_args(argv)
    dtype, state_dtype = getattr(torch, args.dtype), getattr(torch, args.state_dtype)
    results = []
    print("variant: kernel/warps/ahead")
    print(
        f"{'N':>4} {'Q':>2} {'replayed':>8} {'variant':>16} {'µs':>8} {'limit':>7} {'of it':>6} aim"
    )
    variants = itertools.product(args.kernel, args.warps or [None], args.ahead)
    for kernel, num_warps, num_ahead in variants:
        if kernel == "triton" and num_ahead:
            continue
        options = {"kernel": kernel, "num_warps": num_warps, "num_ahead": num_ahead}
        launch = partial(triton_fwd.gated_delta_step_fwd, use_pdl=args.pdl, **options)
        check(dtype, state_dtype, launch)
        name = f"{kernel}/{num_warps or 'default'}/{num_ahead}"
        for case in CASES:
            if case.num_seqs in (args.seqs or [case.num_seqs]):
                timing = time_case(case, dtype, state_dtype, launch, name)
                results.append({**vars(case), **options, **timing})
    print("kernel, warps, registers, spilled bytes:", registers())
    device = torch.cuda.get_device_name()
    shared = {"dtype": args.dtype, "state_dtype": args.state_dtype, "pdl": args.pdl}
    print(json.dumps({"op": "gated_delta_step", "device": device, **shared, "cases": results}))


if __name__ == "__main__":
    main()
