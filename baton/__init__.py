"""What the processes share. Prefill runs the first leg, decode the second; the KV cache is passed.

from baton import generate
"""

from typing import Any

__all__ = ["generate"]


def __getattr__(name: str) -> Any:
    """`generate`, and what it needs, is loaded when it is asked for: `import baton` loads nothing."""
    if name == "generate":
        from baton.api import generate

        return generate
    raise AttributeError(f"module 'baton' has no attribute {name!r}")
