"""States of the DeltaNet layers: one committed state per sequence and the rows of its window.

A verification window leaves the committed state as it is and records, for every row, what the
row would write: k, the change d, the decay exp(g), and the raw convolution input. Accepting a
row replays its write. One state per sequence is enough, however many drafts were rejected.
"""

import torch

from qnext.config.model import ModelConfig


class StatePool:
    """Slots of DeltaNet memory.

    Attributes:
        recurrent_state: [L, S, Hv, K, V], fp32 (fp64 for a float64 model).
        conv_state: last raw inputs of the convolution, oldest first. [L, S, D, width - 1]
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        max_window: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        layers = config.num_linear_layers
        key_heads, key_dim = config.linear_num_key_heads, config.linear_key_head_dim
        heads, value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        wide = torch.promote_types(dtype, torch.float32)
        self.max_window = max_window
        self._group = heads // key_heads

        def zeros(*shape: int, dtype: torch.dtype = wide) -> torch.Tensor:
            return torch.zeros(layers, num_slots, *shape, dtype=dtype, device=device)

        history = config.linear_conv_kernel_dim - 1
        self.recurrent_state = zeros(heads, key_dim, value_dim)
        self.conv_state = zeros(config.conv_dim, history, dtype=dtype)
        self._window_keys = zeros(max_window, key_heads, key_dim)
        self._window_changes = zeros(max_window, heads, value_dim)
        self._window_decays = zeros(max_window, heads)
        self._window_inputs = zeros(max_window, config.conv_dim, dtype=dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All memory: convolution and recurrent states; window keys, changes, decays and inputs."""
        return (
            self.conv_state,
            self.recurrent_state,
            self._window_keys,
            self._window_changes,
            self._window_decays,
            self._window_inputs,
        )

    def reset(self, state_slots: torch.Tensor) -> None:
        """Make slots those of a sequence with no token yet. state_slots: [N]"""
        self.recurrent_state[:, state_slots] = 0
        self.conv_state[:, state_slots] = 0

    def record(
        self,
        layer_idx: int,
        slots: torch.Tensor,
        steps: torch.Tensor,
        *,
        keys: torch.Tensor,
        changes: torch.Tensor,
        decays: torch.Tensor,
        inputs: torch.Tensor,
    ) -> None:
        """Keep what window rows would write.

        Args:
            layer_idx: index among the DeltaNet layers.
            slots, steps: slot of each row, and its index in its window. [T]
            keys: [T, Hk, K]
            changes: [T, Hv, V]
            decays: exp(g). [T, Hv]
            inputs: raw convolution inputs. [T, D]
        """
        self._window_keys[layer_idx, slots, steps] = keys.to(self._window_keys.dtype)
        self._window_changes[layer_idx, slots, steps] = changes
        self._window_decays[layer_idx, slots, steps] = decays
        self._window_inputs[layer_idx, slots, steps] = inputs.to(self._window_inputs.dtype)

    def commit(self, state_slots: tuple[int, ...], num_accepted: tuple[int, ...]) -> None:
        """Replay the first accepted rows of each window into the committed states.

        Args:
            state_slots: slots of the sequences. N
            num_accepted: rows to replay of each, 0 to max_window.

        Raises:
            ValueError: more rows than a window holds.
        """
        if max(num_accepted, default=0) > self.max_window:
            raise ValueError(f"num_accepted = {num_accepted}: a window holds {self.max_window}")
        device = self.recurrent_state.device
        for step in range(max(num_accepted, default=0)):
            pairs = zip(state_slots, num_accepted, strict=True)
            slots = torch.tensor([slot for slot, count in pairs if count > step], device=device)
            keys = self._window_keys[:, slots, step].repeat_interleave(self._group, dim=2)
            state = self.recurrent_state[:, slots]  # [L, n, Hv, K, V]
            state = state * self._window_decays[:, slots, step, :, None, None]
            state = state + keys[..., None] * self._window_changes[:, slots, step][:, :, :, None]
            self.recurrent_state[:, slots] = state
            taken = self._window_inputs[:, slots, step][..., None]
            self.conv_state[:, slots] = torch.cat([self.conv_state[:, slots, :, 1:], taken], dim=-1)
