"""Gradients of large weights that a backward kernel adds to `.grad` itself.

Autograd takes a fresh tensor from each backward pass and adds it to `.grad`: one write and three
passes more over memory, as large as the weights, where a kernel could read the old sum and write
the new one. `.grad` must then be changed by nobody else, and hooks of the parameter do not run; so
this happens only where a caller asks for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Seen by all threads: a GPU's backward pass runs on a thread of its own.
_num_askers = 0


@contextmanager
def adding_to_grads() -> Iterator[None]:
    """Let backward kernels add to `.grad` inside a with block around `backward()`."""
    global _num_askers
    _num_askers += 1
    try:
        yield
    finally:
        _num_askers -= 1


def leaf_of(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight itself if it is a leaf, for a backward pass that asks for its `.grad` later.

    A tensor that autograd has kept may be another object than the leaf.
    """
    return weight if weight.is_leaf and weight.requires_grad else None


def sum_to_extend(leaf: torch.Tensor | None) -> torch.Tensor | None:
    """The `.grad` that a backward kernel may add to, or None: it then returns its gradient."""
    if leaf is None or _num_askers == 0 or leaf.grad is None or torch.is_grad_enabled():
        return None
    grad = leaf.grad
    return grad if grad.is_contiguous() and grad.device == leaf.device else None
