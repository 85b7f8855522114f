"""Choice of experts on a CPU."""

from typing import Any

import numpy as np
import torch

from qnext.kernels.cpu_lanes import floats_at, ints_at, offset
from qnext.kernels.cpu_math import exp
from qnext.kernels.cpu_team import TeamKernel, share

LOGITS, NUM_TOKENS, E, A, NORM_TOPK, WEIGHTS, IDS = range(7)
MAX_ACTIVE = 64  # chosen one by one, which takes E steps each at worst


def supports(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, norm_topk_prob: bool, row_stable: bool
) -> str | None:
    """Say why this backend cannot run, or None."""
    if row_stable:
        return "windows take one row at a time"
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return f"rows are fp32 on a CPU here, not {x.dtype} on {x.device}"
    return None if top_k <= MAX_ACTIVE else f"at most {MAX_ACTIVE} experts per token here"


def router_numba(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, norm_topk_prob: bool, row_stable: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `router_reference`; the logits are a product in fp32, since their order is what counts."""
    logits = x @ weight.to(x.dtype).t()
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, top_k)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64)
    addresses = (weights.data_ptr(), ids.data_ptr())
    table = np.array(
        (logits.data_ptr(), num_tokens, num_experts, top_k, norm_topk_prob, *addresses),
        dtype=np.int64,
    )
    _choose(table, torch.get_num_threads())
    return weights, ids, logits


@TeamKernel
def _choose(t: Any) -> None:
    """Each thread takes some tokens; among equal logits the lowest id comes first."""
    num_experts, num_active = t[E], t[A]
    start, end = share(t[NUM_TOKENS], 1)
    for token in range(start, end):
        logits = offset(floats_at(t[LOGITS]), token * num_experts)
        weights = offset(floats_at(t[WEIGHTS]), token * num_active)
        ids = offset(ints_at(t[IDS]), token * num_active)
        count = 0
        for e in range(num_experts):
            value = logits[e]
            if count == num_active and not value > weights[count - 1]:
                continue
            place = count if count < num_active else count - 1
            while place > 0 and value > weights[place - 1]:
                weights[place], ids[place] = weights[place - 1], ids[place - 1]
                place -= 1
            weights[place], ids[place] = value, e
            count = min(count + 1, num_active)
        top, total = weights[0], np.float32(0.0)
        if t[NORM_TOPK]:
            for rank in range(num_active):
                total += exp(weights[rank] - top)
        else:
            for e in range(num_experts):
                total += exp(logits[e] - top)
        for rank in range(num_active):
            weights[rank] = exp(weights[rank] - top) / total
