"""Frames: pieces of text as events, cheaply.

Of the chunks of a stream hardly anything differs but the text. So what stands around it is put into
JSON once for each choice, by the very function that makes such a chunk (choices.py), then the text alone.
"""

from dataclasses import replace

from baton.server.choices import Fresh, Shape
from baton.server.sse import event, json_of

MARK = "\0"


class Frames:
    """Those of one stream."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._around: dict[int, tuple[str, str]] = {}  # by choice

    def event(self, fresh: Fresh) -> bytes:
        """The same bytes as event(shape.piece(fresh))."""
        if not self._shape.plain:
            return event(self._shape.piece(fresh))
        around = self._around.get(fresh.choice.index)
        if around is None:
            marked = event(self._shape.piece(replace(fresh, text=MARK))).decode()
            before, _, after = marked.rpartition(json_of(MARK))  # no name stands behind it
            around = self._around[fresh.choice.index] = before, after
        return f"{around[0]}{json_of(fresh.text)}{around[1]}".encode()
