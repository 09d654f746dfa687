"""The kernels run on the GPU if there is one, else in Triton's interpreter on the CPU.

The interpreter is chosen by a variable that triton reads when it is imported, so before all tests. It
keeps bfloat16 as 16-bit integers and multiplies these as numbers in `dot`; here they are widened first.
"""

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

WITHOUT = "needs the package triton: `make test-triton` installs it and runs this"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if find_spec("triton") is not None:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return dot(self, widened(a), widened(b), *more)

    InterpreterBuilder.create_dot = create_dot


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
