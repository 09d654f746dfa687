"""All errors of the project. The class names the cause, and so decides exit code and HTTP status.

    BatonError
    ├── InputError         2   the caller's input: a flag, a prompt file, a prompt
    │   └── RequestError   2   one request is invalid; others are not affected
    ├── ModelError         3   the model is missing, unsupported or unsafe to load
    ├── ProtocolError      4   two processes are incompatible, or a message is malformed
    │   └── TransferError  4   KV bytes cannot be moved, or did not arrive as sent
    ├── OutputError        5   results cannot be written; what was saved stays saved
    ├── OutOfMemory        6   the weights or the KV pool do not fit
    └── WorkerLost         1   processes died too often to retry

The number is the process's exit code. A message is one line: what is wrong, the limit, what to do.
"""


class BatonError(Exception):
    """The root. Catch it to print one line and exit with `exit_code`."""

    exit_code = 1


class InputError(BatonError):
    """The caller's input is unusable. Raised before any work starts."""

    exit_code = 2


class RequestError(InputError):
    """One request is refused; `code` is the reason for machines, e.g. context_length_exceeded, and
    `param` the field of the request that is wrong, if it is one field."""

    def __init__(
        self, message: str, *, code: str = "invalid_request", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class ModelError(BatonError):
    """The model is missing, not safe to load, or cannot run here."""

    exit_code = 3


class ProtocolError(BatonError):
    """A peer has another version or model, or sent a malformed message."""

    exit_code = 4


class TransferError(ProtocolError):
    """KV blocks could not be transferred, or arrived different from what was sent."""


class OutputError(BatonError):
    """Results could not be written; the journal holds what was done."""

    exit_code = 5


class OutOfMemory(BatonError):
    """Weights or KV pool do not fit the device; the message names needed and free bytes."""

    exit_code = 6


class WorkerLost(BatonError):
    """The processes needed for the job died too often."""
