"""Messages about adapters that come and go while a cluster runs. Part of baton.wire.messages.

    client               router                              every worker
      |-- LoadAdapter ---->|-------- UseAdapters -------------->|  loads, in a thread
      |                    |<------- AdaptersHeld --------------|
      |<- ClusterInfo -----|   once all of them hold it
      |<- AdapterChanged --|-------- UseAdapters -------------->|  the changes, for the next router

What an adapter is called stands in baton/adapters/, what the router decides in router/catalog.py.
"""

from dataclasses import dataclass
from typing import Annotated

from baton.adapters.changes import LONGEST_PATH, Changes, Entries
from baton.adapters.identity import MOST, Adapter
from baton.bounds import Count, Line, Name, OptionalName, Size

# ---- client -> router


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Offer this adapter, whose folder is `path` below that of --allow-lora-updates, once every worker
    holds it. `replace`: in the place of one with its name, if there is one. Answered with
    AdapterChanged."""

    request: Name
    adapter: Adapter
    path: Annotated[str, Size(1, LONGEST_PATH, printable=True)]
    replace: bool = False


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Offer the adapter of this name no more. What runs with it goes on. Answered with
    AdapterChanged."""

    request: Name
    name: Name


# ---- router -> client


@dataclass(frozen=True, slots=True)
class AdapterChanged:
    """It is done, if `code` is empty; otherwise nothing is changed, and `why`."""

    request: Name
    code: OptionalName = ""
    why: Line = ""


# ---- router -> worker


@dataclass(frozen=True, slots=True)
class UseAdapters:
    """Hold these adapters and no others. Orders are numbered. `changes`: what the cluster offers now, to
    be told to the next router."""

    number: Count
    adapters: Entries
    changes: Changes


# ---- worker -> router


@dataclass(frozen=True, slots=True)
class NotHeld:
    """An adapter that this worker cannot load."""

    digest: Name
    why: Line


@dataclass(frozen=True, slots=True)
class AdaptersHeld:
    """What this worker holds, by digest, and what it cannot. Sent after every order, whose `number` it
    has, and after every change; an adapter that is in neither list is being loaded."""

    number: Count
    held: Annotated[tuple[Name, ...], Size(0, 2 * MOST)]
    failed: Annotated[tuple[NotHeld, ...], Size(0, 2 * MOST)] = ()
