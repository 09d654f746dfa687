"""Whether an error says that memory ran out. There are as many ways to say so as there are allocators."""

import errno
import os

IN_WORDS = (
    os.strerror(errno.ENOMEM),  # "Cannot allocate memory"
    "CUDA error: out of memory",  # outside of torch's allocator: contexts, graphs, launches
    "HIP error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether this error, or one that it came from, says that memory ran out. torch has a type for
    what its allocator for GPUs has not. CUDA itself and libraries over it, torch's allocator for main
    memory, safetensors, mmap and the dynamic linker raise others, in whose words it stands."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        if isinstance(at, MemoryError) or type(at).__name__ == "OutOfMemoryError":
            return True
        if any(words in str(at) for words in IN_WORDS):
            return True
        seen.add(id(at))
        at = at.__cause__ or at.__context__
    return False
