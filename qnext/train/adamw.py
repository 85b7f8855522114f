"""AdamW whose moments may be narrow, over many parameters and without a wait of the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qnext.kernels import dispatch
from qnext.kernels.adamw.moments import AdamWRule, MomentKind, Moments


@dataclass(frozen=True)
class AdamWGroup:
    """Parameters with one learning rate, which lives on the device, and one weight decay."""

    params: Sequence[nn.Parameter]
    lr: Tensor
    weight_decay: float


class NarrowAdamW:
    """What `torch.optim.AdamW` does, with weights and moments of any width.

    Args:
        groups: of the parameters, on one device.
        rule: betas, eps and rounding.
        kind: of the moments.
    """

    def __init__(self, groups: Sequence[AdamWGroup], rule: AdamWRule, kind: MomentKind) -> None:
        self.groups, self.rule = list(groups), rule
        device = self.groups[0].params[0].device
        # Applied steps; fp64, so that neither it nor the powers of betas lose anything.
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.log_betas = torch.tensor(
            [math.log(rule.beta1), math.log(rule.beta2)], dtype=torch.float64, device=device
        )
        self.moments = {
            param: Moments.zeros(param, kind) for group in self.groups for param in group.params
        }

    @torch.no_grad()
    def step(self, scale: Tensor, is_good: Tensor) -> None:
        """Update every parameter that has a gradient, or none where is_good is 0.

        Args:
            scale: divides the gradients. [], fp32
            is_good: 1 or 0. [], fp32
        """
        self.count += is_good
        # At least 1: a skipped first step divides by nothing.
        mean_rest, square_rest = -torch.expm1(self.log_betas * self.count.clamp(min=1))
        salt = 0
        for group in self.groups:
            rates = torch.stack(
                [
                    1 / scale.double(),
                    group.lr.double(),
                    group.lr.double() * group.weight_decay,
                    1 / mean_rest,
                    square_rest.rsqrt(),
                    is_good.double(),
                    self.count,
                ]
            ).float()
            for param in group.params:
                salt += 1
                if param.grad is not None:
                    dispatch.adamw(param, param.grad, self.moments[param], rates, self.rule, salt)

    def state_tensors(self, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
        """The state by parameter name; the tensors themselves, not copies."""
        tensors = {"adamw.count": self.count}
        for param, moments in self.moments.items():
            for key, value in moments.tensors().items():
                tensors[f"adamw.{key}/{names[param]}"] = value
        return tensors
