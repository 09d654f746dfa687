"""Changes: how the adapters of a running cluster differ from those of its --lora options.

The router decides on them and tells every worker and client. A router that is started again learns them
back: the newest version that anybody was told counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from baton.adapters.identity import MOST, Adapter, Adapters
from baton.bounds import Count, Size

LONGEST_PATH = 4096
Path = Annotated[str, Size(0, LONGEST_PATH, printable=True)]


@dataclass(frozen=True, slots=True)
class Entry:
    """An adapter and where it is: `path`, below the folder of --allow-lora-updates of each process; empty
    for one of --lora, which each process has by itself."""

    adapter: Adapter
    path: Path = ""


Entries = Annotated[tuple[Entry, ...], Size(0, 2 * MOST)]


@dataclass(frozen=True, slots=True)
class Changes:
    """`version` counts them. `removed`: adapters of --lora options that are offered no more. `leaving`:
    adapters that no new request can name, and that some may still run with."""

    version: Count = 0
    loaded: Entries = ()  # sorted by name
    removed: Adapters = ()  # likewise
    leaving: Entries = ()

    def offered(self, own: Iterable[Adapter]) -> tuple[Entry, ...]:
        """All adapters that requests can name, sorted by name. `own`: those of the --lora options, which
        keep their names: a router may have been started again with others."""
        removed = set(self.removed)
        found = {each.name: Entry(each) for each in own if each not in removed}
        for each in self.loaded:
            found.setdefault(each.adapter.name, each)
        return tuple(found[name] for name in sorted(found))


NONE = Changes()


def digests(entries: Iterable[Entry]) -> frozenset[str]:
    """What these adapters compute with: equal digests, equal products."""
    return frozenset(each.adapter.digest for each in entries)
