"""Pieces of the sampling kernels: order keys, integer masses, random bits.

A logit x weighs 2^(x c), c = log2(e) / temperature. Its mass is that weight as an integer, in
units of 2^-43 of the power of two at or below the weight of a reference logit. Sums of integers
don't depend on their order, so any number of programs may share a row and the result has the same
bits. See README.md.
"""

import triton
import triton.language as tl

MASS_BITS = tl.constexpr(43)
GREEDY_TEMPERATURE = tl.constexpr(1e-5)
KEY_OF_MINUS_INFINITY = tl.constexpr(-2139095041)
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST_FP32 = tl.constexpr(-3.0e38)


@triton.jit
def row_scale(temperature: tl.tensor) -> tl.tensor:
    """c of a row; a greedy row's distribution is a single token whatever its scale."""
    return LOG2_E / tl.where(temperature < GREEDY_TEMPERATURE, 1.0, temperature)


@triton.jit
def order_key(x: tl.tensor) -> tl.tensor:
    """int32 that orders fp32 numbers as they are ordered; both zeros alike."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def value_of_key(key: tl.tensor) -> tl.tensor:
    """The fp32 number of an order key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def exponent_parts(x: tl.tensor, c: tl.tensor) -> tuple[tl.tensor, ...]:
    """floor(x c) as the sum of two fp32 numbers, whose differences stay exact where they matter.

    The second is 0 unless x c is past 2^24 and its rounding is worth whole powers of two.
    """
    whole = tl.maximum(tl.floor(x * c), LOWEST_FP32)
    return whole, tl.floor(tl.fma(x, c, -whole))


@triton.jit
def mass_of(x: tl.tensor, c: tl.tensor, whole_ref: tl.tensor, extra_ref: tl.tensor) -> tl.tensor:
    """floor(2^43 * 2^(x c - exponent of the reference)), for x up to the reference. int64"""
    whole = tl.maximum(tl.floor(x * c), LOWEST_FP32)
    # The fused product keeps the digits of x c that the integer part pushed out.
    rest = tl.fma(x, c, -whole)
    shift = (whole - whole_ref) - extra_ref + MASS_BITS
    shift = tl.minimum(tl.maximum(shift, -126.0), 127.0).to(tl.int32)
    power = ((shift + 127) << 23).to(tl.float32, bitcast=True)
    return (tl.exp2(rest) * power).to(tl.int64)


@triton.jit
def scale_gap(
    whole_ref: tl.tensor, extra_ref: tl.tensor, whole: tl.tensor, extra: tl.tensor
) -> tl.tensor:
    """Bits between two references' scales, 0 to 63. int64"""
    gap = (whole_ref - whole) + (extra_ref - extra)
    return tl.minimum(tl.maximum(gap, 0.0), 63.0).to(tl.int64)


@triton.jit
def random_bits(seed: tl.tensor, position: tl.tensor, purpose: tl.tensor) -> tl.tensor:
    """64 random bits, the first Philox word above the second. uint64"""
    c0 = position.to(tl.uint32)
    c1 = (position * 0 + purpose).to(tl.uint32)
    high, low, _, _ = tl.philox(seed, c0, c1, c0 * 0, c0 * 0)
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def share_of(bits: tl.tensor, total: tl.tensor) -> tl.tensor:
    """floor(u * total), u the number in [0, 1) of the upper 53 bits. int64"""
    upper = (bits >> 11) << 11
    return tl.umulhi(upper, total.to(tl.uint64)).to(tl.int64)


@triton.jit
def log_share(mass: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Natural log of mass / total. fp32"""
    return tl.log(mass.to(tl.float32) / total.to(tl.float32))


@triton.jit
def store_sample(
    p_token: tl.tensor,
    p_logprob: tl.tensor,
    p_cut: tl.tensor,
    token: tl.tensor,
    logprob: tl.tensor,
    largest: tl.tensor,
    last_key: tl.tensor,
    last_id: tl.tensor,
    total: tl.tensor,
) -> None:
    """Write what `SampledRows` holds of one row."""
    tl.store(p_token, token.to(tl.int64))
    tl.store(p_logprob, logprob)
    tl.store(p_cut, largest.to(tl.int32, bitcast=True).to(tl.int64))
    tl.store(p_cut + 1, last_key.to(tl.int64))
    tl.store(p_cut + 2, last_id.to(tl.int64))
    tl.store(p_cut + 3, total)
