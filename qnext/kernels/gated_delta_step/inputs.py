"""What a DeltaNet decode step reads beside the projected rows."""

from dataclasses import dataclass

import torch

L2_EPS = 1e-6


@dataclass(frozen=True)
class StepWeights:
    """Parameters of one layer.

    Attributes:
        conv1d: taps, oldest input first. [D, width], D = 2 * Hk * K + Hv * V
        A_log, dt_bias: of the decay. [Hv]
        norm: scale of the output norm, 1 at the start. [V]
        norm_eps: added to the mean square of a head's read-out, before the root.
    """

    conv1d: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    norm: torch.Tensor
    norm_eps: float


@dataclass(frozen=True)
class StepMemory:
    """DeltaNet memory of one layer, changed in place.

    Attributes:
        conv_ring: raw inputs [q | k | v | b | a] of the last rows; position p lies at p mod R.
            In the dtype of the rows, a replayed row is bit for bit the row that was verified.
            [S, R, D + 2 * Hv]
        states: recurrent states, in fp32 or a dtype that is rounded to once per call.
            [S, Hv, K, V]
    """

    conv_ring: torch.Tensor
    states: torch.Tensor


@dataclass(frozen=True)
class StepRows:
    """Where the rows of a step belong; all on the device, read by the kernel alone. [N], int32

    Attributes:
        state_slots: slot of each sequence. No two real sequences share one.
        query_lens: real rows of each sequence, 0 to Q; 0 is padding, which touches nothing.
        context_lens: tokens before the window, which is the position of its first row.
        num_pending: rows just before the window that the state in memory doesn't hold yet: the
            accepted drafts of the window before.
    """

    state_slots: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    num_pending: torch.Tensor
