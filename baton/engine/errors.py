"""Reasons why a faster way to run a model is not available, and words for errors that nobody expected."""

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from baton.errors import OutOfMemory
from baton.memory import out_of_memory

OF_TORCH = str(Path(torch.__file__).parent)
MOST_WORDS = 300  # characters of an error's own text

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class CompileError(Exception):
    """The model's forward cannot be compiled for the CPU; it runs in torch."""


class NotRecorded(Exception):
    """This step cannot be recorded as a CUDA graph."""


class Unsupported(Exception):
    """A kernel library does not support this model's attention."""


def within_memory(what: str, device: torch.device, run: Callable[[], Result]) -> Result:
    """What `run` returns; OutOfMemory if memory runs out in it. That is raised without the first error,
    whose frames hold the tensors of the forward, and torch gives back what nobody uses then."""
    try:
        return run()
    except (RuntimeError, MemoryError, OSError, ImportError) as error:
        if not out_of_memory(error):
            raise
        failed = " ".join(str(error).split())[:MOST_WORDS] or type(error).__name__
    if device.type == "cuda":
        torch.cuda.empty_cache()
    said = f"{device} has no memory left for {what}: {failed}"
    logger.warning("%s", said)
    raise OutOfMemory(said)


def unexpected(error: BaseException) -> str:
    """Type, text and place of an error, in one line. The place is the last one outside torch: there
    somebody asked for what torch could not do."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [each for each in frames if not each.filename.startswith(OF_TORCH)]
    last = (outside or frames)[-1:]
    place = "".join(f" ({Path(at.filename).name}:{at.lineno}, in {at.name})" for at in last)
    text = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {text[:MOST_WORDS]}{place}"
        if text
        else type(error).__name__ + place
    )
