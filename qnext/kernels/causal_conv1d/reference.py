"""Short causal depthwise convolution over packed sequences, plain PyTorch."""

import torch
import torch.nn.functional as F


def causal_conv1d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve each channel with its own taps, then SiLU; no tap crosses a sequence's start.

        y_t = silu(sum_j weight[:, j] * x_{t - (width - 1) + j})

    Args:
        x: channels of the packed tokens. [T, D]
        weight: taps, oldest input first. [D, width]
        positions: index of each token since its sequence's start in x, from 0. [T]
        initial_state: inputs before the first token, oldest first, when x is one sequence
            that goes on. [D, width - 1]

    Returns:
        [T, D] in the dtype of x.

    Raises:
        ValueError: initial_state is given and positions restart inside x (not checked on GPU).
    """
    width = weight.shape[1]
    num_tokens = x.shape[0]
    if initial_state is None:
        history = x.new_zeros(width - 1, x.shape[1])
    else:
        history = initial_state.t().to(x.dtype)
        if x.device.type == "cpu" and bool((positions[1:] == 0).any()):
            raise ValueError("causal_conv1d: initial_state is for one sequence, x holds several")
    padded = torch.cat([history, x])  # [width - 1 + T, D]
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(x.shape, dtype=wide, device=x.device)
    for lag in range(width - 1, -1, -1):
        shifted = padded[width - 1 - lag : width - 1 - lag + num_tokens].to(wide)
        if initial_state is None and lag > 0:
            shifted = shifted * (positions >= lag)[:, None]
        total = total + shifted * weight[:, width - 1 - lag].to(wide)
    return F.silu(total).to(x.dtype)
