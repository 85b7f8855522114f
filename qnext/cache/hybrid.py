"""The cache of the hybrid: pages for attention, state slots for DeltaNet."""

import numpy as np
import torch

from qnext.cache.kv_pool import KVPool
from qnext.cache.state_pool import StatePool
from qnext.config.model import ModelConfig
from qnext.runtime.device import upload


class HybridCache:
    """All memory of running sequences, allocated once.

    Args:
        config: sizes of the model.
        has_mtp: keep a key-value layer for Multi-Token Prediction, after the others.
        num_pages: pages of `page_size` tokens each, shared by all sequences.
        page_size: tokens per page.
        num_state_slots: sequences that can hold a DeltaNet state at once.
        max_window: most rows of one verification window, drafts + 1.
        dtype: of keys, values and convolution inputs; recurrent states are fp32 at least.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        has_mtp: bool,
        num_pages: int,
        page_size: int = 64,
        num_state_slots: int,
        max_window: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.mtp_layer_idx = config.num_attention_layers
        self.kv_pool = KVPool(
            config.num_attention_layers + int(has_mtp),
            num_pages,
            page_size,
            (config.num_key_value_heads, config.head_dim),
            dtype=dtype,
            device=device,
        )
        self.state_pool = StatePool(config, num_state_slots, max_window, dtype=dtype, device=device)

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.kv_pool.page_size

    @property
    def num_bytes(self) -> int:
        """Memory of pages, states and windows."""
        pools = (*vars(self.kv_pool).values(), *vars(self.state_pool).values())
        return sum(part.nbytes for part in pools if isinstance(part, torch.Tensor))

    def reset_state(self, state_slots: list[int]) -> None:
        """Prepare slots for new sequences."""
        device = self.state_pool.recurrent_state.device
        (slots,) = upload([np.array(state_slots, np.int64)], device)
        self.state_pool.reset(slots)

    def commit(self, state_slots: tuple[int, ...], num_accepted: tuple[int, ...]) -> None:
        """Advance DeltaNet states by the accepted rows of the last window of each sequence.

        Keys and values need nothing: rejected rows lie past the sequence's new end, and the next
        window overwrites them.
        """
        self.state_pool.commit(state_slots, num_accepted)
