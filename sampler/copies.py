"""Copies between host and device: one up and one down for everything that a step needs.

Each copy of its own costs a launch, and each look at a device's numbers waits for all that is queued
there: 1 to 2 ms if another process has the GPU. So what goes up is packed on the host first, what comes
down on the device, and which rows take which way is decided from Python's lists.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Things = TypeVar("Things")


def free_to_read(tensor: Tensor) -> bool:
    """Whether the host reads it without waiting."""
    return tensor.device.type == "cpu"


def up(things: Things, device: torch.device | str) -> Things:
    """The same things with their tensors on the device, in one copy that the host does not wait for.
    Tensors may be in tuples, in values of dicts and in fields of dataclasses, at any depth, and must be
    on the CPU. Tensors on the device share one storage."""
    device = torch.device(device)
    found: list[Tensor] = []
    _each(things, found.append)
    if device.type == "cpu" or not found:
        return things
    parts, order = _by_size(found)
    flat = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
    sent = pinned(flat).to(device, non_blocking=True)
    there = dict(zip(order, _split(sent, parts), strict=True))
    moved: Things = _rebuilt(things, iter([there[place] for place in range(len(found))]))
    return moved


def down(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, in one copy: the only wait for the device."""
    if all(free_to_read(each) for each in tensors):
        return list(tensors)
    parts, order = _by_size(tensors)
    flat = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts]).cpu()
    there = dict(zip(order, _split(flat, parts), strict=True))
    return [there[place] for place in range(len(tensors))]


def pinned(tensor: Tensor) -> Tensor:
    """A tensor of the CPU in page-locked memory, from which a copy to a GPU does not block. torch does
    not use the memory again before the copies out of it are done."""
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call, unused-ignore]
    return tensor.pin_memory() if on_gpu else tensor


def _by_size(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The tensors with the widest numbers first, so that all are aligned; and their places."""
    order = sorted(range(len(tensors)), key=lambda place: -tensors[place].element_size())
    return [tensors[place] for place in order], order


def _split(flat: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """Parts of these bytes with the shapes and dtypes of `like`."""
    for part, each in zip(torch.split(flat, [each.nbytes for each in like]), like, strict=True):
        yield part.view(each.dtype).view(each.shape)


def _each(things: Any, take: Callable[[Tensor], object]) -> None:
    if isinstance(things, Tensor):
        take(things)
    elif isinstance(things, tuple):
        for each in things:
            _each(each, take)
    elif isinstance(things, dict):
        for each in things.values():
            _each(each, take)
    elif is_dataclass(things):
        for each in fields(things):
            _each(getattr(things, each.name), take)


def _rebuilt(things: Any, sent: Iterator[Tensor]) -> Any:
    """In the order of _each()."""
    if isinstance(things, Tensor):
        return next(sent)
    found: list[Tensor] = []
    _each(things, found.append)
    if not found:
        return things
    if isinstance(things, tuple):
        return tuple([_rebuilt(each, sent) for each in things])
    if isinstance(things, dict):
        return {key: _rebuilt(each, sent) for key, each in things.items()}
    changed = {each.name: _rebuilt(getattr(things, each.name), sent) for each in fields(things)}
    return replace(things, **changed)
