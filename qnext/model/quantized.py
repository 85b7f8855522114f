"""Matrices held in 8 bits inside a model: which ones, how they are made, what copies keep.

In fp8 these are what the published FP8 checkpoints hold in it: projections of the mixers, experts
and shared experts. Embedding, head, routers, gates, norms, convolutions, the MTP head's `fc` and
DeltaNet's b and a, which decide what its state keeps, stay as they are.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from qnext.kernels import fp8_blocks
from qnext.kernels.fp8_blocks import BLOCK, quantize_blocks, scale_shape

FP8 = fp8_blocks.DTYPE
DTYPES = (torch.int8, FP8)
# By the last part of their names.
FP8_MATRICES = (
    "in_proj",
    "out_proj",
    "qkv_proj",
    "o_proj",
    "gate_up_proj",
    "down_proj",
    "experts_gate_up",
    "experts_down",
    "shared_gate_up",
    "shared_down",
)
# Elements that are quantised at once: their fp32 copies take 64 MiB each.
CHUNK_ELEMENTS = 1 << 24


class ScaledMatrix(nn.Parameter):
    """A matrix in 8 bits, whose scales are attributes and come along where it is copied.

    Attributes:
        row_scale: of an int8 matrix, see `int8_rows`.
        block_scale, tail: of an e4m3 matrix, see `fp8_blocks`; tail may be None.
    """

    row_scale: torch.Tensor
    block_scale: torch.Tensor
    tail: torch.Tensor | None

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScaledMatrix":
        if id(self) not in memo:
            made = ScaledMatrix(self.data.clone(), requires_grad=False)
            memo[id(self)] = made
            made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        found: ScaledMatrix = memo[id(self)]
        return found

    def requires_grad_(self, requires_grad: bool = True) -> "ScaledMatrix":
        """As of any parameter, but that 8 bits hold no small change: it is never trained."""
        if requires_grad:
            raise ValueError("weights in 8 bits only run: train the model they came from")
        super().requires_grad_(False)
        return self

    def __reduce_ex__(self, proto: Any) -> Any:
        return _rebuild, (self.data, dict(self.__dict__))

    def move_scales(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Bring the attributes to where `fn` brings a tensor; their number types stay."""
        for name, value in self.__dict__.items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(fn(value).device))


def _rebuild(data: torch.Tensor, attributes: dict[str, Any]) -> ScaledMatrix:
    made = ScaledMatrix(data, requires_grad=False)
    made.__dict__.update(attributes)
    return made


def scaled_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the matrices held in 8 bits."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in DTYPES:
            yield name, parameter


def refuse_quantised(model: nn.Module, purpose: str) -> None:
    """Raise a ValueError where a model holds 8-bit matrices.

    Args:
        purpose: what cannot be done with them.
    """
    for _, parameter in scaled_matrices(model):
        kind = "fp8" if parameter.dtype == FP8 else "int8"
        raise ValueError(
            f"the model holds {kind} weights, which only run: {purpose} the one it came from"
        )


def apply_with_scales(
    model: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], apply: Callable[[], object]
) -> None:
    """Run `apply`, which gives every tensor of a model to `fn`, so that scales come along.

    Raises:
        ValueError: `fn` would give an e4m3 matrix another type, without its scales.
    """
    before = [(name, p) for name, p in scaled_matrices(model) if isinstance(p, ScaledMatrix)]
    for name, matrix in before:
        found = fn(matrix.data[:0]).dtype
        if matrix.dtype == FP8 and found != FP8:
            raise ValueError(f"{name} is fp8 with scales and cannot be converted to {found}")
    apply()
    for name, matrix in before:
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        moved = getattr(module, own)
        if not isinstance(moved, ScaledMatrix):  # the meta device gets parameters anew
            moved = _rebuild(moved.data, dict(matrix.__dict__))
            setattr(module, own, moved)
        moved.move_scales(fn)


def require_runnable(model: nn.Module) -> None:
    """Raise a ValueError where a model's fp8 weights cannot run on their device."""
    for name, parameter in scaled_matrices(model):
        if parameter.dtype == FP8:
            objection = fp8_blocks.device_objection(parameter.device)
            if objection is not None:
                raise ValueError(f"{objection} ({name})")


def fp8_names(model: nn.Module) -> list[str]:
    """Names of the matrices that fp8 is for.

    Raises:
        ValueError: one of them is not made of whole blocks, which the kernels need.
    """
    names = []
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in FP8_MATRICES:
            continue
        rows = parameter.shape[-2]
        if parameter.dtype != FP8:
            rows -= num_tail_rows(model, name)
        _require_blocks(name, rows, parameter.shape[-1])
        names.append(name)
    return names


def quantize_head(model: nn.Module) -> None:
    """Hold an output head that is no embedding in fp8 too, which published checkpoints do not.

    At one sequence the head is a sixth of what a step of the 80B model reads, and each draft reads
    it again; in return every logit carries the rounding.

    Raises:
        ValueError: there is no head of its own, or as for `quantize_model`.
    """
    head = getattr(model, "lm_head", None)
    if head is None or head.dtype in DTYPES:
        raise ValueError("there is no output head of its own in a wider type than 8 bits")
    if (objection := fp8_blocks.device_objection(head.device)) is not None:
        raise ValueError(objection)
    _require_blocks("lm_head", *head.shape)
    model.lm_head = quantized(head, 0)


def _require_blocks(name: str, rows: int, columns: int) -> None:
    if rows % BLOCK or columns % BLOCK:
        raise ValueError(
            f"{name} has {rows} rows and {columns} columns; fp8 weights need multiples of {BLOCK}"
        )


def num_tail_rows(model: nn.Module, name: str) -> int:
    """Last rows of a matrix that stay as they are: b and a of DeltaNet's projection."""
    parent, _, own = name.rpartition(".")
    if own != "in_proj":
        return 0
    *_, b, a = model.get_submodule(parent).sizes  # type: ignore[misc]
    return int(b) + int(a)


def empty_blocks(
    shape: torch.Size, tail_rows: int, tail_dtype: torch.dtype, device: torch.device | str
) -> ScaledMatrix:
    """An e4m3 matrix, or a stack of them, of any content.

    Args:
        shape: the tail included. [..., O + R, C]
        tail_rows: R.
    """
    *stack, rows, columns = shape
    held = (*stack, rows - tail_rows, columns)
    made = ScaledMatrix(torch.empty(held, dtype=FP8, device=device), requires_grad=False)
    made.block_scale = torch.ones(scale_shape(held), device=device)
    made.tail = None
    if tail_rows:
        made.tail = torch.empty(tail_rows, columns, dtype=tail_dtype, device=device)
    return made


@torch.no_grad()
def quantize_into(held: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor) -> None:
    """Round rows to e4m3 and write them and their scales; a stack goes a few matrices at a time.

    Args:
        held: e4m3 [..., O, C]
        scale: [..., O / 128, C / 128], fp32
        rows: any float dtype, anywhere. [..., O, C]
    """
    if rows.dim() == 3:
        step = max(1, CHUNK_ELEMENTS // rows[0].numel())
        for first in range(0, rows.shape[0], step):
            packed, found = quantize_blocks(rows[first : first + step].to(held.device))
            held[first : first + step] = packed
            scale[first : first + step] = found
        return
    packed, found = quantize_blocks(rows.to(held.device))
    held.copy_(packed)
    scale.copy_(found)


def quantized(weight: torch.Tensor, tail_rows: int) -> ScaledMatrix:
    """A matrix, or a stack of them, in e4m3 but for its last `tail_rows` rows."""
    made = empty_blocks(weight.shape, tail_rows, weight.dtype, weight.device)
    rows = weight.detach()
    if made.tail is not None:
        made.tail.copy_(rows[-tail_rows:])
        rows = rows[:-tail_rows]
    quantize_into(made.data, made.block_scale, rows)
    return made


def quantize_model(model: nn.Module) -> None:
    """Hold a model's large matrices in fp8 from now on, one after another.

    Raises:
        ValueError: the device cannot run them, a matrix is not made of whole blocks, or the model
            is quantised already.
    """
    refuse_quantised(model, "quantise")
    first = next(model.parameters())
    if (objection := fp8_blocks.device_objection(first.device)) is not None:
        raise ValueError(objection)
    for name in fp8_names(model):
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        made = quantized(getattr(module, own), num_tail_rows(model, name))
        setattr(module, own, made)
