"""Pooled: the hidden states of a prompt's tokens as one vector of length 1, chunk by chunk."""

from collections.abc import Sequence

import torch

from baton.engine.attention import AfterLayer
from baton.engine.pool import Pool
from baton.engine.runner import Forward
from baton.errors import TransferError
from baton.kv.row import Row
from prefill_worker.model import Chunk


class Pooled:
    """`pooling`: the mean of all tokens, or the last one (baton/params.py). Sums are kept in float64, so
    chunks of other sizes change the last bit of few numbers, if any."""

    def __init__(self, pooling: str) -> None:
        self._pooling = pooling
        self._sum: torch.Tensor | None = None

    def after(self, hidden: torch.Tensor) -> torch.Tensor:
        """The sum with the next tokens, [tokens, width]; keep() makes it count."""
        new = hidden.double()
        new = new.sum(0) if self._pooling == "mean" else new[-1]
        return self._sum + new if self._pooling == "mean" and self._sum is not None else new

    def keep(self, sum_: torch.Tensor) -> None:
        self._sum = sum_

    @property
    def vector(self) -> bytes:
        """float32. The length of a mean does not matter, so the sum is not divided. Raises TransferError
        if the numbers are not finite."""
        assert self._sum is not None
        if not self._sum.isfinite().all():
            raise TransferError("the hidden states of the prompt are not finite numbers")
        length = self._sum.norm().clamp_min(torch.finfo(torch.float32).tiny)
        return (self._sum / length).float().cpu().numpy().tobytes()


class Embeddings:
    """Those that are under way, by run."""

    def __init__(self) -> None:
        self._pooled: dict[str, Pooled] = {}

    def fill(
        self,
        runner: Forward,
        pool: Pool,
        chunks: Sequence[Chunk],
        rows: Sequence[Row],
        after_layer: AfterLayer | None = None,
    ) -> None:
        """One forward. Hidden states are computed, of all rows, if one of them is for an embedding. Where
        the memory does not suffice, nothing of it counts."""
        if not any(chunk.pooling for chunk in chunks):
            runner.fill(pool, rows, after_layer)
            return
        hidden, start = runner.hidden(pool, rows, after_layer), 0
        found: list[tuple[str, Pooled, torch.Tensor]] = []
        for chunk in chunks:
            end = start + len(chunk.token_ids)
            if chunk.pooling:
                run = chunk.grant.run
                pooled = self._pooled.get(run) or Pooled(chunk.pooling)
                found.append((run, pooled, pooled.after(hidden[start:end])))
            start = end
        for run, pooled, sum_ in found:
            pooled.keep(sum_)
            self._pooled[run] = pooled

    def vector(self, run: str) -> bytes:
        """All tokens are computed. Raises TransferError if it is not finite."""
        return self._pooled[run].vector

    def drop(self, run: str) -> None:
        """It is not wanted any more, or was no embedding."""
        self._pooled.pop(run, None)
