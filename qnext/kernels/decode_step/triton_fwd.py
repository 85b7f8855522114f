"""A whole decode, verification or draft step on a GPU, and what its kernels keep between steps.

States lag by the drafts that were accepted last: the next step replays them (see
`gated_delta_step`). How many they are is known to the host once it has read what was decided.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import triton

from qnext.kernels.decode_step.reference import DecodeStep, StepOutput, WindowRows, best_ids
from qnext.kernels.decode_step.triton_layers import (
    DeviceRows,
    StepTensors,
    layer_weights,
    logits_of,
    run_step,
)
from qnext.kernels.fp8_blocks import BLOCK, addresses_of
from qnext.kernels.fp8_blocks import DTYPE as EIGHT_BITS
from qnext.kernels.gated_delta_step.inputs import StepMemory, StepRows
from qnext.kernels.gated_delta_step.triton_fwd import gated_delta_step_fwd
from qnext.kernels.sample_rows.fields import TokenCounts

MAX_WINDOW = 8  # rows of a sequence that the DeltaNet step takes
MAX_TAPS = 4  # of the convolution
MAX_STATE_DIM = 128  # of a DeltaNet head
MAX_VOCAB = 1 << 18  # that sampling takes
MAX_EXPERTS, MAX_ACTIVE = 1024, 32
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class SlotState:
    """What the host knows of a slot in use.

    Attributes:
        num_tokens: of the sequence, pending ones included; None until the ring has been filled
            from the convolution state that a prefill left.
        num_pending: accepted rows that the states lack.
        num_counted: tokens of the answer that the penalties' counts hold, beside the prompt; None
            where they hold another sequence's.
    """

    num_tokens: int | None = None
    num_pending: int = 0
    num_counted: int | None = None


@dataclass
class Prepared:
    """What is kept between steps."""

    tensors: StepTensors
    slots: dict[int, SlotState] = field(default_factory=dict)
    graphs: dict[Any, Any] = field(default_factory=dict)  # of `cuda_rounds`
    graph_pool: Any = None  # of memory, shared by all graphs
    launched: Any = None  # the newest rounds of `cuda_rounds`, from whose end others may go on
    addresses: list[int] = field(default_factory=list)  # of the parameters that they read
    counts: TokenCounts | None = None  # of all slots, once a sequence has penalties


def supports(step: DecodeStep, rows: WindowRows) -> str | None:
    """Say why this backend cannot run, or None."""
    if step.keys.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"the rows are on {step.keys.device}"
    if max(rows.query_lens) > MAX_WINDOW:
        return f"a window of {max(rows.query_lens)} rows, more than {MAX_WINDOW}"
    return None if step.prepared is not None else _objection(step)


def _objection(step: DecodeStep) -> str | None:
    config, dtype = step.config, step.keys.dtype
    if dtype not in DTYPES:
        return f"activations of {dtype}"
    for name, parameter in step.parameters.items():
        if parameter.dtype == EIGHT_BITS and any(size % BLOCK for size in parameter.shape[-2:]):
            return f"{name} is e4m3 of {tuple(parameter.shape)}, not of blocks of {BLOCK}"
        if parameter.dim() >= 2 and parameter.dtype not in (dtype, EIGHT_BITS):
            return f"{name} is {parameter.dtype}, activations are {dtype}"
        if parameter.dim() >= 2 and not parameter.is_contiguous():
            return f"{name} is not contiguous"
    if step.page_size & (step.page_size - 1):
        return f"page_size = {step.page_size} is not a power of two"
    if config.head_dim > MAX_HEAD_DIM:
        return f"heads of {config.head_dim} dimensions, more than {MAX_HEAD_DIM}"
    state_dim = max(config.linear_key_head_dim, config.linear_value_head_dim)
    if config.num_linear_layers and state_dim > MAX_STATE_DIM:
        return f"DeltaNet heads of {state_dim} dimensions, more than {MAX_STATE_DIM}"
    if config.num_linear_layers and config.linear_conv_kernel_dim > MAX_TAPS:
        return f"convolutions of {config.linear_conv_kernel_dim} taps, more than {MAX_TAPS}"
    if config.vocab_size > MAX_VOCAB:
        return f"{config.vocab_size} words, more than {MAX_VOCAB}"
    if config.num_experts > MAX_EXPERTS or config.num_experts_per_tok > MAX_ACTIVE:
        return f"{config.num_experts_per_tok} of {config.num_experts} experts"
    if config.num_attention_heads == config.num_key_value_heads:
        return "attention without groups of query heads"
    return None


def prepare(step: DecodeStep) -> Prepared:
    """Find the weights and make the memory that steps share."""
    config, device = step.config, step.keys.device
    cos, sin = (part.to(device, torch.float32).contiguous() for part in step.rotation)
    conv_state = step.states[0]
    layers, num_slots, channels = conv_state.shape[:3]
    # Taps before the window, then a window of pending rows and one of new ones.
    ring_rows = triton.next_power_of_2(config.linear_conv_kernel_dim - 1 + 2 * MAX_WINDOW)
    width = channels + 2 * config.linear_num_value_heads
    step.prepared = Prepared(
        StepTensors(
            step=step,
            layers=layer_weights(step, (cos, sin)),
            conv_ring=conv_state.new_zeros(layers, num_slots, ring_rows, width),
            counters=torch.zeros(128, dtype=torch.int32, device=device),
            rotation=(cos, sin),
            use_pdl=device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0),
        ),
        addresses=addresses_of(step.parameters.values()),
    )
    prepared: Prepared = step.prepared
    return prepared


def decode_step_triton(step: DecodeStep, rows: WindowRows) -> StepOutput:
    """As `decode_step_reference`; windows are padded to the longest of them."""
    prepared: Prepared = step.prepared or prepare(step)
    land(prepared)
    enter(step, rows)
    window = max(rows.query_lens)
    device = step.keys.device
    own = [
        n * window + i for n, length in enumerate(rows.query_lens) for i in range(length)
    ]  # of the padded rows
    ids = torch.zeros(len(rows.query_lens) * window, dtype=torch.int64)
    ids[own] = torch.tensor(rows.token_ids)
    own_rows = torch.tensor(own, device=device)
    hidden = None
    if rows.hidden is not None:
        hidden = rows.hidden.new_zeros(ids.shape[0], rows.hidden.shape[1])
        hidden[own_rows] = rows.hidden
    pending = [prepared.slots[slot].num_pending for slot in rows.state_slots]
    lists = torch.tensor([rows.query_lens, rows.context_lens, rows.state_slots, pending])
    lens, contexts, slots, num_pending = lists.to(device, torch.int32).unbind()
    pages = page_table(step, rows.pages).to(device)
    device_rows = DeviceRows(ids.to(device), lens, contexts, slots, num_pending, pages, hidden)
    states = run_step(prepared.tensors, device_rows)[own_rows]
    scored = states
    if rows.scores_last:
        ends = torch.tensor(rows.query_lens).cumsum(0) - 1
        scored = states[ends.to(device)]
    logits = logits_of(prepared.tensors, scored)
    return StepOutput(states, logits, best_ids(logits))


def page_table(step: DecodeStep, pages: Sequence[Sequence[int]]) -> torch.Tensor:
    """Pages of each sequence, filled up with page 0. [N, P], int32, on the host"""
    table = np.zeros((len(pages), max(map(len, pages))), dtype=np.int32)
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
    return torch.from_numpy(table)


def land(prepared: Prepared) -> None:
    """Read rounds on their way: from here on the host knows where their sequences stand.

    Raises:
        ValueError: their logits are not numbers.
    """
    launched, prepared.launched = prepared.launched, None
    if launched is not None:
        launched.read()


def start_slot(step: DecodeStep, slot: int) -> None:
    """A sequence begins in a slot, or its states were changed by others than these kernels."""
    if step.prepared is not None:
        step.prepared.slots.pop(slot, None)


def enter(step: DecodeStep, rows: WindowRows) -> None:
    """Fill the rings of sequences that come from a prefill."""
    prepared: Prepared = step.prepared
    conv_state, ring = step.states[0], prepared.tensors.conv_ring
    channels, taps = conv_state.shape[2:]
    for slot, context in zip(rows.state_slots, rows.context_lens, strict=True):
        state = prepared.slots.setdefault(slot, SlotState())
        if state.num_tokens is None and not step.prefix:
            for i in range(min(taps, context)):
                position = context - 1 - i
                inputs = conv_state[:, slot, :, taps - 1 - i]
                ring[:, slot, position % ring.shape[2], :channels] = inputs
        state.num_tokens = context


def commit_window(
    step: DecodeStep, state_slots: Sequence[int], num_accepted: Sequence[int]
) -> None:
    """Make the first rows of each window part of its sequence; the first one already is."""
    for slot, count in zip(state_slots, num_accepted, strict=True):
        state: SlotState = step.prepared.slots[slot]
        assert state.num_tokens is not None, f"slot {slot} has no window"
        state.num_tokens += count
        state.num_pending = count - 1


def read_weights(step: DecodeStep) -> None:
    """Find all weights anew; captured steps are dropped where one has moved."""
    prepared: Prepared | None = step.prepared
    if prepared is None:
        return
    land(prepared)
    known = prepared.tensors
    prepared.tensors = replace(known, layers=layer_weights(step, known.rotation))
    # All of the model's: a captured round reads the draft layer, embedding and head as well.
    addresses = addresses_of(step.parameters.values())
    if prepared.addresses != addresses:
        prepared.graphs.clear()
        prepared.graph_pool = None  # one that no graph is left of cannot be captured into again
        prepared.addresses = addresses


def settle(step: DecodeStep, commit: Any) -> None:
    """Take accepted rows into the cache's states now, for others to read. commit: not needed"""
    prepared: Prepared | None = step.prepared
    if prepared is None:
        return
    land(prepared)
    if step.config.num_linear_layers == 0:
        return
    tensors = prepared.tensors
    conv_state, states, ring = step.states[0], step.states[1], tensors.conv_ring
    channels, taps = conv_state.shape[2:]
    delta_layers = [layer for layer in tensors.layers if layer.delta is not None]
    for slot, state in prepared.slots.items():
        if state.num_tokens is None or step.prefix:
            continue
        last = state.num_tokens - 1
        if state.num_pending:
            # The last pending row as the certain row of a window of its own; nobody reads its head.
            lists = [[slot], [1], [last], [state.num_pending - 1]]
            device = ring.device
            lens = StepRows(*torch.tensor(lists, dtype=torch.int32, device=device).unbind())
            for layer in delta_layers:
                inputs = ring[layer.mixer_idx, slot, last % ring.shape[2]]
                z = inputs.new_zeros(states.shape[2] * states.shape[4])
                fused = torch.cat([inputs[:channels], z, inputs[channels:]])[None]
                memory = StepMemory(ring[layer.mixer_idx], states[layer.mixer_idx])
                assert layer.delta is not None
                gated_delta_step_fwd(fused, layer.delta, memory, lens)
            state.num_pending = 0
        for i in range(min(taps, state.num_tokens)):
            place = (last - i) % ring.shape[2]
            conv_state[:, slot, :, taps - 1 - i] = ring[:, slot, place, :channels]
