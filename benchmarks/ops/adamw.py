"""One update of AdamW on a GPU over one large matrix of bf16 weights, beside torch's fused one.

    python -m benchmarks.ops.adamw --experts 512

The flagship's gate and up matrices of one layer, [E, 1024, 2048]. The kernel's result is compared
with the reference's on a small matrix first; where it differs, nothing is timed.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks.ops.experts import time_us
from benchmarks.report import Measurement, Skipped, environment, print_report
from qnext.kernels.adamw.moments import AdamWRule, MomentKind, Moments
from qnext.kernels.adamw.reference import adamw_reference
from qnext.kernels.adamw.triton_fwd import adamw_triton

ROWS, COLUMNS = 1024, 2048
# Measured on an H100 80GB HBM3: a device-to-device copy.
BYTES_PER_S = 3.0e12
ERROR_LIMIT = 1e-4  # a tenth of an update: narrow moments may be rounded otherwise
KINDS: tuple[MomentKind, ...] = ("8bit", "bfloat16")
RULE = AdamWRule(0.9, 0.95, 1e-8, is_stochastic=False)


def draw_rates(device: torch.device) -> torch.Tensor:
    """What a step leaves on the device: the tenth one, at a rate of 1e-3 and a decay of 0.1."""
    step = 10
    corrections = [1 / (1 - RULE.beta1**step), (1 - RULE.beta2**step) ** -0.5]
    return torch.tensor([1.0, 1e-3, 1e-4, *corrections, 1.0, float(step)], device=device)


def difference(kind: MomentKind, device: torch.device) -> float:
    """Largest difference of weights between kernel and reference after three updates."""
    torch.manual_seed(0)
    found = []
    for update in (adamw_triton, adamw_reference):
        generator = torch.Generator(device).manual_seed(1)
        param = torch.randn(300, 200, generator=generator, device=device)
        moments = Moments.zeros(param, kind)
        for _ in range(3):
            grad = torch.randn(300, 200, generator=generator, device=device)
            update(param, grad, moments, draw_rates(device), RULE)
        found.append(param)
    return float((found[0] - found[1]).abs().max())


def ours(
    param: torch.Tensor, grad: torch.Tensor, kind: MomentKind
) -> tuple[Callable[[], object], int]:
    """One update by this package's kernel, and the bytes that it moves."""
    moments, rates = Moments.zeros(param, kind), draw_rates(param.device)
    moment_bytes = 2 * sum(part.nbytes for part in moments.tensors().values())
    num_bytes = 2 * param.nbytes + grad.nbytes + moment_bytes
    return lambda: adamw_triton(param, grad, moments, rates, RULE), num_bytes


def torchs(param: torch.Tensor, grad: torch.Tensor) -> tuple[Callable[[], object], int]:
    """One update by `torch.optim.AdamW(fused=True)`, whose moments are as wide as the weights."""
    leaf = torch.nn.Parameter(param)
    leaf.grad = grad
    optimizer = torch.optim.AdamW([leaf], lr=1e-3, betas=(RULE.beta1, RULE.beta2), fused=True)
    return optimizer.step, 7 * param.nbytes


def measure(num_experts: int, repeats: int) -> tuple[list[Measurement], list[Skipped]]:
    """Every kind of moments that is right, and the peer."""
    device = torch.device("cuda")
    found: list[Measurement] = []
    skipped: list[Skipped] = []
    shape = (num_experts, ROWS, COLUMNS)
    param = torch.randn(shape, dtype=torch.bfloat16, device=device)
    grad = torch.randn_like(param)
    runs = {"torch fused, bfloat16": torchs(param.clone(), grad)}
    for kind in KINDS:
        error = difference(kind, device)
        if not error <= ERROR_LIMIT:
            skipped.append(Skipped(kind, f"weights differ by {error:.1e}, limit {ERROR_LIMIT}"))
        else:
            runs[f"qnext, {kind}"] = ours(param, grad, kind)
    for name, (run, num_bytes) in runs.items():
        limit = 1e6 * num_bytes / BYTES_PER_S
        values = time_us(run, repeats, captures=False)
        note = f"limit {limit:,.0f} us"
        baseline = None if name.startswith("torch") else "torch fused, bfloat16"
        found.append(Measurement(name, "us", values, baseline=baseline, note=note))
    return found, skipped


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    found, skipped = measure(options.experts, options.repeats)
    print_report(found, environment(torch.get_num_threads()), skipped)


if __name__ == "__main__":
    main()
