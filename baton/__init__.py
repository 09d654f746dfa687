"""P/D-disaggregated LLM serving: prefill runs the first leg, decode the second; the KV cache is passed.

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
    """What `__all__` names is imported when it is asked for: `import baton` loads nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'baton' has no attribute {name!r}")
