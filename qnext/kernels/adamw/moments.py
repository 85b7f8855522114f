"""How AdamW's two moments are kept: as wide numbers, or in 8 bits with a scale per block."""

from dataclasses import dataclass
from typing import Literal

import torch

MomentKind = Literal["float32", "bfloat16", "8bit"]
# Neighbours in memory that share a scale: large enough that scales weigh little (2 % of the
# moments), small enough that one outlier hides few.
BLOCK = 256


@dataclass(frozen=True)
class Moments:
    """Running means of one parameter's gradient and of its square.

    With 8 bits the codes are companded: numbers near zero lie closer together, as most are small.
    With s the scale of its block, a code c stands for

        mean: sign(c) (c / 127)^2 s, c in -127 .. 127;  root of the square: (c / 255)^2 s, c >= 0.

    Attributes:
        mean: shape of the parameter; float, or int8 codes.
        square: mean of squares as float, or uint8 codes of its root.
        mean_scale, root_scale: largest magnitude of each block; empty where moments are floats.
            [ceil(n / BLOCK)], fp32
    """

    mean: torch.Tensor
    square: torch.Tensor
    mean_scale: torch.Tensor
    root_scale: torch.Tensor

    @property
    def is_8bit(self) -> bool:
        """Whether moments are codes."""
        return self.mean.dtype == torch.int8

    @classmethod
    def zeros(cls, param: torch.Tensor, kind: MomentKind) -> "Moments":
        """Moments of a parameter that no step has seen."""
        is_8bit = kind == "8bit"
        num_scales = -(-param.numel() // BLOCK) if is_8bit else 0
        dtypes = (torch.int8, torch.uint8) if is_8bit else (getattr(torch, kind),) * 2

        def make(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(param.shape, dtype=dtype, device=param.device)

        scales = torch.zeros(2, num_scales, dtype=torch.float32, device=param.device)
        return cls(make(dtypes[0]), make(dtypes[1]), scales[0], scales[1])

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, for a checkpoint; the tensors themselves, not copies."""
        named = {"mean": self.mean, "square": self.square}
        if self.is_8bit:
            named |= {"mean_scale": self.mean_scale, "root_scale": self.root_scale}
        return named


@dataclass(frozen=True)
class AdamWRule:
    """What is the same for all parameters and steps.

    Attributes:
        beta1, beta2: of the running means.
        eps: added to the root of the second.
        is_stochastic: narrow weights and codes are rounded up or down at random, so that changes
            below half a unit in the last place add up instead of being lost.
    """

    beta1: float
    beta2: float
    eps: float
    is_stochastic: bool = True
