"""Shelf: blocks by the names of what is in them. Some are held by runs; those that lie here, held by
nobody, may be taken for something else, the least recently used first."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Shelf:
    """A name belongs to one block and a block has at most one name."""

    _blocks: dict[bytes, int] = field(default_factory=dict)
    _names: dict[int, bytes] = field(default_factory=dict)
    lying: dict[int, None] = field(default_factory=dict)  # oldest first

    def longest(self, names: Sequence[bytes]) -> tuple[int, ...]:
        """The blocks of the first names, up to the first that is not here."""
        found = []
        for name in names:
            block = self._blocks.get(name)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def put(self, block: int, name: bytes) -> None:
        """This block, which somebody holds, has this name; unless another has it, or it has one."""
        if name not in self._blocks and block not in self._names:
            self._blocks[name] = block
            self._names[block] = name

    def in_use(self, block: int) -> None:
        """Somebody holds it: it lies here no more, but keeps its name."""
        self.lying.pop(block, None)

    def keep(self, block: int) -> bool:
        """Nobody holds it any more. True: it has a name and stays; False: it is worth nothing."""
        if block in self._names:
            self.lying[block] = None
            return True
        return False

    def take_oldest(self) -> int:
        """For something else: its name is gone."""
        block = next(iter(self.lying))
        del self.lying[block]
        del self._blocks[self._names.pop(block)]
        return block

    def clear(self) -> list[int]:
        """No name is good any more. Returns the blocks that lay here."""
        lay = list(self.lying)
        self.lying.clear()
        self._names.clear()
        self._blocks.clear()
        return lay

    def __len__(self) -> int:
        return len(self.lying)

    def check(self) -> None:
        """An assertion: what it catches is a bug of ours."""
        assert {name: block for block, name in self._names.items()} == self._blocks
        assert self.lying.keys() <= self._names.keys()
