"""RopeRule: which rotary frequencies each token of a sequence has, where they depend on its length. Pure.

Models of the rope types `dynamic` and `longrope` choose the frequencies of a forward by the length of
its sequence. transformers' generate() computes a prompt of P tokens in one forward and then one token in
each, so the token at position p has the frequencies of its *rope length* max(P, p + 1):

    positions     0  1  2 | 3  4  5        a prompt of 3 tokens, then what was generated
    rope lengths  3  3  3 | 4  5  6

P is the sequence's *rope floor*. It travels with the tokens, so chunks, batches and a refill after a
preemption or a death give every token its own rope length again.

Phi-3's generate() differs. When the sequence grows beyond the threshold of its longrope, everything is
computed again with the long factors. Here such a run returns its blocks at this point (Outgrown), and its
refill has all tokens known by then as its rope floor.

The keys and values of a token depend on the rope lengths up to it. So they are part of the prefix cache's
hashes (baton/kv/prefix.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NEVER = 2**62

RECOMPUTING = {"phi3": 4096, "phi4_multimodal": 4096}
"""Families that compute a sequence again beyond the threshold, and their default threshold."""

OLD_NAMES = ("su", "yarn")
"""What these families once called longrope."""


@dataclass(frozen=True, slots=True)
class RopeRule:
    """Rope lengths up to the smallest limit have the same frequencies. Beyond `grows_above` (dynamic)
    each length has its own; beyond each of `switches` (longrope) there is another constant set."""

    grows_above: int | None = None
    switches: tuple[int, ...] = ()  # rising
    recomputes: bool = False  # a sequence is computed again when it exceeds a switch
    stretch: float = 1.0  # dynamic: the context length in multiples of the config's

    @classmethod
    def of(cls, config: Mapping[str, Any], positions: int) -> "RopeRule":
        """The rule of a model by its config.json, which gives it so many `positions`."""
        text = {**config, **(config.get("text_config") or {})}
        family = str(text.get("model_type"))
        found = text.get("rope_scaling") or text.get("rope_parameters") or {}
        nested = [each for each in found.values() if isinstance(each, Mapping)]  # by kind of layer
        grows_above, stretch, switches = None, 1.0, set()
        for each in nested or [found]:
            kind = str(each.get("rope_type") or each.get("type"))
            if family in RECOMPUTING and kind in OLD_NAMES:
                kind = "longrope"
            if kind == "longrope":
                outer = None if nested else text.get("original_max_position_embeddings")
                inner = RECOMPUTING.get(family) or each.get("original_max_position_embeddings")
                switches.add(int(outer or inner or positions))
            elif "dynamic" in kind and not (family.startswith("hunyuan") and each.get("alpha")):
                grows_above = positions
                stretch = max(stretch, float(each.get("factor") or 1.0))
        recomputes = family in RECOMPUTING and bool(switches)
        return cls(grows_above, tuple(sorted(switches)), recomputes, stretch)

    @property
    def varies(self) -> bool:
        """Frequencies depend on the length of the sequence."""
        return self.grows_above is not None or bool(self.switches)

    @property
    def limits(self) -> tuple[int, ...]:
        """The longest rope lengths before a change of frequencies, rising."""
        found = {*self.switches, *([] if self.grows_above is None else [self.grows_above])}
        return tuple(sorted(found))

    def context(self, positions: int) -> int:
        """Tokens of the longest sequence of a model with so many positions."""
        return int(positions * self.stretch)

    def floor(self, prompt_tokens: int, known_tokens: int) -> int:
        """The rope floor of a run that begins with so many known tokens, the prompt's first."""
        if not self.varies:
            return 0
        return known_tokens if self.recomputes else prompt_tokens

    def recompute_at(self, floor: int) -> int:
        """The number of known tokens with which a run of this rope floor must begin again."""
        beyond = [switch for switch in self.switches if switch >= floor] if self.recomputes else []
        return beyond[0] + 1 if beyond else NEVER

    def effective(self, length: int) -> int:
        """The smallest rope length with the frequencies of this one; 0 up to the first limit."""
        if self.grows_above is not None and length > self.grows_above:
            return length
        return max((switch + 1 for switch in self.switches if length > switch), default=0)

    def lengths(self, floor: int, start: int, end: int) -> list[int]:
        """The effective rope lengths of the tokens at positions start to end - 1; empty if the rule makes
        no difference to any token of any sequence."""
        if not self.varies:
            return []
        same = [self.effective(floor)] * max(0, min(end, floor) - start)
        return same + [self.effective(p + 1) for p in range(max(start, floor), end)]


FIXED = RopeRule()
"""Most models: the frequencies never change."""
