"""Cheap ops whose results the backward pass computes again instead of keeping them.

Inside `recompute_cheap_ops()` each result of a norm, gate or convolution that autograd would keep
is replaced by a note of how it was made. What the op itself reads is kept: products and mixers,
which are dear, are never run twice. A result is computed once for all who read it, and let go after
the last of them.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

# Which results of an op are computed again; None: all.
CHEAP_OPS: dict[str, tuple[int, ...] | None] = {
    "rms_norm": None,
    # The sum is the residual stream, which is kept for its own sake: see `_norm_of_sum`.
    "add_rms_norm": (0,),
    "gated_rms_norm": None,
    "delta_inputs": None,
    "attention_inputs": None,
    "causal_conv1d": None,
    "l2_norm": None,
    "rotary": None,
    "sigmoid_gate": None,
    "silu_mul": None,
}


@dataclass(eq=False)
class Piece:
    """One run of a cheap op.

    Attributes:
        again: computes the results without gradients, from what it holds.
        held: tensors it reads, each as it is or as a note of another piece.
        num_notes: notes that autograd still holds.
        results: while some of them have been read and others not.
    """

    again: Callable[[list[torch.Tensor]], tuple[torch.Tensor, ...]]
    held: list["torch.Tensor | Note"]
    num_notes: int = 0
    results: tuple[torch.Tensor, ...] | None = field(default=None, repr=False)

    def read(self) -> tuple[torch.Tensor, ...]:
        """The results, computed if they are not there; one note fewer is open after it."""
        if self.results is None:
            with torch.no_grad():
                self.results = self.again([read(each) for each in self.held])
        results = self.results
        self.num_notes -= 1
        if self.num_notes <= 0:  # also a graph that is run a second time computes again
            self.results = None
        return results


@dataclass(frozen=True)
class Note:
    """A view of one result of a piece, in place of its memory."""

    piece: Piece
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def read(kept: "torch.Tensor | Note") -> torch.Tensor:
    """What `Recorder.pack` was given."""
    if isinstance(kept, torch.Tensor):
        return kept
    result = kept.piece.read()[kept.index]
    return result.as_strided(kept.size, kept.stride, kept.offset)


class Recorder:
    """Knows the results of one forward pass that can be computed again."""

    def __init__(self) -> None:
        # Address of a result's memory -> the result while it lives, its piece and its place there.
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], Piece, int]] = {}

    def pack(self, tensor: torch.Tensor) -> "torch.Tensor | Note":
        """A note in place of a result of a cheap op or of a view of it; else the tensor."""
        found = self._known.get(_address(tensor))
        if found is None:
            return tensor
        reference, piece, index = found
        result = reference()
        if result is None:  # its memory has another owner by now
            del self._known[_address(tensor)]
            return tensor
        if result.dtype != tensor.dtype:
            return tensor
        piece.num_notes += 1
        return Note(piece, index, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def record(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an op and note its results."""
        out = function(*args, **kwargs)
        results = out if isinstance(out, tuple) else (out,)
        which = CHEAP_OPS[name]
        if name == "add_rms_norm":
            piece = _norm_of_sum(function, results[1], args[2], args[3])
        else:
            piece = self._piece(function, args, kwargs)
        own = {_address(each) for each in piece.held if isinstance(each, torch.Tensor)}
        for index, result in enumerate(results):
            # A view of what is kept anyway costs nothing.
            if (which is None or index in which) and _address(result) not in own:
                self._known[_address(result)] = (weakref.ref(result), piece, index)
        return out

    def _piece(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Piece:
        values = [*args, *kwargs.values()]
        places = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
        fixed = [None if isinstance(value, torch.Tensor) else value for value in values]
        names = list(kwargs)

        def again(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            filled = list(fixed)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            named = dict(zip(names, filled[len(args) :], strict=True))
            out = function(*filled[: len(args)], **named)
            return out if isinstance(out, tuple) else (out,)

        return Piece(again, [self.pack(values[place].detach()) for place in places])


def _norm_of_sum(
    function: Callable[..., Any], summed: torch.Tensor, weight: torch.Tensor, eps: float
) -> Piece:
    """The norm of a stream that already holds the sum: nothing is added to it."""

    def again(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        stream, scale = tensors
        normed: torch.Tensor = function(torch.zeros_like(stream), stream, scale, eps)[0]
        return (normed,)

    return Piece(again, [summed.detach(), weight.detach()])


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_recorders: list[Recorder] = []


def is_active() -> bool:
    """Whether cheap ops are to be noted."""
    return bool(_recorders) and torch.is_grad_enabled()


def run(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a cheap op inside `recompute_cheap_ops()`."""
    return _recorders[-1].record(name, function, args, kwargs)


@contextmanager
def recompute_cheap_ops() -> Iterator[Recorder]:
    """Keep no result of a cheap op for the backward pass, inside a with block around the forward.

    What autograd keeps for the backward pass of the op itself is not changed: on a GPU its inputs.
    """
    recorder = Recorder()
    _recorders.append(recorder)
    try:
        with torch.autograd.graph.saved_tensors_hooks(recorder.pack, read):
            yield recorder
    finally:
        _recorders.remove(recorder)
