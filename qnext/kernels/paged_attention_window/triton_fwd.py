"""Gated Attention between its projections over paged keys on a GPU: see the README."""

from dataclasses import dataclass

import torch
import triton

from qnext.kernels.paged_attention_window.reference import HeadWeights, Window
from qnext.kernels.paged_attention_window.triton_splits import (
    paged_attention_window_combine_kernel,
    paged_attention_window_fwd_kernel,
)

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MAX_WINDOW = 16
# Programs in flight: two on each of 132 SMs, so that one loads while the other computes.
NUM_PROGRAMS = 2 * 132
# Fewer keys than this are not worth a program and a partial result of their own.
MIN_KEYS = 64
# One block of keys and values multiplies while the two after it are on their way.
NUM_STAGES = 3
# Lengths that a program reads at once.
CHUNK_SEQS = 128


@dataclass(frozen=True)
class SplitPlan:
    """How a launch is cut; it follows from shapes alone.

    Attributes:
        BM, BN: query rows of a program, keys of a block.
        num_tiles: programs that share a key-value head's query rows.
        target: splits that a key-value head's rows get in all, where the keys are divided.
        num_programs: programs for one tile of one key-value head.
        num_items: most splits that the page table allows, which is room for partial results.
        is_combined: some sequence may have several splits.
    """

    BM: int
    BN: int
    num_tiles: int
    target: int
    num_programs: int
    num_items: int
    is_combined: bool

    @classmethod
    def of(
        cls, num_seqs: int, num_rows: int, num_kv_heads: int, row_bytes: int,
        max_keys: int, keys_per_split: int | None,
    ) -> "SplitPlan":  # fmt: skip
        """num_rows: query rows of a key-value head; row_bytes: of one key, as it is multiplied."""
        # With divided keys, 32 rows read them once; fixed splits always take 16, since the order
        # of a row's sums follows from the tile's height.
        BM = 16 if keys_per_split or num_rows <= 16 else 32
        BN = min(64, max(16, triton.next_power_of_2(16384 // row_bytes)))
        num_tiles = triton.cdiv(num_rows, BM)
        target = max(1, NUM_PROGRAMS // (num_kv_heads * num_tiles))
        most = triton.cdiv(max_keys, keys_per_split or MIN_KEYS)
        if keys_per_split:
            num_items = num_seqs * most
            # Some more than fit, so that short ones make room.
            num_programs = min(num_items, 4 * target)
        else:
            num_items = num_programs = min(num_seqs * most, num_seqs + target)
        return cls(BM, BN, num_tiles, target, num_programs, num_items, most > 1)


def paged_attention_window_fwd(
    fused: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    weights: HeadWeights,
    window: Window,
    *,
    scale: float,
    keys_per_split: int | None,
    use_pdl: bool,
) -> torch.Tensor:
    """Launch the attention kernel, and the one that combines splits where there may be several."""
    num_seqs, max_pages = window.page_table.shape
    _, hkv, d = k_cache.shape
    hq = fused.shape[1] // (2 * d) - hkv
    max_window = fused.shape[0] // num_seqs
    is_half = fused.dtype == k_cache.dtype != torch.float32
    BD = max(16, triton.next_power_of_2(d))
    plan = SplitPlan.of(
        num_seqs, max_window * (hq // hkv), hkv, BD * (2 if is_half else 4),
        max_pages * window.page_size, keys_per_split,
    )  # fmt: skip
    out = torch.empty(fused.shape[0], hq * d, dtype=fused.dtype, device=fused.device)
    items = torch.empty(num_seqs, 2, dtype=torch.int32, device=fused.device)
    part_shape = (plan.num_items, max_window * hq)
    acc = torch.empty(*part_shape, d, dtype=torch.float32, device=fused.device)
    maxima, sums = torch.empty(2, *part_shape, dtype=torch.float32, device=fused.device)
    sizes = {"Q": max_window, "HQ": hq, "HKV": hkv, "D": d}
    is_overlapped = use_pdl and fused.is_cuda
    options = {"USE_PDL": is_overlapped, **({"launch_pdl": True} if is_overlapped else {})}
    paged_attention_window_fwd_kernel[(hkv * plan.num_tiles, plan.num_programs)](
        fused, weights.q_norm, weights.k_norm, weights.cos, weights.sin, k_cache, v_cache,
        window.page_table, window.context_lens, window.query_lens, out, items, acc, maxima, sums,
        weights.eps, scale, num_seqs, plan.target, window.page_table.stride(0),
        **sizes, HALF=weights.cos.shape[1], PAGE=window.page_size, KEYS=keys_per_split or 0,
        MIN=MIN_KEYS, BM=plan.BM, BN=plan.BN, BD=BD, BQ=MAX_WINDOW, BS=CHUNK_SEQS,
        PRECISION="ieee", num_warps=4, num_stages=NUM_STAGES, **options,
    )  # fmt: skip
    if plan.is_combined:
        # Narrow programs where rows are few; with fixed splits always, for the order of sums.
        is_narrow = keys_per_split or num_seqs * max_window * hq <= 4 * NUM_PROGRAMS
        BC = min(BD, 64) if is_narrow else BD
        grid = (max_window * hq, triton.cdiv(d, BC), num_seqs)
        paged_attention_window_combine_kernel[grid](
            fused, window.query_lens, items, acc, maxima, sums, out,
            **sizes, BD=BC, BP=64 if BC <= 64 else 32, num_warps=4, **options,
        )  # fmt: skip
    return out


def supports(
    fused: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    weights: HeadWeights,
    window: Window,
    *,
    scale: float,
    keys_per_split: int | None = None,
    use_pdl: bool = False,
) -> str | None:
    """Say why this backend cannot run, or None."""
    _, hkv, d = k_cache.shape
    num_seqs = window.page_table.shape[0]
    if not fused.is_cuda and not triton.knobs.runtime.interpret:
        return f"rows on {fused.device}, not on a GPU"
    if torch.is_grad_enabled() and fused.requires_grad:
        return "it has no gradient"
    for name, tensor in (("rows", fused), ("keys", k_cache), ("values", v_cache)):
        if tensor.dtype not in FLOAT_DTYPES:
            return f"{name} of {tensor.dtype}, not fp16, bf16 or fp32"
    if k_cache.dtype != v_cache.dtype:
        return f"keys of {k_cache.dtype} with values of {v_cache.dtype}"
    if not weights.cos.dtype == weights.sin.dtype == torch.float32:
        return f"rotary angles of {weights.cos.dtype}, not fp32"
    lengths = (window.page_table, window.context_lens, window.query_lens)
    if any(tensor.dtype != torch.int32 for tensor in lengths):
        return f"pages and lengths of {[tensor.dtype for tensor in lengths]}, not int32"
    everything = (fused, k_cache, v_cache, weights.cos, weights.sin, *lengths)
    if not all(tensor.is_contiguous() for tensor in everything):
        return "inputs are not all contiguous"
    if d > MAX_HEAD_DIM:
        return f"heads of {d} dimensions, more than {MAX_HEAD_DIM}"
    if num_seqs == 0 or fused.shape[0] % num_seqs or fused.shape[0] > num_seqs * MAX_WINDOW:
        return f"{fused.shape[0]} rows of {num_seqs} sequences, not 1 to {MAX_WINDOW} of each"
    num_heads, rest = divmod(fused.shape[1], 2 * d)
    if rest or num_heads <= hkv or num_heads % hkv:
        return f"rows of {fused.shape[1]}: not two times whole query and {hkv} key heads of {d}"
    if window.page_size & (window.page_size - 1):
        return f"page_size = {window.page_size} is not a power of two"
    if keys_per_split is not None and (keys_per_split <= 0 or keys_per_split % MIN_KEYS):
        return f"keys_per_split = {keys_per_split} is not a multiple of {MIN_KEYS}"
    return None


def paged_attention_window_triton(
    fused: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    weights: HeadWeights,
    window: Window,
    *,
    scale: float,
    keys_per_split: int | None = None,
    use_pdl: bool = False,
) -> torch.Tensor:
    """As `paged_attention_window_reference`; fp32 sums, the grid follows from shapes alone."""
    return paged_attention_window_fwd(
        fused, k_cache, v_cache, weights, window,
        scale=scale, keys_per_split=keys_per_split, use_pdl=use_pdl,
    )  # fmt: skip
