"""Every error the project raises on purpose. The class says whose fault it is: that decides the answer.

    BatonError
    ├── InputError         2   the caller's input: a flag, a prompt file, a prompt
    │   └── RequestError   2   one request is unfit, its neighbours are not
    ├── ModelError         3   the model is missing, unfit or unsafe to load
    ├── ProtocolError      4   two processes do not fit together, or a message is malformed
    │   └── TransferError  4   KV bytes cannot be moved, or did not arrive as sent
    ├── OutputError        5   results cannot be written; what was saved stays saved
    ├── OutOfMemory        6   the weights or the KV pool do not fit
    └── WorkerLost         1   processes died more often than a retry can mend

The number is the process's exit code. A message is one line: what is wrong, the limit, the way out.
"""


class BatonError(Exception):
    """The root. Catch it to print one line and leave with `exit_code`."""

    exit_code = 1


class InputError(BatonError):
    """What the caller passed is unusable: raised before any work starts."""

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
    """The model is not there, is not safe to load, or cannot run here."""

    exit_code = 3


class ProtocolError(BatonError):
    """A peer speaks another version, serves another model, or sent nonsense."""

    exit_code = 4


class TransferError(ProtocolError):
    """KV blocks could not be handed over, or arrived different from what was sent."""


class OutputError(BatonError):
    """The output could not be written during the work; the journal holds what was done."""

    exit_code = 5


class OutOfMemory(BatonError):
    """Weights or KV pool do not fit the device; the message says needed and free."""

    exit_code = 6


class WorkerLost(BatonError):
    """The processes needed for the job died too often."""
