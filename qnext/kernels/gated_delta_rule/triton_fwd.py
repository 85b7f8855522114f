"""Gated delta rule on a GPU: entry point, what it takes, and its place in autograd.

The derivation and the split into kernels are in this folder's README.
"""

from typing import Any

import torch

from qnext.kernels.gated_delta_rule.triton_bwd import gated_delta_rule_bwd
from qnext.kernels.gated_delta_rule.triton_chunks import (
    Chunks,
    Inputs,
    prepare_chunks,
    token_rows,
)
from qnext.kernels.gated_delta_rule.triton_scan import States, scan_outputs

MAX_DIM = 256
# Up to so many tokens, a forward with gradients keeps states, which saves the backward a pass;
# above, memory matters more.
KEEP_STATES_TOKENS = 65536
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    row_tokens: int | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if v.dtype not in DTYPES:
        return f"values are {v.dtype}, not bfloat16, float16 or float32"
    if q.dtype != v.dtype or k.dtype != v.dtype:
        return f"q, k, v have different dtypes: {q.dtype}, {k.dtype}, {v.dtype}"
    gates = [g, beta] if initial_state is None else [g, beta, initial_state]
    if any(x.dtype != torch.float32 for x in gates):
        return "g, beta or the state is not float32"
    if max(k.shape[2], v.shape[2]) > MAX_DIM:
        return f"K = {k.shape[2]}, V = {v.shape[2]}: at most {MAX_DIM}"
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.device != v.device:
        return "cu_seqlens is not int32 on the device of v"
    return None


def gated_delta_rule_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    row_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `gated_delta_rule_reference`, in chunks of 64 tokens; row_tokens changes nothing."""
    if v.shape[1] % k.shape[1]:
        raise ValueError(f"Hv = {v.shape[1]} must be a multiple of Hk = {k.shape[1]}")
    if v.shape[0] == 0:
        return torch.zeros_like(v), None if initial_state is None else initial_state.clone()
    leaves = [x for x in (q, k, v, g, beta, initial_state) if x is not None]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    keeps_states = needs_grad and v.shape[0] <= KEEP_STATES_TOKENS
    out, final = GatedDeltaRuleFunction.apply(
        q, k, v, g, beta, cu_seqlens, initial_state, keeps_states
    )
    return out, final


def gated_delta_rule_fwd(
    inputs: Inputs, initial_state: torch.Tensor | None, *, keeps_states: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, Chunks, States | None]:
    """Outputs, final states, and what the backward needs of the chunks, states if kept."""
    chunks = prepare_chunks(inputs)
    out, final, states = scan_outputs(inputs, chunks, initial_state, keeps_states=keeps_states)
    return out, final, chunks, states


class GatedDeltaRuleFunction(torch.autograd.Function):
    """Keeps the inputs, inverses and scores; states and E too, or computes them again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        cu_seqlens: torch.Tensor,
        initial_state: torch.Tensor | None,
        keeps_states: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `gated_delta_rule_triton`."""
        inputs = Inputs(
            token_rows(q),
            token_rows(k),
            token_rows(v),
            g.contiguous(),
            beta.contiguous(),
            cu_seqlens.contiguous(),
        )
        initial_state = None if initial_state is None else initial_state.contiguous()
        out, final, chunks, states = gated_delta_rule_fwd(
            inputs, initial_state, keeps_states=keeps_states
        )
        ctx.save_for_backward(
            *(inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, inputs.cu_seqlens),
            *(chunks.table, chunks.first, chunks.inverse, chunks.scores, chunks.decay),
            *(initial_state, *(states or (None, None))),
        )
        return out, final

    @staticmethod
    def backward(
        ctx: Any, dout: torch.Tensor, dfinal: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of all inputs but cu_seqlens."""
        saved = ctx.saved_tensors
        inputs, chunks, initial_state = Inputs(*saved[:6]), Chunks(*saved[6:11]), saved[11]
        kept = None if saved[12] is None else States(*saved[12:])
        if initial_state is None:
            dfinal = None
        elif dfinal is not None:
            dfinal = dfinal.contiguous()
        dout = dout.contiguous()
        grads = gated_delta_rule_bwd(inputs, chunks, initial_state, kept, dout, dfinal)
        return *grads[:5], None, grads[5], None
