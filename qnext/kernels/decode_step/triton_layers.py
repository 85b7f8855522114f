"""All layers and the head on the rows of a window, on a GPU: a fixed list of launches.

Shapes alone decide what is launched, so that the list can be captured once and replayed. Rows of
sequences that are not there (query_lens of 0) are worked out like the others and touch no memory of
a sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qnext.config.model import ModelConfig
from qnext.kernels import dispatch
from qnext.kernels.add_rms_norm.triton_fwd import add_rms_norm_fwd
from qnext.kernels.decode_step.reference import DecodeStep
from qnext.kernels.experts.triton_fwd import experts_shared_triton
from qnext.kernels.experts_rows.reference import ExpertScales
from qnext.kernels.experts_rows.triton_fwd import experts_rows_fwd
from qnext.kernels.fp8_blocks import DTYPE as EIGHT_BITS
from qnext.kernels.fp8_blocks import held_scale
from qnext.kernels.gated_delta_step.inputs import StepMemory, StepRows, StepWeights
from qnext.kernels.gated_delta_step.triton_fwd import gated_delta_step_fwd
from qnext.kernels.linear.triton_fwd import linear_fp8_fwd
from qnext.kernels.norm_router.triton_fwd import norm_router_fwd
from qnext.kernels.paged_attention_window.reference import HeadWeights, Window
from qnext.kernels.paged_attention_window.triton_fwd import paged_attention_window_fwd
from qnext.kernels.rms_norm.triton_fwd import rms_norm_fwd
from qnext.kernels.row_linear.triton_fwd import row_linear_fwd, rows_with_tail_fwd
from qnext.kernels.silu_mul.triton_fwd import silu_mul_fwd

FEW_ROWS = 16  # up to which products read the weights once without tensor cores' tiles
ROUTER_ROWS = 128  # that the fused router takes


@dataclass(frozen=True)
class DeviceRows:
    """Q rows of each of N sequences; everything lies on the device.

    Attributes:
        token_ids: in a draft step the tokens after the rows. [N * Q], int64
        query_lens: real rows of each sequence, 0 for one that is not there. [N], int32
        context_lens: tokens before the window. [N], int32
        state_slots: [N], int32
        num_pending: accepted rows that the states lack. [N], int32
        page_table: [N, P], int32
        hidden: in a draft step the states of the rows. [N * Q, C]
    """

    token_ids: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    state_slots: torch.Tensor
    num_pending: torch.Tensor
    page_table: torch.Tensor
    hidden: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    """Parameters of one layer by role; None where the layer has none."""

    mixer_idx: int
    norm: torch.Tensor
    in_proj: torch.Tensor
    out_proj: torch.Tensor
    mlp_norm: torch.Tensor
    heads: HeadWeights | None  # of an attention layer
    delta: StepWeights | None  # of a DeltaNet layer
    router: torch.Tensor | None
    gate_up: torch.Tensor | None
    down: torch.Tensor | None
    shared_gate: torch.Tensor | None
    shared_gate_up: torch.Tensor | None  # or the dense MLP's
    shared_down: torch.Tensor | None


@dataclass(frozen=True)
class StepTensors:
    """What a step reads, found once.

    Attributes:
        conv_ring: raw inputs of the last rows of each DeltaNet layer. [L, S, R, D + 2 * Hv]
        counters: zeros between launches, for the router's. int32
        use_pdl: let a launch of few rows start under the tail of the one before (programmatic
            dependent launch): weights are fetched while it waits for the rows.
    """

    step: DecodeStep
    layers: tuple[LayerWeights, ...]
    conv_ring: torch.Tensor
    counters: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor]
    use_pdl: bool

    @property
    def config(self) -> ModelConfig:
        """Sizes of the model."""
        return self.step.config

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter of the model."""
        return self.step.parameters[name]


def layer_weights(step: DecodeStep, rotation: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """Find the parameters of a step's layers. Returns a tuple of `LayerWeights`."""
    eps = step.config.rms_norm_eps
    found = []
    for prefix, mixer_idx in zip(step.layer_names, step.mixer_idx, strict=True):

        def get(name: str, prefix: str = prefix) -> Any:
            parameter = step.parameters.get(prefix + name)
            if parameter is None or parameter.dtype == EIGHT_BITS:
                return parameter  # a view would lose the scales
            return parameter.detach()

        is_attention = get("mixer.qkv_proj") is not None
        heads = delta = None
        if is_attention:
            q_norm, k_norm = get("mixer.q_norm.weight"), get("mixer.k_norm.weight")
            heads = HeadWeights(q_norm, k_norm, eps, *rotation)
        else:
            scale = get("mixer.norm.weight")
            decay = get("mixer.A_log"), get("mixer.dt_bias")
            delta = StepWeights(get("mixer.conv1d"), *decay, scale, eps)
        is_moe = get("mlp.gate") is not None
        shared = ("mlp.shared_gate_up", "mlp.shared_down")
        up_name, down_name = shared if is_moe else ("mlp.gate_up_proj", "mlp.down_proj")
        found.append(
            LayerWeights(
                mixer_idx=mixer_idx,
                norm=get("input_layernorm.weight"),
                in_proj=get("mixer.qkv_proj" if is_attention else "mixer.in_proj"),
                out_proj=get("mixer.o_proj" if is_attention else "mixer.out_proj"),
                mlp_norm=get("post_attention_layernorm.weight"),
                heads=heads,
                delta=delta,
                router=get("mlp.gate"),
                gate_up=get("mlp.experts_gate_up"),
                down=get("mlp.experts_down"),
                shared_gate=get("mlp.shared_expert_gate"),
                shared_gate_up=get(up_name),
                shared_down=get(down_name),
            )
        )
    return tuple(found)


def run_step(tensors: StepTensors, rows: DeviceRows) -> torch.Tensor:
    """Embedding, layers and final norm. Returns states [N * Q, C]"""
    step = tensors.step
    embedded = F.embedding(rows.token_ids, tensors.parameter("embed_tokens"))
    x = embedded if rows.hidden is None else _combine(tensors, embedded, rows.hidden)
    added: torch.Tensor | None = None  # what the last layer still has to add to x
    for layer in tensors.layers:
        x, added = _run_layer(tensors, layer, rows, x, added)
    norm, eps = tensors.parameter(step.prefix + "norm.weight"), step.config.rms_norm_eps
    return rms_norm_fwd(x, norm, eps) if added is None else add_rms_norm_fwd(added, x, norm, eps)[0]


def logits_of(tensors: StepTensors, hidden: torch.Tensor) -> torch.Tensor:
    """Raw logits in fp32. hidden: [T, C]. Returns [T, W]"""
    head = tensors.parameter(tensors.step.head)
    if hidden.shape[0] <= FEW_ROWS:
        return row_linear_fwd(
            hidden,
            head,
            None,
            None,
            held_scale(head),
            eps=0.0,
            out_dtype=torch.float32,
            use_pdl=tensors.use_pdl,
        )
    if head.dtype == EIGHT_BITS:
        return linear_fp8_fwd(hidden, head, None, out_dtype=torch.float32)
    if hidden.dtype == torch.float32:
        return hidden @ head.t()
    return torch.mm(hidden, head.t(), out_dtype=torch.float32)


def _combine(tensors: StepTensors, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The MTP head's entry: project [norm(embedding); norm(state)]."""
    eps = tensors.config.rms_norm_eps
    joined = torch.cat(
        [
            rms_norm_fwd(embedded, tensors.parameter("mtp.pre_fc_norm_embedding.weight"), eps),
            rms_norm_fwd(hidden, tensors.parameter("mtp.pre_fc_norm_hidden.weight"), eps),
        ],
        dim=-1,
    )
    return _project(tensors, joined, tensors.parameter("mtp.fc"))


def _project(
    tensors: StepTensors,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T, plus the residual."""
    if x.shape[0] <= FEW_ROWS:
        return row_linear_fwd(
            x,
            weight,
            None,
            residual,
            held_scale(weight),
            eps=0.0,
            out_dtype=x.dtype,
            use_pdl=tensors.use_pdl,
        )
    return _multiply(x, weight, residual)


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T, plus the residual, of many rows."""
    if weight.dtype == EIGHT_BITS:
        return linear_fp8_fwd(x, weight, residual)
    return F.linear(x, weight) if residual is None else torch.addmm(residual, x, weight.t())


def _run_layer(
    tensors: StepTensors,
    layer: LayerWeights,
    rows: DeviceRows,
    x: torch.Tensor,
    added: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One decoder layer; returns the residual rows and what is still to be added to them."""
    eps = tensors.config.rms_norm_eps
    if x.shape[0] <= FEW_ROWS:
        fused = rows_with_tail_fwd(x, layer.in_proj, layer.norm, eps=eps, use_pdl=tensors.use_pdl)
    else:
        if added is None:
            normed = rms_norm_fwd(x, layer.norm, eps)
        else:
            normed, x = add_rms_norm_fwd(added, x, layer.norm, eps)
        fused = _multiply(normed, layer.in_proj)
    x = _project(tensors, _mix(tensors, layer, rows, fused), layer.out_proj, x)
    if layer.router is None:
        normed = rms_norm_fwd(x, layer.mlp_norm, eps)
        return _dense(tensors, layer, normed, x), None
    return _mixture(tensors, layer, x)


def _mix(
    tensors: StepTensors, layer: LayerWeights, rows: DeviceRows, fused: torch.Tensor
) -> torch.Tensor:
    step = tensors.step
    is_overlapped = tensors.use_pdl and fused.shape[0] <= FEW_ROWS
    if layer.heads is not None:
        window = Window(rows.page_table, rows.context_lens, rows.query_lens, step.page_size)
        return paged_attention_window_fwd(
            fused,
            step.keys[layer.mixer_idx],
            step.values[layer.mixer_idx],
            layer.heads,
            window,
            scale=step.config.head_dim**-0.5,
            keys_per_split=None,
            use_pdl=is_overlapped,
        )
    assert layer.delta is not None, "a layer is either of attention or of DeltaNet"
    memory = StepMemory(tensors.conv_ring[layer.mixer_idx], step.states[1][layer.mixer_idx])
    lens = StepRows(rows.state_slots, rows.query_lens, rows.context_lens, rows.num_pending)
    return gated_delta_step_fwd(fused, layer.delta, memory, lens, use_pdl=is_overlapped)


def _dense(
    tensors: StepTensors, layer: LayerWeights, normed: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    assert layer.shared_gate_up is not None and layer.shared_down is not None, "no MLP"
    hidden = silu_mul_fwd(_project(tensors, normed, layer.shared_gate_up))
    return _project(tensors, hidden, layer.shared_down, x)


def _mixture(
    tensors: StepTensors, layer: LayerWeights, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    config = tensors.config
    assert layer.router is not None and layer.gate_up is not None and layer.down is not None
    normed, weights, ids, shared_logit = _route(tensors, layer, x)
    if x.shape[0] <= FEW_ROWS:
        summed = experts_rows_fwd(
            normed,
            layer.gate_up,
            layer.down,
            layer.shared_gate_up,
            layer.shared_down,
            top_weights=weights,
            top_ids=ids,
            shared_logit=shared_logit,
            residual=x,
            scales=_expert_scales(layer),
            use_pdl=tensors.use_pdl,
        )
        return summed, None
    shared = gate = None
    if config.shared_expert_intermediate_size and shared_logit is not None:
        assert layer.shared_gate_up is not None and layer.shared_down is not None
        hidden = silu_mul_fwd(_multiply(normed, layer.shared_gate_up))
        shared, gate = _multiply(hidden, layer.shared_down), shared_logit[:, None].to(x.dtype)
    added = experts_shared_triton(
        normed, layer.gate_up, layer.down, weights, ids.long(), shared, gate
    )
    return x, added


def _expert_scales(layer: LayerWeights) -> ExpertScales | None:
    weights = (layer.gate_up, layer.down, layer.shared_gate_up, layer.shared_down)
    gate_up, down, *shared = (None if w is None else held_scale(w) for w in weights)
    return None if gate_up is None or down is None else ExpertScales(gate_up, down, *shared)


def _route(
    tensors: StepTensors, layer: LayerWeights, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    config = tensors.config
    top_k, is_scaled = config.num_experts_per_tok, config.norm_topk_prob
    assert layer.router is not None
    if x.shape[0] <= ROUTER_ROWS:
        return norm_router_fwd(
            x,
            layer.mlp_norm,
            config.rms_norm_eps,
            layer.router,
            layer.shared_gate,
            top_k=top_k,
            norm_topk_prob=is_scaled,
            counters=tensors.counters,
            use_pdl=tensors.use_pdl and x.shape[0] <= FEW_ROWS,
        )
    normed = rms_norm_fwd(x, layer.mlp_norm, config.rms_norm_eps)
    weights, ids, _ = dispatch.router(normed, layer.router, top_k, is_scaled, row_stable=False)
    shared_logit = None
    if layer.shared_gate is not None:
        shared_logit = F.linear(normed, layer.shared_gate)[:, 0].float()
    return normed, weights, ids, shared_logit
