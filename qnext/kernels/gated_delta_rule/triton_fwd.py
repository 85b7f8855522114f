"""Gated delta rule on a GPU: entry point, what it takes, and its place in autograd.

The derivation and the split into kernels are in this folder's README.
"""

from typing import Any

import torch

from qnext.kernels.gated_delta_rule.triton_bwd import gated_delta_rule_bwd
from qnext.kernels.gated_delta_rule.triton_chunks import (
    CHUNK,
    DECAYS,
    Chunks,
    Inputs,
    empty_chunks,
    prepare_chunks,
    prepare_slots,
    token_rows,
)
from qnext.kernels.gated_delta_rule.triton_scan import States, empty_states, scan
from qnext.kernels.gated_delta_rule.triton_segments import Chain, Segment, segments
from qnext.kernels.graph_ops import graph_op

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
    given = (q, k, v, g, beta, cu_seqlens, initial_state, keeps_states)
    if torch.compiler.is_compiling():  # the op has a gradient of its own
        out, final, *_ = gated_delta_rule_graph(*given)
        return out, None if initial_state is None else final
    out, final = GatedDeltaRuleFunction.apply(*given)
    return out, final


def gated_delta_rule_fwd(
    inputs: Inputs, initial_state: torch.Tensor | None, *, keeps_states: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, Chunks, States | None]:
    """Outputs, final states, and what the backward needs of the chunks, states if kept."""
    out = inputs.v.new_empty(inputs.v.shape)
    # A scan that writes states out fills its processors; beside it others slow it down.
    parts = [] if keeps_states else segments(inputs)
    if parts:
        chunks = empty_chunks(inputs)
        state = _scan_segments(inputs, chunks, parts, initial_state, out)
        return out, None if initial_state is None else state, chunks, None
    chunks = prepare_chunks(inputs)
    states = empty_states(inputs) if keeps_states else None
    final = None if initial_state is None else torch.empty_like(initial_state)
    scan(inputs, chunks, initial_state, out=out, final=final, states=states)
    return out, final, chunks, states


def _scan_segments(
    inputs: Inputs,
    chunks: Chunks,
    parts: list[Segment],
    initial_state: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill out, preparing each segment beside the scan before its own; returns the state."""
    _, num_heads, key_dim, value_dim = inputs.sizes
    state = inputs.g.new_zeros(1, num_heads, key_dim, value_dim)
    if initial_state is not None:
        state.copy_(initial_state)
    chain = Chain(out.device)
    for part in parts:
        prepare_slots(inputs, chunks, part.slots)
        chain.follow()
        # The next segment waits for the last scan, so that this one finds free processors first.
        chain.lead()
        with chain.running():
            own = (part.inputs(inputs), part.chunks(chunks))
            scan(*own, state, out=out, final=state, is_alone=True)
    chain.lead()
    return state


def _inputs(*tensors: torch.Tensor) -> Inputs:
    """q, k, v, g, beta, cu_seqlens as the kernels read them, copied where strides ask for it."""
    q, k, v, *rest = tensors
    g, beta, cu_seqlens = (x.contiguous() for x in rest)
    return Inputs(token_rows(q), token_rows(k), token_rows(v), g, beta, cu_seqlens)


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
        inputs = _inputs(q, k, v, g, beta, cu_seqlens)
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


# Output, final state, the tensors of `Chunks` and of `States`; empty where there is none.
GraphResults = tuple[
    torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor,
]  # fmt: skip


def _shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    keeps_states: bool,
) -> GraphResults:
    num_tokens, heads, value_dim = v.shape
    num_seqs = cu_seqlens.shape[0] - 1
    slots = -(-num_tokens // CHUNK) + num_seqs
    tile = (slots, heads, CHUNK, CHUNK)
    return (
        v.new_empty(v.shape),
        g.new_empty(0 if initial_state is None else initial_state.shape),
        cu_seqlens.new_empty(slots, 2),
        cu_seqlens.new_empty(num_seqs),
        k.new_empty(tile),
        k.new_empty(tile),
        g.new_empty(slots, heads, DECAYS.value, CHUNK),
        v.new_empty((slots, heads, k.shape[2], value_dim) if keeps_states else 0),
        v.new_empty(v.shape if keeps_states else 0),
    )


@graph_op("gated_delta_rule", shapes=_shapes)
def gated_delta_rule_graph(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    keeps_states: bool,
) -> GraphResults:
    """The forward kernels for graphs, with what the backward reads among the results."""
    inputs = _inputs(q, k, v, g, beta, cu_seqlens)
    initial_state = None if initial_state is None else initial_state.contiguous()
    out, final, chunks, states = gated_delta_rule_fwd(
        inputs, initial_state, keeps_states=keeps_states
    )
    final = inputs.g.new_empty(0) if final is None else final
    kept = (inputs.v.new_empty(0), inputs.v.new_empty(0)) if states is None else states
    prepared = (chunks.table, chunks.first, chunks.inverse, chunks.scores, chunks.decay)
    return out, final, *prepared, *kept


@graph_op("gated_delta_rule_backward", "q", "k", "v", "g", "beta", "initial_state")
def gated_delta_rule_graph_bwd(
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    prepared: list[torch.Tensor],
    kept: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, g, beta and of the initial state, empty if there is none.

    prepared: `Chunks`; kept: `States`, or nothing, and the pass over the chunks runs again.
    """
    inputs = _inputs(q, k, v, g, beta, cu_seqlens)
    initial_state = None if initial_state is None else initial_state.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    states = States(*kept) if kept else None
    grads = gated_delta_rule_bwd(
        inputs, Chunks(*prepared), initial_state, states, dout.contiguous(), dfinal
    )
    made = [g.new_empty(0) if grad is None else grad for grad in grads]
    return made[0], made[1], made[2], made[3], made[4], made[5]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: GraphResults) -> None:
    *tensors, ctx.keeps_states = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _formula(
    ctx: Any, dout: torch.Tensor, dfinal: torch.Tensor, *_unused: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    tensors, results = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    initial_state = tensors[6]
    d_outputs = (dout, None if initial_state is None else dfinal)
    prepared, kept = list(results[:5]), list(results[5:]) if ctx.keeps_states else []
    given: tuple[Any, ...] = (*d_outputs, *tensors, prepared, kept)
    grads = gated_delta_rule_graph_bwd(*given)
    return *grads[:5], None, None if initial_state is None else grads[5], None


torch.library.register_autograd("qnext::gated_delta_rule", _formula, setup_context=_keep)
