"""Sizes of the engine: what the caller gave, checked, and what was left open, chosen."""

import torch

from qnext.config.model import ModelConfig
from qnext.engine.engine import EngineOptions
from qnext.engine.request import check_drafts, require_integer
from qnext.model.qwen3_next import Qwen3Next
from qnext.runtime.log import get_logger, log_once

PREFILL_CHUNK_TOKENS = {"cpu": 512, "cuda": 32768}  # rows enough for large products
# Prompts in a pass. On a CPU one, whose text then never depends on others (docs/numerics.md). On a
# GPU a short prompt alone would be slower on the host; each takes a DeltaNet state more in a pass.
MAX_PREFILL_SEQS = {"cpu": 1, "cuda": 256}
PAGE_SIZE = 64
AUTO_MAX_DRAFTS = 4
DEFAULT_MAX_SEQS = {"cpu": 8, "cuda": 32}
CPU_CACHE_BYTES = 1 << 30
GPU_CACHE_SHARE = 0.6  # of the memory that is free once the weights are there

_logger = get_logger(__name__)


def engine_options(
    model: Qwen3Next,
    *,
    max_model_len: int | None,
    max_num_seqs: int | None,
    num_speculative_tokens: int | str,
    kv_cache_memory_bytes: int | None,
    prefill_chunk_tokens: int | None = None,
    page_size: int = PAGE_SIZE,
) -> EngineOptions:
    """Resolve every size that was left open; arguments as for `LLM`.

    Raises:
        ValueError: a size out of range, drafts asked of a model without an MTP head, or a cache
            too small for one sequence of max_model_len.
    """
    check_drafts(num_speculative_tokens)
    is_auto = num_speculative_tokens == "auto"
    max_drafts = AUTO_MAX_DRAFTS if is_auto else int(num_speculative_tokens)
    if max_drafts and not model.has_mtp:
        if not is_auto:
            raise ValueError(
                f"num_speculative_tokens is {max_drafts}, but this checkpoint has no MTP head "
                '(no mtp.* tensors); want 0 or "auto"'
            )
        log_once(_logger, "this checkpoint has no MTP head: generating without drafts", level=20)
        max_drafts = 0
    if max_num_seqs is None:
        max_num_seqs = DEFAULT_MAX_SEQS.get(model.device.type, DEFAULT_MAX_SEQS["cpu"])
    require_integer("max_num_seqs", max_num_seqs, 1)
    if prefill_chunk_tokens is None:
        prefill_chunk_tokens = PREFILL_CHUNK_TOKENS.get(model.device.type, 512)
    require_integer("prefill_chunk_tokens", prefill_chunk_tokens, 1)
    require_integer("page_size", page_size, 1)
    longest = model.config.max_position_embeddings
    if max_model_len is not None:
        require_integer("max_model_len", max_model_len, 2)
    if kv_cache_memory_bytes is None:
        kv_cache_memory_bytes = _default_cache_bytes(model.device)
    require_integer("kv_cache_memory_bytes", kv_cache_memory_bytes, 1)
    if max_model_len is not None and max_model_len > longest:
        raise ValueError(
            f"max_model_len is {max_model_len}; want 2 to {longest}, the model's "
            "max_position_embeddings"
        )
    page_bytes = page_size * _token_bytes(model.config, max_drafts > 0, model.dtype)
    affordable = kv_cache_memory_bytes // page_bytes
    pages_each = -(-(max_model_len or longest) // page_size)
    if max_model_len is None and affordable >= 1:
        longest = min(longest, affordable * page_size)
        pages_each = -(-longest // page_size)
    if affordable < pages_each:
        raise ValueError(
            f"max_model_len is {max_model_len or longest}, {pages_each * page_bytes:,} bytes of "
            f"keys and values; kv_cache_memory_bytes allows {kv_cache_memory_bytes:,}"
        )
    return EngineOptions(
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len or longest,
        num_pages=min(pages_each * max_num_seqs, affordable),
        page_size=page_size,
        prefill_chunk_tokens=prefill_chunk_tokens,
        max_prefill_seqs=MAX_PREFILL_SEQS.get(model.device.type, 1),
        max_drafts=max_drafts,
        is_auto=is_auto,
    )


def _token_bytes(config: ModelConfig, has_mtp: bool, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes."""
    num_layers = config.num_attention_layers + int(has_mtp)
    row = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return max(1, num_layers * row)


def _default_cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes * GPU_CACHE_SHARE)
    return CPU_CACHE_BYTES
