"""Elementary functions for loops that LLVM turns into vector code, and small loops over rows.

The C library's exponential is a call for each number. These are plain arithmetic, so a loop over
them runs 8 or 16 numbers at a time. Nothing here may be reordered or contracted: a number gives the
same bits in the body of a vector loop and in its tail.
"""

from typing import Any

import numpy as np

from qnext.kernels.cpu_lanes import from_bits, inner

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts; the first has so few bits that its product with a small integer is exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# Added and taken away again, it rounds to the nearest integer.
_ROUNDING = np.float32(12582912.0)
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
_ONE, _HALF = np.float32(1.0), np.float32(0.5)


@inner
def exp(x: Any) -> Any:
    """e^x of one fp32 number, within 2 units in the last place; e^-87 for anything below -87.

    Source of the polynomial: Cephes, expf
    """
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    n = (x * _LOG2_E + _ROUNDING) - _ROUNDING
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    y = p * (r * r) + r + _ONE
    return y * from_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))


@inner
def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x) of one fp32 number."""
    return _ONE / (_ONE + exp(-x))


@inner
def silu(x: Any) -> Any:
    """x / (1 + e^-x) of one fp32 number."""
    return x / (_ONE + exp(-x))


@inner
def softplus(x: Any) -> Any:
    """log(1 + e^x) of one fp32 number; x itself where the difference is below rounding."""
    return x if x > np.float32(20.0) else np.float32(np.log1p(np.exp(x)))


@inner
def sum_of_squares(row: Any, size: Any) -> Any:
    """Sum of squares in four running sums; the order depends on size alone. row: `size` fp32"""
    s0, s1, s2, s3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    whole = size // 4 * 4
    for i in range(0, whole, 4):
        s0 += row[i] * row[i]
        s1 += row[i + 1] * row[i + 1]
        s2 += row[i + 2] * row[i + 2]
        s3 += row[i + 3] * row[i + 3]
    for i in range(whole, size):
        s0 += row[i] * row[i]
    return (s0 + s2) + (s1 + s3)


@inner
def rms_norm_row(row: Any, weight: Any, size: Any, eps: Any, out: Any) -> None:
    """Zero-centred RMSNorm of one row. row, weight, out: `size` fp32; out may be the row."""
    inverse = _ONE / np.sqrt(sum_of_squares(row, size) / np.float32(size) + eps)
    for i in range(size):
        out[i] = row[i] * inverse * (_ONE + weight[i])
