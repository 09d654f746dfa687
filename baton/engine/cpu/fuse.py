"""Fusion of row work: patterns of operations that become one pass over the numbers.

    x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))   ->  gelu_tanh(x)
    silu(x) y,  gelu(x) y,  gelu_tanh(x) y          ->  silu_mul(x, y), ...

The results differ in rounding only. The self-test covers them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import isclose, pi, sqrt

from baton.engine.cpu.values import At, Base, Micro

GATED = {"silu": "silu_mul", "gelu": "gelu_mul", "gelu_tanh": "gelu_tanh_mul"}


def fuse(micros: Sequence[Micro]) -> tuple[Micro, ...]:
    """Merge operations, so that fewer do the same work."""
    work = _Work(micros)
    for micro in micros:
        if micro.code == "mul":
            work.replace(micro, work.gelu(micro))
    for micro in list(work.micros):
        if micro.code == "mul":
            work.replace(micro, work.gated(micro))
    return tuple(work.micros)


class _Work:
    def __init__(self, micros: Iterable[Micro]) -> None:
        self.micros = list(micros)

    def replace(self, old: Micro, found: tuple[Micro, list[Micro]] | None) -> None:
        """Put the fused operation in the place of the last one it replaces."""
        if found is not None:
            fused, eaten = found
            self.micros[self.micros.index(old)] = fused
            self.micros = [each for each in self.micros if each not in eaten]

    def maker(self, at: At | None, like: Micro) -> Micro | None:
        """The operation that computes exactly this operand in the same loops, if it has no other user."""
        if at is None or not isinstance(at.where, Base):
            return None
        base = at.where
        if base.level != base.last_use or base.kind != "arena" or base.parent is not None:
            return None
        makers = [each for each in self.micros if each.to.where is base]
        users = Counter(
            base is used.where
            for each in self.micros
            for used in (each.a, each.b, each.c)
            if used is not None
        )
        if len(makers) != 1 or users[True] != 1:
            return None
        maker = makers[0]
        same_loops = (maker.outer, maker.inner) == (like.outer, like.inner)
        return maker if same_loops and _walks(maker.to, like) == _walks(at, like) else None

    def gated(self, product: Micro) -> tuple[Micro, list[Micro]] | None:
        for mine, other in ((product.a, product.b), (product.b, product.a)):
            maker = self.maker(mine, product)
            if maker is not None and maker.code in GATED:
                fused = replace(product, code=GATED[maker.code], a=maker.a, b=other)
                return fused, [maker]
        return None

    def gelu(self, product: Micro) -> tuple[Micro, list[Micro]] | None:
        """The pattern, backwards from half * (tanh(...) + 1)."""
        for first, second in ((product.a, product.b), (product.b, product.a)):
            half = self.maker(first, product)
            chain = [self.maker(second, product)]
            for code in ("add_to", "tanh", "times", "add"):
                last = chain[-1]
                if last is None or last.code != code:
                    break
                chain.append(self.maker(last.b if code == "add" else last.a, product))
            else:
                plus, tanh, scaled, added, small = chain
                cube = self.maker(small.a, product) if small is not None else None
                if half is None or plus is None or scaled is None or added is None:
                    continue
                if small is None or cube is None or tanh is None:
                    continue
                numbers = (
                    (half.x, 0.5),
                    (plus.x, 1.0),
                    (scaled.x, sqrt(2 / pi)),
                    (added.x, 1.0),
                    (small.x, 0.044715),
                )
                x = half.a
                spelled = half.code == "times" and small.code == "times" and cube.code == "cube"
                if spelled and cube.a == x == added.a and all(isclose(*each) for each in numbers):
                    eaten = [half, plus, tanh, scaled, added, small, cube]
                    return replace(product, code="gelu_tanh", a=x, b=None), eaten
        return None


def _walks(at: At, like: Micro) -> tuple[int, int, int]:
    """Offset and strides of an operand; strides of loops with one iteration count as 0."""
    outer = at.outer_stride if like.outer > 1 else 0
    return at.offset, outer, at.inner_stride if like.inner > 1 else 0
