"""Gated delta rule on a GPU, forward and with its backward, beside fla where it is installed.

    python -m benchmarks.ops.gated_delta_rule --lengths 8192 32768 131072

Flagship heads (16 of keys, 32 of values, K = V = 128), bf16: one sequence of each length, and 16
packed sequences of 2048, also among bounds for 512 as a training batch has them. The error is
checked first, on a shorter length and against the chunks in float64; above its limit, nothing is
timed.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.ops import checks
from benchmarks.ops.timing import kernel_times
from benchmarks.report import Measurement, Skipped, environment, print_report
from qnext.kernels.gated_delta_rule.torch import gated_delta_rule_torch
from qnext.kernels.gated_delta_rule.triton_fwd import gated_delta_rule_triton
from qnext.train.batches import SEGMENT_COUNTS

HK, HV, K, V = 16, 32, 128, 128
PACKED = (2048,) * 16
ROOM = SEGMENT_COUNTS[-1]  # sequences that a training batch of many has bounds for
CHECKED = (700, 1, 64, 300)
ERROR_LIMIT = 1.2e-2
# Measured on an H100 80GB HBM3: a device-to-device copy.
BYTES_PER_S = 3.0e12
Rule = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Lengths of packed sequences, 0 for one that is not there, and whether gradients are taken."""

    lengths: tuple[int, ...]
    has_backward: bool

    @property
    def name(self) -> str:
        """As it stands in the table."""
        present = len(self.lengths) - self.lengths.count(0)
        count = f"{present} x " if present > 1 else ""
        room = f", room for {len(self.lengths)}" if 0 in self.lengths else ""
        pass_name = "forward + backward" if self.has_backward else "forward"
        return f"{pass_name}, {count}{self.lengths[0]}{room}"


def cases(lengths: Sequence[int]) -> Iterator[Case]:
    """Every length as one sequence, then the packed ones; each without and with gradients."""
    padded = PACKED + (0,) * (ROOM - len(PACKED))
    for packed in [*((length,) for length in lengths), PACKED, padded]:
        for has_backward in (False, True):
            yield Case(packed, has_backward)


def draw_inputs(
    lengths: Sequence[int], dtype: torch.dtype = torch.bfloat16
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v, g, beta with half-lives of 4 tokens and more, and the bounds."""
    num_tokens = sum(lengths)
    q, k = (torch.randn(num_tokens, HK, K, device="cuda") for _ in range(2))
    v = torch.randn(num_tokens, HV, V, device="cuda")
    g = -torch.rand(num_tokens, HV, device="cuda") * torch.logspace(-4, -0.8, HV, device="cuda")
    beta = torch.rand(num_tokens, HV, device="cuda")
    halves = [F.normalize(q, dim=-1) * K**-0.5, F.normalize(k, dim=-1), v]
    bounds = torch.tensor((0, *lengths)).cumsum(0).to("cuda", torch.int32)
    return [*(x.to(dtype) for x in halves), g, beta], bounds


def ours(*tokens: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """This package's kernels."""
    return gated_delta_rule_triton(*tokens, cu_seqlens=bounds)[0]


def in_chunks(*tokens: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """The reference: the chunked form in PyTorch, exact in float64."""
    return gated_delta_rule_torch(*tokens, cu_seqlens=bounds)[0]


def peer() -> tuple[Rule | None, str]:
    """fla's kernels in our signature, or why they don't run."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as problem:
        return None, f"fla: {problem}"

    def fla(*tokens: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        q, k, v, g, beta = (x[None] for x in tokens)
        result = chunk_gated_delta_rule(
            q, k, v, g, beta, scale=1.0, cu_seqlens=bounds if bounds.shape[0] > 2 else None
        )
        out: torch.Tensor = result[0][0]
        return out

    return fla, ""


def results(
    rule: Rule, tokens: Sequence[torch.Tensor], bounds: torch.Tensor, has_backward: bool
) -> list[torch.Tensor]:
    """Output, and gradients of a sum with fixed weights."""
    leaves = [x.detach().clone().requires_grad_(has_backward) for x in tokens]
    out = rule(*leaves, bounds=bounds)
    if not has_backward:
        return [out]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


def largest_error(rule: Rule, has_backward: bool) -> float:
    """Largest relative error among output and gradients; NaN where one is NaN."""
    tokens, bounds = draw_inputs(CHECKED)
    expected = results(in_chunks, [x.double() for x in tokens], bounds, has_backward)
    found = results(rule, tokens, bounds, has_backward)
    return checks.largest_error(found, expected)


def time_ms(run: Callable[[], object], repeats: int) -> tuple[float, ...]:
    """Milliseconds of each of `repeats` runs, by events, after a warm-up.

    A run is captured, so that the host's part of a launch does not count; what cannot be captured
    is timed as it is.
    """
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        call: Callable[[], object] = graph.replay
    except RuntimeError as problem:
        print(f"not captured: {str(problem).splitlines()[0]}", flush=True)
        torch.cuda.synchronize()
        call = run
    times = []
    for idx in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if idx >= 2:
            times.append(begin.elapsed_time(end))
    return tuple(times)


def runner(rule: Rule, case: Case) -> Callable[[], object]:
    """One call of the case; with gradients, of all five inputs."""
    tokens, bounds = draw_inputs(case.lengths)
    if not case.has_backward:
        return lambda: rule(*tokens, bounds=bounds)
    leaves = [x.requires_grad_() for x in tokens]
    dout = torch.randn_like(leaves[2])
    return lambda: torch.autograd.grad(rule(*leaves, bounds=bounds), leaves, dout)


def limit_ms(case: Case) -> float:
    """Time of reading each input and writing each result once; products take less."""
    tokens = sum(case.lengths)
    inputs = tokens * (2 * HK * K * 2 + HV * V * 2 + HV * 8)
    forward = inputs + tokens * HV * V * 2
    both = forward + 2 * inputs + tokens * HV * V * 2
    return 1e3 * (both if case.has_backward else forward) / BYTES_PER_S


def check(
    rules: dict[str, Rule], skipped: list[Skipped], *, has_peer_backward: bool
) -> set[tuple[str, bool]]:
    """Contenders whose results are right, without and with gradients."""
    right = set()
    for name, rule in rules.items():
        for has_backward in (False, True):
            if has_backward and name == "fla" and not has_peer_backward:
                continue
            what = f"{name}, {'gradients' if has_backward else 'output'}"
            try:
                error = largest_error(rule, has_backward)
            except RuntimeError as problem:  # fla refuses gradients on some GPUs
                skipped.append(Skipped(what, str(problem).splitlines()[0]))
                continue
            print(f"{what}: largest relative error {error:.1e}", flush=True)
            if error <= ERROR_LIMIT:
                right.add((name, has_backward))
            else:
                skipped.append(Skipped(what, f"error {error:.1e}, limit {ERROR_LIMIT}"))
    return right


def measure(
    lengths: Sequence[int], repeats: int, *, has_peer_backward: bool
) -> tuple[list[Measurement], list[Skipped]]:
    """Every case with every contender whose results are right."""
    fla, reason = peer()
    skipped = [] if fla else [Skipped("fla", reason)]
    rules: dict[str, Rule] = {"triton": ours, **({"fla": fla} if fla else {})}
    right = check(rules, skipped, has_peer_backward=has_peer_backward)
    found = []
    for case in cases(lengths):
        for name, rule in rules.items():
            if (name, case.has_backward) not in right or (name == "fla" and 0 in case.lengths):
                continue
            times = time_ms(runner(rule, case), repeats)
            limit = limit_ms(case)
            found.append(
                Measurement(
                    f"{case.name}: {name}",
                    "ms",
                    times,
                    baseline=None if name == "triton" else f"{case.name}: triton",
                    note=f"limit {limit:.2f} ms, {limit / statistics.median(times):.0%} of it",
                    labels={"case": case.name, "backend": name},
                )
            )
    return found, skipped


def print_profile(lengths: Sequence[int]) -> None:
    """Microseconds of each of our kernels, in every case."""
    for case in cases(lengths):
        print(f"\n{case.name}")
        for name, launches, spent in kernel_times(runner(ours, case)):
            print(f"{spent:10.1f} us  {launches:5.1f} launches  {name[:80]}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--peer-backward",
        action="store_true",
        help="try fla's gradients too: minutes of compilation and tuning, and refused on Hopper",
    )
    parser.add_argument(
        "--profile", action="store_true", help="the time of each of our kernels, nothing else"
    )
    options = parser.parse_args()
    if options.profile:
        print_profile(options.lengths)
        return
    found, skipped = measure(
        options.lengths, options.repeats, has_peer_backward=options.peer_backward
    )
    print_report(found, environment(torch.get_num_threads()), skipped)


if __name__ == "__main__":
    main()
