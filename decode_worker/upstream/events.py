"""EventReader: server-sent events out of bytes. Pure. https://html.spec.whatwg.org/multipage/server-sent-events.html

A reply that is one JSON object, from a server that does not stream, is one event.
"""

LONGEST_EVENT = 1 << 20
"""Bytes of an event, and of a reply that is not streamed."""
DONE = "[DONE]"


class EventReader:
    """Fed with the bytes of one reply."""

    def __init__(self, *, streamed: bool) -> None:
        """`streamed`: by its content type. Otherwise the whole reply is one event."""
        self._streamed = streamed
        self._rest = b""
        self._data: list[str] = []
        self._whole = 0  # characters of data in lines that are complete

    def feed(self, more: bytes) -> list[str]:
        """The data of the events that are complete now. Raises ValueError if one is too long or not
        UTF-8."""
        self._rest += more
        events: list[str] = []
        if self._streamed:
            open_end = b"\r" if self._rest.endswith(b"\r") else b""  # \n may follow
            rest = self._rest.removesuffix(open_end).replace(b"\r\n", b"\n")
            *lines, rest = rest.replace(b"\r", b"\n").split(b"\n")
            self._rest = rest + open_end
            for line in lines:
                events += self._line(line.decode())
        if len(self._rest) + sum(map(len, self._data)) > LONGEST_EVENT:
            raise ValueError(f"an event has more than {LONGEST_EVENT:,} bytes")
        return events

    @property
    def data(self) -> int:
        """Characters of data so far. Comments, other fields and empty lines are none: a server sends
        them to keep a connection open, whether it computes or not."""
        if not self._streamed:
            return len(self._rest.strip())
        rest = self._rest.rstrip(b"\r").decode(errors="replace")
        return self._whole + len(_data_in(rest) or "")

    def end(self) -> list[str]:
        """What is left at the end of the reply."""
        if self._streamed:
            return self._line(self._rest.removesuffix(b"\r").decode()) + self._line("")
        return [self._rest.decode()] if self._rest.strip() else []

    def _line(self, line: str) -> list[str]:
        if not line:
            data, self._data = "\n".join(self._data), []
            return [data] if data and data != DONE else []
        if (value := _data_in(line)) is not None:
            self._data.append(value)
            self._whole += len(value)
        return []


def _data_in(line: str) -> str | None:
    name, _, value = line.removeprefix("\ufeff").partition(":")
    # llama.cpp writes errors in a field of their own.
    return value.removeprefix(" ") if name in ("data", "error") else None
