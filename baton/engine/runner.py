"""Runner: one forward over a pool. Prefill, chunked prefill and decode are the same call."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from baton.engine.attention import AfterLayer, Kernel, PagedForward
from baton.engine.batch import Batch, pack
from baton.engine.gather import GatherAttention
from baton.engine.pool import Pool
from baton.engine.rotary import Rotary
from baton.kv.row import Row
from sampler.narrow import greedy

PlanKernel = Callable[[Batch[torch.Tensor], int], Kernel]
"""Batch and block size to the attention kernel of one forward."""


class Forward(Protocol):
    """A model that runs over KV pools, however it is computed. It holds no state of sequences."""

    @property
    def device(self) -> torch.device:
        """The device of its pools."""

    @property
    def backend(self) -> str:
        """A short description for people: what computes the forward, and why nothing faster does."""

    def run(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """Run the rows and write their KV into the pool. Returns fp32 logits [n, vocabulary] in the
        rows' order: one line for Logits.LAST, one per token for Logits.ALL. They are valid until
        the next run.
        `after_layer(l)` is called when layer l's KV is in the pool, before the next is computed."""

    def fill(self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None) -> None:
        """Run the rows for their KV only, as prefill does. Computes no logits."""

    def hidden(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """Run the rows and return the last hidden states of all their tokens, after the final norm, in
        fp32 [tokens, width]. They are valid until the next run."""

    def greedy(self, pool: Pool, rows: Sequence[Row]) -> list[int | None]:
        """Run the rows and return the most likely token for each line of logits, the lowest id among
        equals; None if the largest logit is NaN or infinite."""


class Runner:
    """The Forward of any model in torch: transformers' code with paged attention. `model` is a
    PreTrainedModel, which is not imported here because that takes seconds."""

    def __init__(self, model: Any, plan_kernel: PlanKernel = GatherAttention) -> None:
        self.model = model
        self.body = model.base_model  # the model without its lm_head
        self.device = next(model.parameters()).device
        self.plan_kernel = plan_kernel
        self.rotary = Rotary.of(model)
        self.backend = "in torch"

    @torch.inference_mode()
    def run(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """See Forward."""
        with self._rotating(rows):
            return self.logits(self._planned(pool, rows, after_layer))

    def logits(self, forward: PagedForward) -> torch.Tensor:
        """One planned forward: fp32 logits of the batch's `logit_rows`."""
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
        """See Forward. Skips the lm_head."""
        self._states(pool, rows, after_layer)

    @torch.inference_mode()
    def hidden(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """See Forward."""
        return self._states(pool, rows, after_layer).last_hidden_state[0].float()

    def _states(self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None) -> Any:
        """What transformers' model without its lm_head returns."""
        forward = self._planned(pool, rows, after_layer)
        with self._rotating(rows):
            output = self.body(
                input_ids=forward.batch.input_ids,
                position_ids=forward.batch.position_ids,
                use_cache=False,
                baton=forward,
            )
        assert forward.layers_done == len(pool.keys)
        return output

    def greedy(self, pool: Pool, rows: Sequence[Row]) -> list[int | None]:
        """See Forward."""
        return greedy(self.run(pool, rows))

    def _rotating(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        return nullcontext() if self.rotary is None else self.rotary.rotating(rows)

    def _planned(
        self, pool: Pool, rows: Sequence[Row], after_layer: AfterLayer | None
    ) -> PagedForward:
        batch = pack(rows, pool.layout.block_size, self.device)
        kernel = self.plan_kernel(batch, pool.layout.block_size)
        return PagedForward(pool, batch, kernel, after_layer)
