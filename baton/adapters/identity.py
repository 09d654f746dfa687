"""Adapter: what the processes of a cluster call one adapter. Equal digests, equal products."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated

from baton.bounds import Name, Size

SHOWN = 12
"""Characters of a digest in a message for people."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """`name` is the `model` of a request, `digest` a hash of all that the adapter computes with. Orders
    carry the digest: a name may stand for another folder in a process that was started later."""

    name: Name
    digest: Name


MOST = 4096
"""Adapters of a cluster. The memory for them ends earlier."""
Adapters = Annotated[tuple[Adapter, ...], Size(0, MOST)]


NAMED, LETTERS = 5, 60
"""Adapters that a message for people names, and how many characters of each name."""


def listed(adapters: Sequence[Adapter]) -> str:
    """For people: sql (1f2e3d4c5b6a), law (...) and 7 more. Short, however many there are: a message
    longer than the bound of its Line would be dropped, and its receiver wait."""
    shown = ", ".join(_shown(each, LETTERS) for each in adapters[:NAMED]) or "no adapters"
    return shown if len(adapters) <= NAMED else f"{shown} and {len(adapters) - NAMED:,} more"


def _shown(adapter: Adapter, most: int | None = None) -> str:
    name = adapter.name
    name = name if most is None or len(name) <= most else f"{name[:most]}..."
    return f"{name} ({adapter.digest[:SHOWN]})"


def unlike(worker: Sequence[Adapter], router: Sequence[Adapter]) -> str:
    """Why a worker with other adapters cannot join, with the first that differs; empty if none does."""
    for ours, theirs in zip_longest(router, worker):
        if ours != theirs:
            here, there = ("none" if each is None else _shown(each) for each in (ours, theirs))
            return (
                f"the worker has {listed(worker)}, the router {listed(router)}: start both with the same "
                f"--lora, and folders of the same content; the first to differ is {there} of the worker, "
                f"{here} of the router"
            )
    return ""


def no_engine(router: Sequence[Adapter]) -> str:
    """Why another engine cannot join a router with adapters."""
    return (
        f"the router has {listed(router)}, and other engines cannot serve beside adapters: start the "
        "router without --lora, or give engine workers a router of their own"
    )


def unknown(digest: str, adapters: Sequence[Adapter]) -> str:
    """Why an order for this adapter cannot be carried out here; empty if it can, or is for none."""
    if not digest or any(each.digest == digest for each in adapters):
        return ""
    return f"adapter {digest[:SHOWN]} is not loaded here, but {listed(adapters)}"


def not_held(digest: str, held: Collection[str]) -> str:
    """Why a worker that holds these, by digest, cannot carry out an order for this adapter; empty if it
    can, or the order is for none."""
    if not digest or digest in held:
        return ""
    return f"adapter {digest[:SHOWN]} is not loaded here"


def clash(name: str) -> str:
    """For people: the model and an adapter have one name."""
    return f"{name} is a name of the model and of an adapter: change --served-model-name or --lora"
