"""Nothing is timed that is wrong: results against the reference's, before any measurement."""

from collections.abc import Sequence

import torch

Results = torch.Tensor | Sequence[torch.Tensor]


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN where anything is NaN.

    Raises:
        ValueError: their shapes differ.
    """
    if ours.shape != expected.shape:
        raise ValueError(f"shape {tuple(ours.shape)}, expected {tuple(expected.shape)}")
    # Sums are float64, differences not wider than needed: gradients of weights are gigabytes.
    wide = expected.detach().to(torch.promote_types(expected.dtype, torch.float32))
    difference, size = (
        torch.linalg.vector_norm(x, dtype=torch.float64) for x in (ours.detach() - wide, wide)
    )
    return float(difference / size.clamp_min(1e-30))


def largest_error(ours: Results, expected: Results) -> float:
    """The largest relative error among results in the same order; NaN where one is NaN."""
    lists = [[x] if isinstance(x, torch.Tensor) else list(x) for x in (ours, expected)]
    errors = [relative_error(mine, want) for mine, want in zip(*lists, strict=True)]
    return max(errors, key=lambda error: error if error == error else float("inf"))


def require_right(what: str, ours: Results, expected: Results, limit: float) -> None:
    """Refuse to time what is wrong.

    Raises:
        ValueError: the largest relative error is not below the limit, or shapes differ.
    """
    error = largest_error(ours, expected)
    if not error < limit:
        raise ValueError(f"{what}: error {error:.1e}, limit {limit:.0e}: it is not timed")
