"""Runner: one forward over a pool. Prefill, chunked prefill and decode are the same call."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from baton.engine.attention import AfterLayer, Kernel, PagedForward
from baton.engine.batch import Batch, pack
from baton.engine.gather import GatherAttention
from baton.engine.pool import Pool
from baton.kv.row import Row
from sampler.narrow import greedy

PlanKernel = Callable[
    [Batch[torch.Tensor], int], Kernel
]  # batch, block size -> this forward's attention


class Forward(Protocol):
    """A model pointed at our pools, however it is computed. Holds no sequence's state."""

    @property
    def device(self) -> torch.device:
        """Where its pools are."""

    @property
    def backend(self) -> str:
        """In a few words for people: what computes it, and why nothing faster does."""

    def run(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """Run the rows, KV into the pool; fp32 logits [n, vocabulary] of the positions they ask
        for, in the rows' order: one line for Logits.LAST, one per token for Logits.ALL. They are
        good until the next run.
        `after_layer(l)` is called when layer l's KV is in the pool, before the next is computed."""

    def fill(self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None) -> None:
        """Run the rows for their KV alone: what prefill does. No logits."""

    def greedy(self, pool: Pool, rows: Sequence[Row]) -> list[int | None]:
        """Run the rows; of each line of logits the likeliest token (the lowest id of equal ones),
        None if the line is not sound: a NaN or an infinity is its largest."""


class Runner:
    """The Forward of any model that torch runs: transformers' code with our attention. `model` is a
    PreTrainedModel; the name is not imported, for that takes seconds."""

    def __init__(self, model: Any, plan_kernel: PlanKernel = GatherAttention) -> None:
        self.model = model
        self.body = model.base_model  # the model without its lm_head
        self.device = next(model.parameters()).device
        self.plan_kernel = plan_kernel
        self.backend = "in torch"

    @torch.inference_mode()
    def run(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """See Forward."""
        batch = pack(rows, pool.layout.block_size, self.device)
        kernel = self.plan_kernel(batch, pool.layout.block_size)
        return self.logits(PagedForward(pool, batch, kernel, after_layer))

    def logits(self, forward: PagedForward) -> torch.Tensor:
        """One forward, planned already: fp32 logits of the batch's `logit_rows`."""
        batch = forward.batch
        output = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.logit_rows,
            baton=forward,
        )
        assert forward.layers_done == len(forward.pool.keys)
        return output.logits[0].float()

    @torch.inference_mode()
    def fill(self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None) -> None:
        """See Forward. The lm_head is not run."""
        batch = pack(rows, pool.layout.block_size, self.device)
        kernel = self.plan_kernel(batch, pool.layout.block_size)
        forward = PagedForward(pool, batch, kernel, after_layer)
        self.body(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            baton=forward,
        )
        assert forward.layers_done == len(pool.keys)

    def greedy(self, pool: Pool, rows: Sequence[Row]) -> list[int | None]:
        """See Forward."""
        return greedy(self.run(pool, rows))
