"""LoraRunner: a model in torch whose linears add the products of adapters, each to its own rows.

Hooks on the linears add them, so that the linears may be of any kind: plain, or packed for this CPU.
Which rows an adapter has is decided once a forward (groups.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from baton.checkpoints.weights import EXPERT
from baton.engine.attention import AfterLayer
from baton.engine.lora.groups import grouped, span
from baton.engine.lora.weights import Product, Products
from baton.engine.pool import Pool
from baton.engine.runner import Runner
from baton.errors import ModelError
from baton.kv.layout import KVLayout
from baton.kv.row import Logits, Row
from baton.wire.shelf import Shelf
from sampler.copies import up
from sampler.narrow import greedy


@dataclass(frozen=True, slots=True)
class _Places:
    """The rows of one adapter in the present forward."""

    adapter: str
    tokens: torch.Tensor | slice  # i64 [tokens of the adapter], or where they stand side by side
    logits: torch.Tensor | slice  # the same of its lines of logits


class LoraRunner:
    """A Forward (engine/runner.py). Rows name their adapter by its digest."""

    def __init__(self, runner: Runner, adapters: Mapping[str, Products]) -> None:
        """`adapters`: by digest, read for the runner's model."""
        self._runner = runner
        self.device = runner.device
        count = len(adapters)
        self.backend = f"{runner.backend}, {count} adapter{'s' * (count != 1)}"
        self.shelf: Shelf | None = None
        self._products: dict[str, dict[str, Product]] = {}  # by linear, then by adapter
        self._hooks: dict[str, RemovableHandle] = {}  # of these linears
        self._known: set[str] = set()
        self._places: tuple[_Places, ...] = ()
        self._sizes = (0, 0)  # tokens and lines of logits of the present forward
        self._ran: set[str] = set()  # linears that have added a product
        for digest, products in adapters.items():
            self.add(digest, products)

    def add(self, digest: str, products: Products) -> None:
        """Rows can name this adapter from the next forward on."""
        self._known.add(digest)
        for linear, product in products.items():
            if linear not in self._products:
                mine = self._products[linear] = {}
                module = self._runner.model.get_submodule(linear)
                self._hooks[linear] = module.register_forward_hook(self._adding(linear, mine))
            self._products[linear][digest] = product

    def remove(self, digest: str) -> None:
        """No row names it any more. Nothing happens for one that is not there."""
        self._known.discard(digest)
        for linear, mine in list(self._products.items()):
            if mine.pop(digest, None) is not None and not mine:
                self._hooks.pop(linear).remove()
                del self._products[linear]

    def run(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """See Forward."""
        with self._applied(rows):
            return self._runner.run(pool, rows, after_layer)

    def fill(self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None) -> None:
        """See Forward."""
        with self._applied(rows):
            self._runner.fill(pool, rows, after_layer)

    def hidden(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """See Forward."""
        with self._applied(rows):
            return self._runner.hidden(pool, rows, after_layer)

    def greedy(self, pool: Pool, rows: Sequence[Row]) -> list[int | None]:
        """See Forward."""
        return greedy(self.run(pool, rows))

    def prove(self, layout: KVLayout, adapters: Mapping[str, tuple[str, Products]]) -> None:
        """ModelError if a linear that an adapter changes takes no part in a forward: the model may read
        its weight without calling it, and the adapter would have no effect there. `adapters`: names and
        products by digest."""
        for digest, (name, products) in adapters.items():
            if expert := next((each for each in sorted(products) if EXPERT.search(each)), None):
                raise ModelError(
                    f"adapter {name} cannot be served: {expert} belongs to an expert, which is given "
                    "only some of a forward's tokens; merge the adapter into the model"
                )
            self._ran.clear()
            pool = Pool.private(layout, 2 * layout.blocks_for(3), self.device)
            blocks = list(range(pool.blocks))
            cut = layout.blocks_for(3)
            rows = [
                Row([0, 1, 2], 0, blocks[:cut], Logits.LAST, adapter=digest),
                Row([1, 0], 0, blocks[cut:], Logits.LAST),
            ]
            if not self.run(pool, rows).isfinite().all():
                raise ModelError(f"adapter {name} cannot be served: with it logits are not finite")
            if idle := sorted(products.keys() - self._ran):
                raise ModelError(
                    f"adapter {name} cannot be served: the model does not run {idle[0]} as a linear, so "
                    "the adapter would have no effect there; merge it into the model"
                )

    @contextmanager
    def _applied(self, rows: Sequence[Row]) -> Iterator[None]:
        """Within the block linears add the adapters of these rows."""
        found = grouped(rows)
        assert self._known.issuperset(group.adapter for group in found.groups), "orders are checked"
        places = tuple(
            _Places(each.adapter, _indices(each.tokens), _indices(each.logits))
            for each in found.groups
        )
        self._places = up(places, self.device)
        self._sizes = found.tokens, found.logits
        try:
            yield
        finally:
            self._places = ()

    def _adding(self, linear: str, products: Mapping[str, Product]) -> Callable[..., Any]:
        """The hook of one linear. `products`: by adapter."""

        def add(module: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            mine = [
                (each, products[each.adapter]) for each in self._places if each.adapter in products
            ]
            if not mine:
                return output
            rows = given[0].reshape(-1, given[0].shape[-1])
            sums = output.reshape(-1, output.shape[-1])
            for places, product in mine:
                where = self._where(linear, places, len(rows))
                if isinstance(where, slice):
                    sums[where].add_(rows[where] @ product.a @ product.b)
                else:
                    added = rows.index_select(0, where) @ product.a @ product.b
                    sums.index_add_(0, where, added)
            self._ran.add(linear)
            return sums.view(output.shape)

        return add

    def _where(self, linear: str, places: _Places, rows: int) -> torch.Tensor | slice:
        """The adapter's rows among those that a linear is given: the tokens, or the lines of logits,
        which are the same where each token has one."""
        tokens, logits = self._sizes
        if rows == tokens:
            return places.tokens
        if rows == logits:
            return places.logits
        raise ModelError(
            f"an adapter for {linear} cannot be served: in a forward of {tokens} tokens the model "
            f"gives it {rows} rows; merge the adapter into the model"
        )


def _indices(places: list[int]) -> torch.Tensor | slice:
    found = span(places)
    return torch.tensor(places) if found is None else found
