"""One AdamW step of one large parameter, beside its bytes and torch's fused AdamW.

    python -m benchmarks.ops.adamw

One layer's gate and up products of the flagship's experts, [512, 1024, 2048] in bf16, with moments
in 8 bits and in bf16. Weights and moments are compared with the reference's first, on a smaller
parameter; nothing is timed if one is wrong. The limit is the time of reading weight, gradient and
moments and writing weight and moments, each once, at 3.0 TB/s. torch's AdamW has bf16 moments too,
and rounds its weights to the nearest.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import torch

from benchmarks.ops.checks import require_right
from benchmarks.ops.timing import time_us
from benchmarks.report import Measurement, environment, print_report
from qnext.kernels.adamw.moments import AdamWRule, MomentKind, Moments
from qnext.kernels.adamw.reference import adamw_reference
from qnext.kernels.adamw.triton_fwd import adamw_triton

BYTES_PER_MS = 3.0e9  # a device-to-device copy on an H100 80GB HBM3
SHAPE = (512, 1024, 2048)
CHECKED_SHAPE = (3, 41, 256)
CHECKED_STEPS = 3
KINDS: tuple[MomentKind, ...] = ("8bit", "bfloat16")
# As in the op's tests: of what is kept in bf16, of scales in fp32, and the mean share of codes
# that fall on the other side of a border, by one.
HALF_LIMIT, SCALE_LIMIT, CODE_LIMIT = 4e-3, 1e-4, 0.02
RULE = AdamWRule(0.9, 0.95, 1e-8)
LR, DECAY = 3e-4, 0.1
DEVICE = "cuda"


def rates_of(step: int) -> torch.Tensor:
    """What a step leaves on the device, see `adamw_reference`. [7]"""
    rests = 1 - RULE.beta1**step, 1 - RULE.beta2**step
    values = [1.0, LR, LR * DECAY, 1 / rests[0], rests[1] ** -0.5, 1.0, step]
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def draw(shape: Sequence[int], scale: float) -> torch.Tensor:
    """Normal values in bf16, drawn in place: an fp32 draft of the whole would be twice as large."""
    return torch.empty(*shape, dtype=torch.bfloat16, device=DEVICE).normal_(std=scale)


def num_bytes(param: torch.Tensor, moments: Moments) -> int:
    """Fewest bytes of a step: weight and moments are read and written, the gradient is read."""
    kept = sum(tensor.nbytes for tensor in moments.tensors().values())
    return 3 * param.nbytes + 2 * kept


def check(kind: MomentKind) -> None:
    """Refuse to time a kernel that is wrong, after some steps from the same start.

    Raises:
        ValueError: of what, and by how much.
    """
    param = draw(CHECKED_SHAPE, 0.02)
    ours, expected = ((param.clone(), Moments.zeros(param, kind)) for _ in range(2))
    for step in range(1, CHECKED_STEPS + 1):
        grad = draw(CHECKED_SHAPE, 1e-3)
        for function, (weight, moments) in ((adamw_triton, ours), (adamw_reference, expected)):
            function(weight, grad, moments, rates_of(step), RULE, 7)
    require_right(f"{kind}: weights", ours[0], expected[0], HALF_LIMIT)
    wanted = expected[1].tensors()
    for name, value in ours[1].tensors().items():
        what = f"{kind}: {name}"
        if value.is_floating_point():
            limit = SCALE_LIMIT if value.dtype == torch.float32 else HALF_LIMIT
            require_right(what, value, wanted[name], limit)
            continue
        difference = (value.int() - wanted[name].int()).abs()
        if difference.max() > 1 or not difference.float().mean() < CODE_LIMIT:
            raise ValueError(f"{what}: codes differ by up to {difference.max()}: it is not timed")


def contenders(
    param: torch.Tensor, kinds: Sequence[MomentKind]
) -> Iterator[tuple[str, Callable[[], object], int]]:
    """Name, a step and its bytes; moments are made when their turn comes, one set at a time."""
    rates = rates_of(10)
    grad = param.grad
    assert grad is not None, "the parameter has its gradient"
    for kind in kinds:
        moments = Moments.zeros(param, kind)

        def ours(moments: Moments = moments) -> None:
            adamw_triton(param, grad, moments, rates, RULE)

        size = num_bytes(param, moments)
        yield f"{kind} moments: triton", ours, size
        del ours, moments
    torch.cuda.empty_cache()
    betas = (RULE.beta1, RULE.beta2)
    theirs = torch.optim.AdamW(
        [param], lr=LR, betas=betas, eps=RULE.eps, weight_decay=DECAY, fused=True
    )
    yield "bfloat16 moments: torch fused", theirs.step, 7 * param.nbytes


def measure(kinds: Sequence[MomentKind], repeats: int) -> list[Measurement]:
    """Every kind that is right, and torch's."""
    param = torch.nn.Parameter(draw(SHAPE, 0.02))
    param.grad = draw(SHAPE, 1e-3)
    found = []
    for name, run, size in contenders(param, kinds):
        times = tuple(us / 1e3 for us in time_us(run, repeats, captures=False))
        limit = size / BYTES_PER_MS
        note = f"limit {limit:.2f} ms, {limit / statistics.median(times):.0%} of it"
        kind, _, backend = name.partition(" moments: ")
        labels = {"moments": kind, "backend": backend}
        found.append(Measurement(name, "ms", times, note=note, labels=labels))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--moments", nargs="+", choices=get_args(MomentKind), default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    for kind in options.moments:
        check(kind)
    print_report(measure(options.moments, options.repeats), environment(torch.get_num_threads()))


if __name__ == "__main__":
    main()
