"""Functions of single numbers, shared by the kernels of this op."""

import triton
import triton.language as tl


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """x * sigmoid(x)"""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + exp(x)), accurate also where exp(x) is far below 1."""
    e = tl.exp(tl.minimum(x, 20.0))
    one_more = 1.0 + e
    # log(1 + e) loses the digits that 1 + e drops; the quotient puts them back.
    exact = tl.where(one_more == 1.0, e, tl.log(one_more) * (e / (one_more - 1.0)))
    return tl.where(x > 20.0, x, exact)
