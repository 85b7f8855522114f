"""What the measured numbers are held against: limits of the machine, aims, and other engines.

All belong to one H100 80GB HBM3 and hold for other machines and sizes only as an orientation.
"""

from dataclasses import dataclass

CARD = "NVIDIA H100 80GB HBM3"
SOURCE = (
    "vLLM 0.22.1 (Triton DeltaNet prefill, FlashAttention-3, CUDA graphs, bf16 DeltaNet state, no "
    "MTP) and the limits were measured on one H100 80GB HBM3 with torch 2.11+cu130 and triton 3.6 "
    "on 2026-11-23. A limit is the larger of bytes over 3.0 TB/s and flops over 760 TFLOP/s, both "
    "measured there, with uniform routing and fp32 state."
)


@dataclass(frozen=True)
class Anchor:
    """What a cell is held against, in the cell's unit; None where there is no figure."""

    limit: float | None = None
    aim: float | None = None
    vllm: float | None = None


# Next-12L: the 80B-A3B configuration with 12 of its 48 layers, bf16, by the names of cells.
NEXT_12L = {
    "prefill-4096": Anchor(limit=306_000, aim=160_000, vllm=102_400),
    "prefill-32768": Anchor(limit=307_000, aim=210_000, vllm=144_000),
    "prefill-131072": Anchor(limit=155_000, aim=124_000, vllm=97_800),
    "decode-1x1024": Anchor(limit=1_308, aim=1_000, vllm=470),
    "decode-1x32768": Anchor(limit=1_206, aim=870, vllm=355),
    "decode-8x1024": Anchor(limit=3_202, aim=2_750, vllm=2_220),
    "decode-32x1024": Anchor(limit=4_570, aim=4_250, vllm=4_062),
    "decode-128x1024": Anchor(limit=8_970, aim=8_550, vllm=8_710),
    "decode-8x32768": Anchor(limit=2_650, aim=2_250, vllm=1_824),
    # vLLM: 140 to 177 s with an empty compile cache.
    "start": Anchor(aim=20, vllm=140),
}
# Share of the datasheet's peak that training is to reach at 4 layers.
TRAIN_SHARE_AIM = 0.35
# Drafts of random weights are refused, so speed with accepted ones is worked out for this share.
STATED_ACCEPTANCE = 0.8
