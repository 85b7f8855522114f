"""qnext: Qwen3-Next from corpus to text.

`LLM`, `SamplingParams` and `Qwen3Next` load on first use, so that `import qnext` costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qnext.engine.llm import LLM
    from qnext.engine.request import SamplingParams
    from qnext.model.qwen3_next import Qwen3Next

__version__ = "0.1.0"
__all__ = ["LLM", "Qwen3Next", "SamplingParams", "__version__"]

_LAZY_EXPORTS = {
    "LLM": "qnext.engine.llm",
    "SamplingParams": "qnext.engine.request",
    "Qwen3Next": "qnext.model.qwen3_next",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module 'qnext' has no attribute {name!r}")
    return getattr(import_module(_LAZY_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
