"""Memory of this kind and that runs out: each error is recognised, in a process whose address space is
limited."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from baton.engine.errors import within_memory
from baton.errors import OutOfMemory
from baton.memory import out_of_memory

ROOM = 512 << 20
CHILD = """
import json, mmap, os, resource, sys
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from baton.engine.device import free_memory
from baton.engine.errors import within_memory
from baton.engine.pool import Pool
from baton.errors import OutOfMemory
from baton.kv.layout import KVLayout, LayerShape
from baton.memory import out_of_memory
from baton.transfer.slabs import allocate_slabs

cpu, room, file = torch.device("cpu"), int(sys.argv[1]), sys.argv[2]
layout = KVLayout((LayerShape(8, 64, 64),) * 8, 16, "float32")
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
attempts = {
    "torch": lambda: torch.empty(2 * room, dtype=torch.uint8),
    "torch, in a product": lambda: torch.ones(1 << 15, 1) @ torch.ones(1, 1 << 15),
    "python": lambda: bytearray(2 * room),
    "mmap": lambda: mmap.mmap(-1, 2 * room),
    "safetensors": lambda: load_file(file),
}
said = {}
for name, attempt in attempts.items():
    try:
        attempt()
    except Exception as error:
        said[name] = out_of_memory(error)
for name, make in {
    "forward": lambda: within_memory("a step", cpu, attempts["torch"]),
    "pool": lambda: Pool.private(layout, 1 << 14, cpu),
    "slabs": lambda: allocate_slabs(layout, 1 << 14, cpu, shared=False),
    "shared slabs": lambda: allocate_slabs(layout, 1 << 14, cpu, shared=True),
}.items():
    try:
        make()
    except OutOfMemory as error:
        said[name] = True
print(json.dumps({"said": said, "free": free_memory(cpu)}))
"""


def test_every_allocator_is_understood(tmp_path: Path) -> None:
    file = tmp_path / "large.safetensors"
    save_file({"weight": torch.zeros(ROOM // 2 + (1 << 20), dtype=torch.int16)}, file)
    words = [sys.executable, "-c", CHILD, str(ROOM), str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["said"] == dict.fromkeys(
        ["torch", "torch, in a product", "python", "mmap", "safetensors", "forward", "pool", "slabs",
         "shared slabs"], True,
    )  # fmt: skip
    assert 0 < found["free"] <= ROOM


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (OSError(errno.ENOENT, "No such file"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("an odd value"), False),
    ],
)
def test_errors_of_memory_and_others(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected
    wrapped = LookupError("by a library that hides the first")
    wrapped.__cause__ = error
    assert out_of_memory(wrapped) is expected


def test_errors_that_go_around_in_a_circle_end() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert not out_of_memory(one)


def test_a_forward_passes_other_errors_on() -> None:
    def wrong() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes") as it:
        within_memory("a step", torch.device("cpu"), wrong)
    assert not isinstance(it.value, OutOfMemory)
