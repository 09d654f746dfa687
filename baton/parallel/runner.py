"""ParallelRunner: the forward of the first rank. Each call is an order to the others, who do the same."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from baton.engine.attention import AfterLayer
from baton.engine.pool import Pool
from baton.engine.runner import Runner
from baton.kv.row import Row
from baton.parallel.orders import FILL, HIDDEN, RUN, plain_rows
from baton.parallel.pools import SharedPools
from baton.parallel.team import Team
from sampler.narrow import greedy

Result = TypeVar("Result")

NO_FASTER = "neither compiled nor recorded: tensor parallel"


class AfterSum:
    """Calls `after_layer` for a layer once the next one has begun: the ranks' attention has been added
    then, so each of them has written its KV of that layer. What it raises is raised by done(): in between
    the other ranks wait for this one."""

    def __init__(self, after_layer: AfterLayer) -> None:
        self._after_layer = after_layer
        self._waiting: int | None = None
        self._error: Exception | None = None

    def __call__(self, layer: int) -> None:
        self._call()
        self._waiting = layer

    def done(self) -> None:
        """The forward is over."""
        self._call()
        if self._error is not None:
            raise self._error

    def _call(self) -> None:
        if self._waiting is None or self._error is not None:
            return
        try:
            self._after_layer(self._waiting)
        except Exception as error:
            self._error = error


class ParallelRunner:
    """See Forward (baton/engine/runner.py)."""

    def __init__(self, runner: Runner, pools: SharedPools, team: Team) -> None:
        self._runner, self._pools, self._team = runner, pools, team
        self.device = runner.device
        self.backend = f"{runner.backend}, {NO_FASTER}"

    def run(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """See Forward."""
        return self._together(RUN, self._runner.run, pool, rows, after_layer)

    def fill(self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None) -> None:
        """See Forward."""
        self._together(FILL, self._runner.fill, pool, rows, after_layer)

    def hidden(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """See Forward."""
        return self._together(HIDDEN, self._runner.hidden, pool, rows, after_layer)

    def greedy(self, pool: Pool, rows: Sequence[Row]) -> list[int | None]:
        """See Forward."""
        return greedy(self.run(pool, rows))

    def _together(
        self,
        kind: str,
        forward: Callable[[Pool, Sequence[Row], AfterLayer | None], Result],
        pool: Pool,
        rows: Sequence[Row],
        after_layer: AfterLayer | None,
    ) -> Result:
        """An error here leaves the others in the middle of the forward, so it ends the worker, also one
        that memory ran out."""
        number, mine = self._pools.number(pool), self._pools.mine
        stored = after_layer is not None
        self._team.order(kind, number, plain_rows(rows, pool.layout.block_size), stored)
        late = AfterSum(after_layer) if after_layer is not None and not mine.staged else None
        try:
            found = forward(mine.of(number), rows, late)
            if stored:
                mine.store(number, rows)
        except Exception as error:
            raise self._team.lost(error) from None
        if late is not None:
            late.done()
        elif after_layer is not None:
            for layer in range(len(pool.keys)):
                after_layer(layer)
        return found
