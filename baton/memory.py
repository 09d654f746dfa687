"""Whether an error says that memory ran out. There are as many ways to say so as there are allocators."""

import errno
import os

IN_WORDS = os.strerror(errno.ENOMEM)  # "Cannot allocate memory"


def out_of_memory(error: BaseException) -> bool:
    """Whether this error, or one that it came from, says that memory ran out. torch has a type for a
    GPU's memory. For main memory it raises a RuntimeError; safetensors, mmap and the dynamic linker have
    errors of their own, too. All of those have the system's words in them."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        if isinstance(at, MemoryError) or type(at).__name__ == "OutOfMemoryError":
            return True
        if IN_WORDS in str(at):
            return True
        seen.add(id(at))
        at = at.__cause__ or at.__context__
    return False
