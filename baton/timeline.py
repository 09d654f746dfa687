"""placeholder until the branch is merged."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened to a request."""

    request: str
    at: float
    state: str
    worker: str = ""
    tokens: int = 0
    handover_s: float = 0.0
    note: str = ""
