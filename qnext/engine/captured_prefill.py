"""A whole prompt on a GPU as one CUDA graph, filled up to one of a few lengths.

Below some thousand tokens the host needs longer to launch a forward pass than the device to run
it. A graph is launched once. It knows addresses and shapes alone, so the prompt's tokens, its
length and its places in the cache lie in tensors, and the rows that fill it up belong to no
sequence: their keys go to a page that nobody reads.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from qnext.cache.hybrid import HybridCache
from qnext.engine.first_pass import FirstPass
from qnext.engine.inputs import state_slot
from qnext.engine.request import Request
from qnext.engine.scheduler import PromptPart
from qnext.kernels import dispatch
from qnext.kernels.fp8_blocks import addresses_of
from qnext.model.batch import CacheInputs, ForwardBatch
from qnext.model.qwen3_next import Qwen3Next
from qnext.runtime.device import upload

_logger = logging.getLogger(__name__)

MAX_ROWS = 6144  # above, the device is the slower of the two
STEP = 64
STEPS_PER_OCTAVE = 8  # so that at most an eighth of the rows fills up
MAX_GRAPHS = 48


def padded_rows(num_tokens: int) -> int:
    """Rows of the graph for a prompt: the next multiple of a step that grows with it."""
    step = _step(num_tokens)
    return -(-num_tokens // step) * step


def _step(num_tokens: int) -> int:
    """Tokens from one number of rows to the next."""
    octave = 1 << (num_tokens - 1).bit_length() >> 1
    return max(STEP, octave // STEPS_PER_OCTAVE)


@dataclass
class _Prompt:
    """Inputs of a pass over B rows, and what it gave.

    Attributes:
        token_ids, slot_mapping: [B], int64
        bounds: 0 and the prompt's length. [2], int32
        state_slots: [1], int64
        padding: which of the last rows fill up. [P], bool
        hidden: states after the final norm. [B, C]
        logits: of the prompt's last row. [1, W]
    """

    token_ids: torch.Tensor
    slot_mapping: torch.Tensor
    bounds: torch.Tensor
    state_slots: torch.Tensor
    padding: torch.Tensor
    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


def objection(model: Qwen3Next) -> str | None:
    """Why prompts of a model are not captured, or None.

    Rows that belong to no sequence, and passes without a wait of the host, are what the delta
    rule's GPU kernels can do and its PyTorch forms cannot.
    """
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    config, device = model.config, model.device
    wide = torch.promote_types(model.dtype, torch.float32)
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    keys = torch.empty(1, config.linear_num_key_heads, key_dim, dtype=model.dtype, device=device)
    gates = torch.empty(1, config.linear_num_value_heads, dtype=wide, device=device)
    values = keys.new_empty(*gates.shape, value_dim)
    (kernel,) = (k for k in dispatch.gated_delta_rule.kernels if k.backend == "triton")
    return kernel.supports(
        *(keys, keys, values, gates, gates),
        cu_seqlens=torch.empty(2, dtype=torch.int32, device=device),
        initial_state=gates.new_empty(*gates.shape, key_dim, value_dim),
    )


class CapturedPrefill:
    """Passes over whole prompts that are alone in theirs.

    A length that comes for the second time is captured: the first pass has compiled its kernels.

    Args:
        model: on a GPU; elsewhere passes are filled up in the same way and run launch by launch.
        cache: with a page more than sequences are given, its last.
    """

    def __init__(self, model: Qwen3Next, cache: HybridCache) -> None:
        self.model, self.cache = model, cache
        self.is_capturing = model.device.type == "cuda"
        self._first_pass = FirstPass(cache, model.device)
        self._prompts: dict[int, _Prompt] = {}
        self._num_passes: Counter[int] = Counter()
        self._pool: Any = None
        self._addresses: list[int] = []

    def takes(self, parts: Sequence[PromptPart]) -> bool:
        """Whether a pass over these parts is run here."""
        if len(parts) != 1 or parts[0].start > 0 or dispatch.named_backends():
            return False
        return parts[0].end == parts[0].request.num_prompt_tokens <= MAX_ROWS

    def read_weights(self) -> None:
        """Look at the model's weights anew: graphs are dropped where one has moved."""
        addresses = addresses_of(self.model.parameters())
        if addresses != self._addresses:
            self._prompts.clear()
            self._num_passes.clear()
            self._pool = None  # one that no graph is left of cannot be captured into again
            self._addresses = addresses

    def run(self, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
        """Feed a whole prompt.

        Returns:
            States after the final norm [T, C] and the last row's logits [1, W]; the next call
            writes to the same memory.
        """
        num_tokens = request.num_prompt_tokens
        num_rows = padded_rows(num_tokens)
        prompt = self._prompts.get(num_rows) or self._add(num_rows)
        self._send(prompt, request)
        self._num_passes[num_rows] += 1
        if self.is_capturing and prompt.graph is None and self._num_passes[num_rows] > 1:
            self._capture(prompt)
        if prompt.graph is None:
            self._first_pass.prepare(partial(self._forward, prompt), [request])
            self._forward(prompt)
        else:
            prompt.graph.replay()
        assert prompt.hidden is not None and prompt.logits is not None, "a pass leaves its results"
        return prompt.hidden[:num_tokens], prompt.logits

    def _add(self, num_rows: int) -> _Prompt:
        if len(self._prompts) == MAX_GRAPHS:
            del self._prompts[next(iter(self._prompts))]  # the one that was made first
        device = self.model.device

        def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self._prompts[num_rows] = _Prompt(
            zeros(num_rows, torch.int64),
            zeros(num_rows, torch.int64),
            zeros(2, torch.int32),
            zeros(1, torch.int64),
            zeros(_step(num_rows) - 1, torch.bool),
        )
        return self._prompts[num_rows]

    def _send(self, prompt: _Prompt, request: Request) -> None:
        num_rows, page_size = prompt.token_ids.shape[0], self.cache.page_size
        num_tokens = request.num_prompt_tokens
        positions = np.arange(num_rows)
        token_ids = np.zeros(num_rows, np.int64)
        token_ids[:num_tokens] = request.prompt_array
        # A page that no sequence is given takes what fills up.
        places = self.cache.kv_pool.k.shape[1] - page_size + positions % page_size
        pages = np.array(request.page_ids, np.int64)[positions[:num_tokens] // page_size]
        places[:num_tokens] = pages * page_size + positions[:num_tokens] % page_size
        padding = positions[-prompt.padding.shape[0] :] >= num_tokens
        sent = upload(
            [
                token_ids,
                places,
                np.array([0, num_tokens], np.int32),
                np.array([state_slot(request)], np.int64),
                padding.view(np.uint8),
            ],
            self.model.device,
        )
        buffers = (
            prompt.token_ids,
            prompt.slot_mapping,
            prompt.bounds,
            prompt.state_slots,
            prompt.padding,
        )
        for buffer, values in zip(buffers, sent, strict=True):
            buffer.copy_(values)

    def _forward(self, prompt: _Prompt) -> None:
        num_rows, device = prompt.token_ids.shape[0], self.model.device
        batch = ForwardBatch(
            token_ids=prompt.token_ids,
            position_ids=torch.arange(num_rows, device=device),
            cu_seqlens=prompt.bounds,
            seq_lens=(num_rows,),
            cache_inputs=CacheInputs(
                # Nobody looks there: slot_mapping names all keys of a prompt that begins here.
                page_table=torch.zeros(1, 0, dtype=torch.int32, device=device),
                slot_mapping=prompt.slot_mapping,
                context_lens=(0,),
                state_slots=(0,),
                is_window=False,
                state_slot_ids=prompt.state_slots,
            ),
            tail_padding=prompt.padding,
        )
        prompt.hidden = self.model(batch, self.cache)
        last = prompt.hidden.index_select(0, prompt.bounds[1:].long() - 1)
        prompt.logits = self.model.compute_logits(last)

    def _capture(self, prompt: _Prompt) -> None:
        """Capture the pass, or give up capturing where memory is short: plain passes need less."""
        try:
            prompt.graph = self._record(prompt)
        except torch.OutOfMemoryError as problem:
            self.is_capturing = False  # graphs that there are stay in use
            reason = str(problem).splitlines()[0]
            _logger.warning(
                "no more prompts are captured, %d tokens did not fit: %s",
                prompt.token_ids.shape[0],
                reason,
            )

    def _record(self, prompt: _Prompt) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # One pool for all: only one runs at a time, and what it leaves is held.
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._forward(prompt)
        except RuntimeError:
            if not any(known.graph for known in self._prompts.values()):
                self._pool = None
            raise
        return graph
