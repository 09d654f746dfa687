"""Affinity: which decode worker probably holds the beginning of a prompt already. Pure.

The router does not know what is cached where, but it knows where it has sent what: the last worker that
was given a block's name (baton/kv/prefix.py) is the best place to look for it. A wrong guess costs a
prefill, never a wrong answer: the worker itself says what it has.
"""

from collections import OrderedDict
from collections.abc import Sequence

REMEMBERED = 100_000
"""Names of blocks; about 10 MB."""


class Affinity:
    """Where blocks were sent last."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._places: OrderedDict[bytes, str] = OrderedDict()

    def sent(self, names: Sequence[bytes], worker: str) -> None:
        """A sequence whose first blocks have these names is at this worker from now on."""
        for name in names:
            self._places[name] = worker
            self._places.move_to_end(name)
        while len(self._places) > self._remembered:
            self._places.popitem(last=False)

    def there(self, names: Sequence[bytes], worker: str) -> int:
        """How many of the first blocks are probably there."""
        count = 0
        for name in names:
            if self._places.get(name) != worker:
                break
            count += 1
        return count
