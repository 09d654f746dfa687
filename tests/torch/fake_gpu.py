"""A GPU that is not there: tensors on torch's device `meta` have shapes and dtypes, but no numbers.

Copies between it and the host are counted, and whoever looks at a number there, or needs one to know the
shape of a result, gets an error: on a GPU that is a wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("meta")
LOOKS = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten.equal",
    "aten.item",
)


@dataclass
class Copies:
    """Between host and device."""

    up: list[str] = field(default_factory=list)
    down: list[str] = field(default_factory=list)


class Counting(TorchDispatchMode):
    """Notes each operation that reads one side and writes the other. What comes down is zeros."""

    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func), kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and first.device == GPU:
            assert not name.startswith(LOOKS), f"{name}: the host waits for a number of the device"
            if (
                name.startswith("aten._to_copy")
                and torch.device(kwargs.get("device") or GPU) != GPU
            ):
                self.copies.down.append(name)
                return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
            if name.startswith("aten.index.Tensor"):
                masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
                assert not masks, f"{name}: by a mask, so the host waits for its number of ones"
        out = func(*args, **kwargs)
        source = args[1] if name.startswith("aten.copy_") else first
        copied = name.startswith(("aten._to_copy", "aten.copy_"))
        if copied and source is not None and source.device != out.device:
            (self.copies.up if out.device == GPU else self.copies.down).append(name)
        return out


@contextmanager
def fake_gpu() -> Iterator[Copies]:
    """Counts what happens within."""
    copies = Copies()
    with Counting(copies):
        yield copies
