"""Unquoted: what stands outside of the quotes of JSON that comes in pieces. Pure.

{"a": "}", "b": 1}      places of } outside of quotes: the last character
"""

import re
from collections.abc import Iterator

ENDS = re.compile(r'["\\]')


class Unquoted:
    """Goes through JSON once, piece by piece. `pattern`: of what is looked for, without quotes in it; a
    match lies within a piece."""

    def __init__(self, pattern: str) -> None:
        self._next = re.compile(f'"|{pattern}')
        self._quoted = self._escaped = False

    def found(self, piece: str) -> Iterator[re.Match[str]]:
        """The matches in the next piece. Whoever stops at one goes no further with this."""
        at = 0
        while at < len(piece):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = (ENDS if self._quoted else self._next).search(piece, at)
            if match is None:
                return
            at = match.end()
            if self._quoted:
                self._escaped = match[0] == "\\"
                self._quoted = self._escaped
            elif match[0] == '"':
                self._quoted = True
            else:
                yield match
