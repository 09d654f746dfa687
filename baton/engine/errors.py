"""Why a model, or one step, does not run in a faster way. Each says why; the slower way is taken."""


class CompileError(Exception):
    """This model's forward cannot be compiled for the CPU; it runs in torch."""


class NotRecorded(Exception):
    """This step cannot be recorded as a CUDA graph."""


class Unsupported(Exception):
    """A kernel library does not support this model's attention."""
