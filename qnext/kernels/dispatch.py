"""The one place that chooses which kernel runs an op.

An op is called here as a plain function. The backend named by `use_backend` runs it; with none
named, the fastest backend whose `supports` has no objection does, and the reference otherwise.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from qnext.kernels import recompute
from qnext.kernels.adamw.reference import adamw_reference
from qnext.kernels.add_rms_norm.reference import add_rms_norm_reference
from qnext.kernels.attention import torch as attention_torch_module
from qnext.kernels.attention.reference import attention_reference
from qnext.kernels.attention_inputs.reference import attention_inputs_reference
from qnext.kernels.causal_conv1d.reference import causal_conv1d_reference
from qnext.kernels.causal_conv1d_window.reference import causal_conv1d_window_reference
from qnext.kernels.decide_token.reference import decide_token_reference
from qnext.kernels.decode_step.reference import DecodeStep, WindowRows, decode_step_reference
from qnext.kernels.delta_inputs.reference import delta_inputs_reference
from qnext.kernels.experts import torch as experts_torch_module
from qnext.kernels.experts.reference import experts_reference
from qnext.kernels.experts_shared import torch as shared_torch_module
from qnext.kernels.experts_shared.reference import experts_shared_reference
from qnext.kernels.fp8_blocks import DTYPE as EIGHT_BITS
from qnext.kernels.gated_delta_rule import torch as delta_torch_module
from qnext.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from qnext.kernels.gated_delta_window.reference import gated_delta_window_reference
from qnext.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from qnext.kernels.graph_ops import constant_in_graphs
from qnext.kernels.l2_norm.reference import l2_norm_reference
from qnext.kernels.linear import torch as linear_torch_module
from qnext.kernels.linear.reference import linear_reference
from qnext.kernels.linear_cross_entropy import torch as linear_cross_entropy_torch_module
from qnext.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from qnext.kernels.merge_attention.reference import merge_attention_reference
from qnext.kernels.paged_attention import torch as paged_torch_module
from qnext.kernels.paged_attention.reference import paged_attention_reference
from qnext.kernels.rms_norm.reference import rms_norm_reference
from qnext.kernels.rotary.reference import rotary_reference
from qnext.kernels.router.reference import router_reference
from qnext.kernels.router_stats.reference import router_stats_reference
from qnext.kernels.sigmoid_gate.reference import sigmoid_gate_reference
from qnext.kernels.silu_mul.reference import silu_mul_reference
from qnext.kernels.swiglu.reference import swiglu_reference

BACKENDS = ("reference", "torch", "numba", "triton")

_logger = logging.getLogger("qnext.kernels")


@dataclass(frozen=True)
class Kernel:
    """One backend's function for an op, and its `supports`, which says why it cannot run.

    `serves` says in words what it takes, and `machine_objection` why this machine never runs it.
    `skipped_device` is the type of device whose rows it is not asked about unless it is named: a
    forward pass calls ops hundreds of times, and a GPU must not wait for reasons nobody reads.
    """

    backend: str
    function: Callable[..., Any]
    supports: Callable[..., str | None]
    serves: str
    machine_objection: Callable[[], str | None] = lambda: None
    skipped_device: str | None = None


@dataclass(frozen=True)
class OpChoice:
    """What `backend_report` says of one op."""

    op: str
    backend: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)


_named: dict[str, str] = {}  # op name, or "*" for the whole model -> backend
_warned: set[tuple[str, str]] = set()


class Op:
    """An op with its reference and its faster kernels, fastest first."""

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        kernels: tuple[Kernel, ...] = (),
        device_of: Callable[..., torch.device] | None = None,
    ) -> None:
        self.name = name
        self.reference = reference
        self.kernels = kernels
        self.device_of = device_of  # where a call's rows are; None if its first argument holds them

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op on the chosen backend.

        Raises:
            ValueError: the backend named for this op cannot run these inputs.
        """
        kernel = self._choose(*args, **kwargs)
        function = self.reference if kernel is None else kernel.function
        if recompute.is_active() and self.name in recompute.CHEAP_OPS:
            return recompute.run(self.name, function, args, kwargs)
        return function(*args, **kwargs)

    def backend_for(self, *args: Any, **kwargs: Any) -> str:
        """Name of the backend that a call with these inputs runs on; raises as the call would."""
        kernel = self._choose(*args, **kwargs)
        return "reference" if kernel is None else kernel.backend

    def backends(self) -> tuple[str, ...]:
        """Backends that have this op, fastest first."""
        return (*(kernel.backend for kernel in self.kernels), "reference")

    def _choose(self, *args: Any, **kwargs: Any) -> Kernel | None:
        """The kernel to run, None for the reference."""
        named = _named.get(self.name) or _named.get("*")
        if named == "reference":
            return None
        device_type = self._device_type(*args, **kwargs)
        for kernel in self.kernels:
            if named is None:
                if kernel.skipped_device == device_type:
                    continue
            elif kernel.backend != named:
                continue
            reason = kernel.supports(*args, **kwargs)
            if reason is None:
                return kernel
            if self.name in _named:
                raise ValueError(f"{self.name}: backend {named} cannot run: {reason}")
            self._warn(kernel.backend, reason)
        return None

    def _device_type(self, *args: Any, **kwargs: Any) -> str:
        if self.device_of is not None:
            return self.device_of(*args, **kwargs).type
        first = args[0] if args else None
        return first.device.type if isinstance(first, torch.Tensor) else ""

    def _warn(self, backend: str, reason: str) -> None:
        # Not read while tracing: a graph would be guarded by what has been said so far.
        if torch.compiler.is_compiling() or (self.name, reason) in _warned:
            return
        _warned.add((self.name, reason))
        _logger.info("%s: not on %s: %s", self.name, backend, reason)


def _torch_kernel(module: Any, name: str, serves: str = "all devices") -> tuple[Kernel, ...]:
    return (Kernel("torch", getattr(module, f"{name}_torch"), module.supports, serves),)


class _Parts:
    """What a kernel's module holds, loaded when it is first needed."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._supports: Callable[..., str | None] | None = None
        self._function: Callable[..., Any] | None = None
        _parts[module] = self

    def load(self) -> None:
        """Import the module."""
        module = import_module(self._module)
        self._supports, self._function = module.supports, getattr(module, self._name)

    @property
    def supports(self) -> Callable[..., str | None]:
        """The module's `supports`."""
        self._ensure_loaded()
        assert self._supports is not None, f"{self._module} is loaded, without a function"
        return self._supports

    @property
    def function(self) -> Callable[..., Any]:
        """The op's function."""
        self._ensure_loaded()
        assert self._function is not None, f"{self._module} is loaded, without a function"
        return self._function

    def _ensure_loaded(self) -> None:
        # Whether it was loaded is nothing that a graph may be guarded by.
        if torch.compiler.is_compiling():
            _load_while_tracing(self._module)
        elif self._function is None:
            self.load()


_parts: dict[str, _Parts] = {}  # by module


@constant_in_graphs
def _load_while_tracing(module: str) -> None:
    """Runs while a graph is traced and leaves nothing in it."""
    _parts[module].load()


def _numba_kernel(
    name: str, serves: str = "windows on a CPU, fp32 rows", takes_tensors: bool = True
) -> Kernel:
    """A kernel whose module, and Numba with it, is loaded when a CPU first needs it."""
    parts = _Parts(f"qnext.kernels.{name}.numba", f"{name}_numba")

    def supports(*args: Any, **kwargs: Any) -> str | None:
        if torch.compiler.is_compiling():
            return "inside a compiled graph"
        if args and isinstance(args[0], torch.Tensor) and args[0].device.type != "cpu":
            return f"the inputs are on {args[0].device}"
        if takes_tensors and torch.is_grad_enabled():
            return "it has no gradient, and gradients are on"
        return parts.supports(*args, **kwargs)

    def function(*args: Any, **kwargs: Any) -> Any:
        return parts.function(*args, **kwargs)

    objection = _numba_objection if takes_tensors else lambda: None
    return Kernel("numba", function, supports, serves, objection, skipped_device="cuda")


def _device_of_rows(x: torch.Tensor, *rest: Any, **named: Any) -> torch.device:
    return x.device


def _triton_kernel(
    name: str,
    serves: str,
    device_of: Callable[..., torch.device] = _device_of_rows,
    in_graphs: bool = False,
) -> Kernel:
    """A kernel whose module, and Triton with it, is loaded when a GPU first needs it.

    Under Triton's interpreter it runs on CPUs too, when it is named.

    Args:
        device_of: where the inputs of a call are.
        in_graphs: it is registered for graphs of torch.compile, see `graph_ops`.
    """
    parts = _Parts(f"qnext.kernels.{name}.triton_fwd", f"{name}_triton")

    def supports(*args: Any, **kwargs: Any) -> str | None:
        if not in_graphs and torch.compiler.is_compiling():
            return "inside a compiled graph"
        device = device_of(*args, **kwargs)
        if device.type != "cuda" and "triton" not in (_named.get(name), _named.get("*")):
            return f"the inputs are on {device}, not on a GPU"
        if (objection := _triton_objection(device.type)) is not None:
            return objection
        return parts.supports(*args, **kwargs)

    def function(*args: Any, **kwargs: Any) -> Any:
        return parts.function(*args, **kwargs)

    return Kernel("triton", function, supports, serves, _triton_objection, skipped_device="cpu")


def _fp8_linear() -> Kernel:
    """The product with e4m3 weights; other weights are sent on before anything is looked up."""
    kernel = _triton_kernel("linear", "e4m3 weights on a GPU")

    def supports(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **named: Any) -> str | None:
        if weight.dtype != EIGHT_BITS:
            return "the weight is not e4m3"
        return kernel.supports(x, weight, *rest, **named)

    return replace(kernel, supports=supports)


_is_installed = cache(find_spec)


@constant_in_graphs
def _triton_objection(device_type: str = "cpu") -> str | None:
    if not _is_installed("triton"):
        return "triton is not installed"
    if device_type == "cuda":
        return None
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return None if torch.cuda.is_available() or is_interpreted else "there is no GPU"


def _numba_objection() -> str | None:
    if torch.cuda.is_available():
        return "it runs on CPUs, and the default device is a GPU"
    return None if _is_installed("numba") else "numba is not installed"


_CPU_ROWS = "fp32 rows on a CPU, no gradients"

_GPU_ROWS = "fp32, bf16 and fp16 on a GPU"

adamw = Op("adamw", adamw_reference, (_triton_kernel("adamw", _GPU_ROWS),))
rms_norm = Op(
    "rms_norm",
    rms_norm_reference,
    (_numba_kernel("rms_norm", _CPU_ROWS), _triton_kernel("rms_norm", _GPU_ROWS, in_graphs=True)),
)
gated_rms_norm = Op(
    "gated_rms_norm",
    gated_rms_norm_reference,
    (
        _numba_kernel("gated_rms_norm", _CPU_ROWS),
        _triton_kernel("gated_rms_norm", _GPU_ROWS, in_graphs=True),
    ),
)
add_rms_norm = Op(
    "add_rms_norm",
    add_rms_norm_reference,
    (_triton_kernel("add_rms_norm", _GPU_ROWS, in_graphs=True),),
)
delta_inputs = Op(
    "delta_inputs",
    delta_inputs_reference,
    (_triton_kernel("delta_inputs", _GPU_ROWS, in_graphs=True),),
)
attention_inputs = Op(
    "attention_inputs",
    attention_inputs_reference,
    (_triton_kernel("attention_inputs", _GPU_ROWS, in_graphs=True),),
)
_sigmoid_gate_kernel = _triton_kernel("sigmoid_gate", _GPU_ROWS, in_graphs=True)
sigmoid_gate = Op("sigmoid_gate", sigmoid_gate_reference, (_sigmoid_gate_kernel,))
silu_mul = Op(
    "silu_mul", silu_mul_reference, (_triton_kernel("silu_mul", _GPU_ROWS, in_graphs=True),)
)
l2_norm = Op("l2_norm", l2_norm_reference, (_numba_kernel("l2_norm", _CPU_ROWS),))
rotary = Op("rotary", rotary_reference)
linear = Op(
    "linear",
    linear_reference,
    (
        _numba_kernel("linear", "fp32 rows on a CPU: windows, and prefill with bf16 weights"),
        _fp8_linear(),
        *_torch_kernel(linear_torch_module, "linear"),
    ),
)
decide_token = Op(
    "decide_token",
    decide_token_reference,
    (_numba_kernel("decide_token", "rows on the host", False),),
)


def _device_of_step(step: DecodeStep, rows: WindowRows) -> torch.device:
    return step.keys.device


decode_step = Op(
    "decode_step",
    decode_step_reference,
    (
        _numba_kernel("decode_step"),
        _triton_kernel("decode_step", "windows on a GPU", device_of=_device_of_step),
    ),
    device_of=_device_of_step,
)
linear_cross_entropy = Op(
    "linear_cross_entropy",
    linear_cross_entropy_reference,
    (
        _triton_kernel("linear_cross_entropy", _GPU_ROWS, in_graphs=True),
        *_torch_kernel(linear_cross_entropy_torch_module, "linear_cross_entropy"),
    ),
)
causal_conv1d = Op(
    "causal_conv1d", causal_conv1d_reference, (_numba_kernel("causal_conv1d", _CPU_ROWS),)
)
causal_conv1d_window = Op("causal_conv1d_window", causal_conv1d_window_reference)
router = Op(
    "router",
    router_reference,
    (_numba_kernel("router", _CPU_ROWS), _triton_kernel("router", _GPU_ROWS, in_graphs=True)),
)
router_stats = Op(
    "router_stats",
    router_stats_reference,
    (_triton_kernel("router_stats", _GPU_ROWS, in_graphs=True),),
)
experts_shared = Op(
    "experts_shared",
    experts_shared_reference,
    (
        _triton_kernel("experts_shared", _GPU_ROWS, in_graphs=True),
        *_torch_kernel(shared_torch_module, "experts_shared", "as experts"),
    ),
)
gated_delta_window = Op("gated_delta_window", gated_delta_window_reference)
experts = Op(
    "experts",
    experts_reference,
    (
        _numba_kernel("experts", "fp32 rows on a CPU with bf16 weights"),
        _triton_kernel("experts", _GPU_ROWS, in_graphs=True),
        *_torch_kernel(experts_torch_module, "experts", "whole 16-byte rows, bf16 on a GPU"),
    ),
)
swiglu = Op(
    "swiglu",
    swiglu_reference,
    (_numba_kernel("swiglu", "fp32 rows on a CPU with bf16 weights"),),
)
attention = Op("attention", attention_reference, _torch_kernel(attention_torch_module, "attention"))
merge_attention = Op(
    "merge_attention", merge_attention_reference, (_triton_kernel("merge_attention", _GPU_ROWS),)
)
paged_attention = Op(
    "paged_attention",
    paged_attention_reference,
    (
        _numba_kernel("paged_attention", "prefill on a CPU with bf16 weights"),
        *_torch_kernel(paged_torch_module, "paged_attention"),
    ),
)
gated_delta_rule = Op(
    "gated_delta_rule",
    gated_delta_rule_reference,
    (
        _numba_kernel("gated_delta_rule", _CPU_ROWS),
        _triton_kernel("gated_delta_rule", _GPU_ROWS, in_graphs=True),
        *_torch_kernel(delta_torch_module, "gated_delta_rule"),
    ),
)

OPS: dict[str, Op] = {op.name: op for op in list(globals().values()) if isinstance(op, Op)}


def named_backends() -> dict[str, str]:
    """Backends that `use_backend` names now, by op, or "*" for the whole model."""
    return dict(_named)


@contextmanager
def use_backend(backend: str, op: str | None = None) -> Iterator[dict[str, str]]:
    """Name the backend of one op, or of the whole model, inside a with block.

    For the whole model the ops that have the backend are bound to it and the others run as they
    would otherwise; for one op, inputs that it cannot run raise. The choice holds for all threads.

    Args:
        backend: one of BACKENDS.
        op: name of an op; None for the whole model.

    Returns:
        For each op the backend that it is bound to, "reference" for those that lack this one.

    Raises:
        ValueError: no such backend or op, or the op has no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
    if op is not None and op not in OPS:
        raise ValueError(f"op = {op!r}: must be one of {', '.join(OPS)}")
    if op is not None and backend not in OPS[op].backends():
        raise ValueError(f"{op} has no backend {backend!r}, only {', '.join(OPS[op].backends())}")
    bound = {
        name: backend if backend in each.backends() else "reference" for name, each in OPS.items()
    }
    key = op or "*"
    before = _named.get(key)
    _named[key] = backend
    try:
        yield bound if op is None else {op: backend}
    finally:
        if before is None:
            del _named[key]
        else:
            _named[key] = before


def backend_report() -> list[OpChoice]:
    """The backend that each op takes first on this machine, why, and why others are out."""
    choices = []
    for op in OPS.values():
        rejected: dict[str, str] = {}
        for kernel in op.kernels:
            objection = kernel.machine_objection()
            if objection is None:
                reason = f"fastest that has this op, for {kernel.serves}; then " + ", ".join(
                    name for name in op.backends() if name not in (kernel.backend, *rejected)
                )
                choices.append(OpChoice(op.name, kernel.backend, reason, rejected))
                break
            rejected[kernel.backend] = objection
        else:
            reason = "plain PyTorch is the only one so far" if not rejected else "none other runs"
            choices.append(OpChoice(op.name, "reference", reason, rejected))
    return choices
