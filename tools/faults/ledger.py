"""Ledger: what clients sent and saw, one JSON line an event, written before anything is judged.

    sent    id, case, at, body          case: the same body with other ids has the same case
    chunk   id, at, text, finish
    end     id, at, how, status, code, tokens, retry_after
            how: done    the answer said that it is complete ([DONE], or a whole JSON object)
                 ended   the body ended as HTTP wants, without that
                 error   an error status or an error chunk
                 broken  the connection was cut; hang: no end in time; left: this client went away

Times are monotonic seconds. A reader decides nothing: two ends of one id stay two ends.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

HOWS = ("done", "ended", "error", "broken", "hang", "left")


@dataclass(frozen=True, slots=True)
class Sent:
    """A request left a client."""

    id: str
    case: int
    at: float
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text arrived; `finish` is the finish_reason, if it came with it. Without a stream: the whole."""

    id: str
    at: float
    text: str
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class End:
    """A request's outcome, as its client saw it."""

    id: str
    at: float
    how: str
    status: int = 0
    code: str = ""
    tokens: int | None = None  # usage.completion_tokens
    retry_after: int | None = None  # seconds, the header

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            raise ValueError(f"how must be one of {', '.join(HOWS)}, got {self.how!r}")


Event = Sent | Chunk | End
KINDS: Mapping[str, type[Event]] = {"sent": Sent, "chunk": Chunk, "end": End}


class Ledger:
    """Appends events to a file and keeps them. `listener` sees each event."""

    def __init__(self, path: Path, listener: Callable[[Event], None] = lambda event: None) -> None:
        self.path = path
        self.events: list[Event] = []
        self._listener = listener
        self._file: TextIO = path.open("w", encoding="utf-8")

    def add(self, event: Event) -> None:
        self._file.write(
            json.dumps({"event": type(event).__name__.lower(), **asdict(event)}) + "\n"
        )
        self.events.append(event)
        self._listener(event)

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> Iterator[Event]:
    """The events of a file. Raises ValueError for a line that is none."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            fields = json.loads(line)
            yield KINDS[fields.pop("event")](**fields)


@dataclass(slots=True)
class Record:
    """Everything that is known about one id."""

    id: str
    sent: list[Sent] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    after_end: int = 0  # chunks that came after the end

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def finishes(self) -> list[str]:
        return [chunk.finish for chunk in self.chunks if chunk.finish]


def records(events: Iterable[Event]) -> dict[str, Record]:
    """The events by id."""
    found: dict[str, Record] = {}
    for event in events:
        record = found.setdefault(event.id, Record(event.id))
        match event:
            case Sent():
                record.sent.append(event)
            case Chunk():
                record.chunks.append(event)
                record.after_end += bool(record.ends)
            case End():
                record.ends.append(event)
    return found
