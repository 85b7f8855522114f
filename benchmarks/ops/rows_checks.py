"""Kernels of few rows against their references, at the sizes at which they are timed."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.ops.checks import require_right
from benchmarks.ops.rows_cases import EPS, A, C, Mixture, ProductCalls, random
from qnext.kernels.rms_norm.reference import rms_norm_reference

# As in the ops' tests, in bf16: of results, of normalised rows, of logits and router weights.
ERROR_LIMIT, NORM_LIMIT, ROUTER_LIMIT = 1e-2, 2.5e-3, 2e-3


def check_product(what: str, calls: ProductCalls, ways: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to time a product that is wrong in any of the ways it is called.

    Raises:
        ValueError: in which, and by how much.
    """
    expected = calls.reference(*calls.weights[0])
    for label, how in ways.items():
        require_right(
            f"{what}, {label}", calls.run(*calls.weights[0], **how), expected, ERROR_LIMIT
        )


def check_mixture(mixture: Mixture, num_rows: int, ways: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to time a router or experts that are wrong; ways are the router's.

    Raises:
        ValueError: which, and by how much.
    """
    x = random(num_rows, C)
    for label, how in ways.items():
        check_route(f"router T {num_rows}, {label}", mixture, x, mixture.route(x, 0, **how))
    routing = mixture.route(x, 0)
    # Without a residual too, which is larger than the experts' sum and would hide its errors.
    for residual in (x, torch.zeros_like(x)):
        expected = mixture.mix_reference(residual, routing, 0)
        for use_pdl in (False, True):
            ours = mixture.mix(residual, routing, 0, use_pdl=use_pdl)
            require_right(f"experts T {num_rows}", ours, expected, ERROR_LIMIT)


def check_route(
    what: str, mixture: Mixture, x: torch.Tensor, routing: tuple[torch.Tensor, ...]
) -> None:
    """Norm, choice and weights of a router.

    Experts are compared by their logits: two that are nearly equal may change places, since a
    normalised row may be rounded to either side.

    Raises:
        ValueError: what is wrong, and by how much.
    """
    normed, top_weights, top_ids, shared_logit = routing
    gate, shared_gate = mixture.gates[0]
    rows = rms_norm_reference(x, mixture.norm_weight, EPS)
    require_right(f"{what}: norm", normed, rows, NORM_LIMIT)
    logits = F.linear(rows.float(), gate.float())
    shared = F.linear(rows.float(), shared_gate.float())
    best = logits.topk(A, dim=-1).values
    require_right(f"{what}: weights", top_weights, best.softmax(-1), ROUTER_LIMIT)
    chosen = logits.gather(1, top_ids.long())
    # Together, since one logit by itself may be near zero.
    ours, expected = torch.cat([chosen, shared_logit[:, None]], 1), torch.cat([best, shared], 1)
    require_right(f"{what}: logits", ours, expected, ROUTER_LIMIT)
