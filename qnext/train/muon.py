"""Muon: momentum whose matrices are made orthogonal before they are added to the weights.

A gradient G of a matrix is nearly of low rank; G = U S V^T is replaced by U V^T, so that every
direction moves at the same speed. U V^T comes from an odd polynomial iterated on G / |G|, which
only needs matrix products:

    X <- a X + (b X X^T + c (X X^T)^2) X

The update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the root mean square of
AdamW's updates, so that both share one learning rate and one weight decay.

Source: Muon, https://kellerjordan.github.io/posts/muon; scale: https://arxiv.org/abs/2502.16982;
coefficients: Polar Express, https://arxiv.org/abs/2505.16932
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Optimal for singular values in [1e-3, 1], five iterations, with a margin for bf16 rounding.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# AdamW's updates have about this root mean square.
UPDATE_RMS = 0.2


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrix of each matrix, to about 2 %.

    Computes in bfloat16 on a GPU and in the dtype given on a CPU, where bfloat16 may be slower.

    Args:
        matrices: a stack of matrices with rows <= columns. [n, rows, columns]

    Returns:
        U V^T of each U S V^T, zero for a zero matrix. [n, rows, columns], dtype of the input
    """
    assert matrices.size(-2) <= matrices.size(-1), f"more rows than columns: {matrices.shape}"
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    # The Frobenius norm bounds the largest singular value; 2 % keeps rounding below 1.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        # baddbmm(M, A, B, beta, alpha) = beta M + alpha A B, one kernel each.
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.to(matrices.dtype)


@dataclass(frozen=True)
class MatrixPart:
    """One logical matrix, or a stack of them, inside a parameter: rows [start, start + rows)."""

    param_idx: int
    start: int
    rows: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of this part, as a stack with rows <= columns. [n, r, c]"""
        part = tensor.narrow(-2, self.start, self.rows)
        part = part.unsqueeze(0) if part.ndim == 2 else part
        return part if part.size(-2) <= part.size(-1) else part.mT


class Muon:
    """Muon with Nesterov momentum over the logical matrices of some parameters.

    Args:
        params: name and parameter, [rows, columns] or [experts, rows, columns].
        split_rows: name -> rows of each logical part along the second last dimension.
        momentum: of the gradient's running mean.
        weight_decay: decoupled, scaled by the learning rate.

    Raises:
        ValueError: a parameter is no matrix, or its parts do not add up to its rows.
    """

    def __init__(
        self,
        params: dict[str, torch.nn.Parameter],
        split_rows: Callable[[str, Tensor], list[int]],
        *,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self.names = list(params)
        self.params: list[Tensor] = list(params.values())
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.momenta = [torch.zeros_like(p) for p in self.params]
        self.groups: dict[tuple[int, int], list[MatrixPart]] = {}
        for idx, (name, param) in enumerate(params.items()):
            if param.ndim not in (2, 3):
                raise ValueError(f"Muon: {name} has shape {tuple(param.shape)}: must be a matrix")
            rows = split_rows(name, param)
            if sum(rows) != param.size(-2):
                raise ValueError(f"Muon: parts {rows} of {name} must sum to {param.size(-2)} rows")
            start = 0
            for num_rows in rows:
                part = MatrixPart(idx, start, num_rows)
                shape = part.of(param).shape
                self.groups.setdefault((shape[-2], shape[-1]), []).append(part)
                start += num_rows

    @torch.no_grad()
    def step(self, lr: Tensor, is_good: Tensor) -> None:
        """Update the weights in place from their `.grad`; do nothing where `is_good` is 0.

        Args:
            lr: learning rate. [], fp32
            is_good: 1 or 0; gradients must be finite in either case (zeroed by the caller). [],
                fp32
        """
        grads = [p.grad for p in self.params if p.grad is not None]
        assert len(grads) == len(self.params), "a parameter has no gradient buffer"
        if not grads:
            return
        keep = torch.where(is_good > 0, self.momentum, 1.0)
        # With zeroed gradients and keep = 1 the momentum is left as it was, bit by bit.
        torch._foreach_mul_(self.momenta, keep)
        torch._foreach_add_(self.momenta, grads, alpha=1 - self.momentum)
        looks_ahead = torch._foreach_lerp(grads, self.momenta, self.momentum)
        step_size = lr * is_good
        torch._foreach_mul_(self.params, 1 - step_size * self.weight_decay)
        for (rows, columns), parts in self.groups.items():
            stack = torch.cat([part.of(looks_ahead[part.param_idx]) for part in parts])  # [n, r, c]
            update = orthogonalize(stack).mul_(-step_size * UPDATE_RMS * max(rows, columns) ** 0.5)
            targets = [part.of(self.params[part.param_idx]) for part in parts]
            torch._foreach_add_(targets, list(update.split([t.size(0) for t in targets])))

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the momenta by parameter name; the tensors themselves, not copies."""
        return {f"muon.momentum/{n}": m for n, m in zip(self.names, self.momenta, strict=True)}
