"""LLM serving with disaggregated prefill and decode.

from baton import LLM, SamplingParams
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "LLM": "baton.llm",
    "Completion": "baton.llm",
    "SamplingParams": "sampler.params",
    "generate": "baton.api",
}
__all__ = ["LLM", "Completion", "SamplingParams", "generate"]


def __getattr__(name: str) -> Any:
    """Import the names of `__all__` on first use: `import baton` loads nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'baton' has no attribute {name!r}")
