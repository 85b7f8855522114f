"""AdamW with narrow weights and moments, plain PyTorch."""

import torch

from qnext.kernels.adamw.moments import BLOCK, AdamWRule, Moments

# Places of the numbers that a step leaves on the device for all parameters.
NUM_RATES = 7
GRAD_FACTOR, LR, DECAY, MEAN_FACTOR, ROOT_FACTOR, IS_APPLIED, STEP = range(NUM_RATES)


def adamw_reference(
    param: torch.Tensor,
    grad: torch.Tensor,
    moments: Moments,
    rates: torch.Tensor,
    rule: AdamWRule,
    salt: int = 0,
) -> None:
    """Update one parameter and its moments in place; nothing changes where rates say so.

        g = GRAD_FACTOR grad;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        w <- (1 - DECAY) w - LR MEAN_FACTOR m / (ROOT_FACTOR sqrt(v) + eps)

    The update reads m and v before they are rounded to what is kept.

    Args:
        param: fp32, bf16 or fp16, contiguous.
        grad: of its shape, any float dtype.
        moments: of the parameter.
        rates: factor of the gradient, learning rate, learning rate times weight decay, the
            reciprocals 1 / (1 - b1^t) and 1 / sqrt(1 - b2^t), 1 to apply the step and 0 to skip
            it, and t. [7], fp32
        rule: see `AdamWRule`.
        salt: tells apart the random numbers of parameters.

    Source: AdamW, https://arxiv.org/abs/1711.05101; 8-bit moments by blocks,
        https://arxiv.org/abs/2110.02861
    """
    is_good = rates[IS_APPLIED] > 0
    g = grad.float().reshape(-1) * rates[GRAD_FACTOR]
    w = param.float().reshape(-1)
    mean, root = _widened(moments)
    mean = rule.beta1 * mean + (1 - rule.beta1) * g
    square = rule.beta2 * root * root + (1 - rule.beta2) * g * g
    root = square.sqrt()
    w = w - rates[DECAY] * w
    w = w - rates[LR] * rates[MEAN_FACTOR] * mean / (root * rates[ROOT_FACTOR] + rule.eps)
    noise = _noise(w.numel(), rates[STEP], salt, w.device) if rule.is_stochastic else None
    _put(param, is_good, _rounded(w, param.dtype, noise))
    if moments.is_8bit:
        _put_codes(moments, mean, root, is_good, noise)
    else:
        _put(moments.mean, is_good, mean.to(moments.mean.dtype))
        _put(moments.square, is_good, square.to(moments.square.dtype))


def _widened(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the root of the mean square in fp32. [n] each"""
    mean, square = moments.mean.float().reshape(-1), moments.square.float().reshape(-1)
    if not moments.is_8bit:
        return mean, square.sqrt()
    scales = [
        scale.repeat_interleave(BLOCK)[: mean.numel()]
        for scale in (moments.mean_scale, moments.root_scale)
    ]
    return mean.sign() * (mean / 127).square() * scales[0], (square / 255).square() * scales[1]


def _put(target: torch.Tensor, is_good: torch.Tensor, value: torch.Tensor) -> None:
    target.copy_(torch.where(is_good, value.to(target.dtype).view(target.shape), target))


def _put_codes(
    moments: Moments,
    mean: torch.Tensor,
    root: torch.Tensor,
    is_good: torch.Tensor,
    noise: torch.Tensor | None,
) -> None:
    low, high = (0.5, 0.5) if noise is None else ((noise >> 16) % 256 / 256, (noise >> 24) / 256)
    size = mean.numel()

    def share(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale of each block, and the root of each magnitude over it."""
        blocks = torch.nn.functional.pad(x.abs(), [0, -size % BLOCK]).view(-1, BLOCK)
        top = blocks.amax(1)
        inverse = torch.where(top > 0, 1 / top, 0.0)
        return top, (blocks * inverse[:, None]).view(-1)[:size].sqrt()

    top, place = share(mean)
    codes = (place * 127 + low).floor().clamp(max=127) * mean.sign()
    _put(moments.mean_scale, is_good, top)
    _put(moments.mean, is_good, codes)
    top, place = share(root)
    # A root that is not zero keeps a code that is not: the update divides by it.
    codes = (place * 255 + high).floor().clamp(max=255)
    _put(moments.root_scale, is_good, top)
    _put(moments.square, is_good, torch.where(root > 0, codes.clamp(min=1), 0.0))


def _noise(size: int, step: torch.Tensor, salt: int, device: torch.device) -> torch.Tensor:
    """32 random bits for each element: a hash of its place, the step and the salt. [n], int64"""
    mask = 0xFFFFFFFF
    bits = torch.arange(size, device=device) & mask
    bits = bits ^ ((step.long() * 0x9E3779B9 + salt * 0x85EBCA6B) & mask)
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & mask
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & mask
    return bits ^ (bits >> 16)


def _rounded(x: torch.Tensor, dtype: torch.dtype, noise: torch.Tensor | None) -> torch.Tensor:
    """x in dtype; with noise bf16 is rounded up as often as its rest says. [n]"""
    if dtype != torch.bfloat16 or noise is None:
        return x.to(dtype)
    bits = (x.view(torch.int32) + (noise & 0xFFFF).int()) & -65536
    # A number that is not finite is left alone: the sum could turn it into another.
    return torch.where(torch.isfinite(x), bits.view(torch.float32), x).to(dtype)
