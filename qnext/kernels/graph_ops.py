"""Kernels in the graphs of torch.compile, as ops of torch.library that a graph calls as they are.

A launcher marked with `graph_op` stays a plain function for whoever calls it with plain tensors: an
op of torch.library costs 25 us of host time more a call. Code that is being traced gets the op
`qnext::name` in its place, and so do gradient formulas, which AOTAutograd runs on stand-ins of
tensors. What an op returns is memory of its own: graphs allow no views of its inputs.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def constant_in_graphs(function: Launcher) -> Launcher:
    """Have a function run while a graph is traced, its result a constant there.

    As `torch.compiler.assume_constant_result`, which imports the compiler, for a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def graph_op(
    name: str, *like: str, shapes: Callable[..., Any] | None = None
) -> Callable[[Launcher], Launcher]:
    """Register a launcher as the op `qnext::name`, which takes its place in traced code.

    Its annotations give the op's schema, so they keep to what torch.library knows: tensors, numbers
    and lists of them, optional ones too, and one tensor or a tuple of a fixed size as the result.
    The first argument is a tensor. Gradients are added with `torch.library.register_autograd`.

    Args:
        name: of the op.
        like: for each result the argument whose shape and dtype it has; an argument that is None
            stands for an empty result.
        shapes: in place of like: takes the arguments, returns empty tensors as the launcher would.

    Raises:
        ValueError: neither or both of like and shapes are given.
    """
    if bool(like) == (shapes is not None):
        raise ValueError(f"{name}: one of like = {like} and shapes must be given")

    def register(launch: Launcher) -> Launcher:
        op = torch.library.custom_op(f"qnext::{name}", launch, mutates_args=())
        op.register_fake(shapes or _shapes_like(launch, like))
        in_graph = getattr(torch.ops.qnext, name)

        @wraps(launch)
        def call(first: torch.Tensor, *rest: Any, **named: Any) -> Any:
            if torch.compiler.is_compiling() or type(first) is not torch.Tensor:
                return in_graph(first, *rest, **named)
            return launch(first, *rest, **named)

        return cast(Launcher, call)

    return register


def _shapes_like(launch: Callable[..., Any], like: tuple[str, ...]) -> Callable[..., Any]:
    signature = inspect.signature(launch)

    def shapes(first: torch.Tensor, *rest: Any, **named: Any) -> Any:
        given = signature.bind(first, *rest, **named).arguments
        models = [given.get(argument) for argument in like]
        made = [first.new_empty(0) if x is None else x.new_empty(x.shape) for x in models]
        return made[0] if len(made) == 1 else tuple(made)

    return shapes
