"""Short causal convolution of a few new tokens per sequence, the committed inputs left alone."""

from functools import lru_cache

import torch
import torch.nn.functional as F


def causal_conv1d_window_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    conv_states: torch.Tensor,
    state_slots: torch.Tensor,
    query_lens: tuple[int, ...],
) -> torch.Tensor:
    """As `causal_conv1d_reference`, each sequence going on from its own committed inputs.

    Args:
        x: channels of the new rows, sequence after sequence. [T, D]
        weight: taps, oldest input first. [D, width]
        conv_states: one layer's last inputs, oldest first. [S, D, width - 1]
        state_slots: which state each sequence owns. [N], int64
        query_lens: rows of each sequence.

    Returns:
        [T, D] in the dtype of x.
    """
    width = weight.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    history = conv_states[state_slots].transpose(1, 2).reshape(-1, x.shape[1])
    source = torch.cat([history.to(x.dtype), x])
    taps = _tap_rows(query_lens, width, x.shape[0]).to(x.device)  # [width, T]
    total = torch.zeros(x.shape, dtype=wide, device=x.device)
    for tap_idx in range(width):
        total = total + source[taps[tap_idx]].to(wide) * weight[:, tap_idx].to(wide)
    return F.silu(total).to(x.dtype)


@lru_cache(maxsize=1024)
def _tap_rows(query_lens: tuple[int, ...], width: int, num_rows: int) -> torch.Tensor:
    """Rows of [history of every sequence | x] that each tap of each row reads. [width, T]"""
    num_history = len(query_lens) * (width - 1)
    rows = []
    start = num_history
    for seq_idx, length in enumerate(query_lens):
        history = range(seq_idx * (width - 1), (seq_idx + 1) * (width - 1))
        inputs = [*history, *range(start, start + length)]
        rows += [inputs[step : step + width] for step in range(length)]
        start += length
    rows += [[num_history] * width] * (num_rows - len(rows))
    return torch.tensor(rows, dtype=torch.int64).t().contiguous()
