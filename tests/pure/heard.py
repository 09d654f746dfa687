"""A whole answer without reasoning, as a reader of calls takes it in one piece."""

from dataclasses import dataclass

from baton.server.tools_answer import ToolReading
from baton.server.tools_marked import reader_of
from baton.server.tools_reader import Call, joined


@dataclass(frozen=True, slots=True)
class Answer:
    """All of it."""

    content: str
    calls: tuple[Call, ...]
    complete: bool  # it does not end within a call


def heard(text: str, reading: ToolReading) -> Answer:
    """What it says."""
    reader = reader_of(reading.form, reading.names, reading.parameters, forced=reading.forced)
    parts = reader.take(text), reader.end()
    calls = joined([piece for part in parts for piece in part.calls])
    return Answer(parts[0].content + parts[1].content, calls, reader.complete)
