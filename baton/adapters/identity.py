"""Adapter: what the processes of a cluster call one adapter. Equal digests, equal products."""

from collections.abc import Sequence
from dataclasses import dataclass
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


def listed(adapters: Sequence[Adapter]) -> str:
    """For people: sql (1f2e3d4c5b6a), law (...)."""
    return ", ".join(f"{each.name} ({each.digest[:SHOWN]})" for each in adapters) or "no adapters"


def unknown(digest: str, adapters: Sequence[Adapter]) -> str:
    """Why an order for this adapter cannot be carried out here; empty if it can, or is for none."""
    if not digest or any(each.digest == digest for each in adapters):
        return ""
    return f"adapter {digest[:SHOWN]} is not loaded here, but {listed(adapters)}"


def clash(name: str) -> str:
    """For people: the model and an adapter have one name."""
    return f"{name} is a name of the model and of an adapter: change --served-model-name or --lora"
