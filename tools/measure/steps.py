"""Decode steps of an engine in this process, to be timed again and again."""

import time

from baton.engine.pool import Pool
from baton.engine.runner import Forward
from baton.kv.layout import KVLayout
from baton.kv.row import Logits, Row

TOKEN = 5  # in every vocabulary; which token it is does not change the time


class DecodeSteps:
    """One decode step of `batch` sequences, with `context` tokens in the cache before each."""

    def __init__(self, runner: Forward, layout: KVLayout, *, batch: int, context: int) -> None:
        each = layout.blocks_for(context + 1)
        tables = [list(range(i * each, (i + 1) * each)) for i in range(batch)]
        self._runner, self._pool = runner, Pool.private(layout, batch * each, runner.device)
        runner.fill(self._pool, [Row([TOKEN] * context, 0, blocks) for blocks in tables])
        self._rows = [Row([TOKEN + i], context, t, Logits.LAST) for i, t in enumerate(tables)]

    def seconds(self, steps: int) -> float:
        """Time of one step, the mean of `steps` in a row."""
        begun = time.perf_counter()
        for _ in range(steps):
            self._runner.run(self._pool, self._rows)
        return (time.perf_counter() - begun) / steps
