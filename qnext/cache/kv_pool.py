"""Keys and values of the attention layers, one row per token, rows handed out in pages."""

import math

import numpy as np
import torch


class KVPool:
    """Rows for keys and values; a page is `page_size` rows that follow one another.

    Attributes:
        k, v: [L, num_pages * page_size, Hkv, D], L counting attention layers, MTP's last.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        head_shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.page_size = page_size
        shape = (num_layers, num_pages * page_size, *head_shape)
        self.k = _lazy_zeros(shape, dtype, device)
        self.v = _lazy_zeros(shape, dtype, device)

    def write(
        self, layer_idx: int, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Store keys and values of new tokens. k, v: [T, Hkv, D]; slot_mapping: rows [T]."""
        self.k[layer_idx].index_copy_(0, slot_mapping, k.to(self.k.dtype))
        self.v[layer_idx].index_copy_(0, slot_mapping, v.to(self.v.dtype))


def _lazy_zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Zeros that on a CPU take no memory until written: torch.zeros would touch all of them."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
