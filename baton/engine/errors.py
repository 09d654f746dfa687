"""Reasons why a faster way to run a model is not available. The engine then takes a slower one."""


class CompileError(Exception):
    """The model's forward cannot be compiled for the CPU; it runs in torch."""


class NotRecorded(Exception):
    """This step cannot be recorded as a CUDA graph."""


class Unsupported(Exception):
    """A kernel library does not support this model's attention."""
