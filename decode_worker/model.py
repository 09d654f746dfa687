"""DecodeModel: the protocol between the decode worker's node and its tensors. Tests need no torch.

Objects made for each run in each step are NamedTuples, here and in runs.py and batching.py: creating them
is part of every step's time, and a frozen dataclass takes four times as long.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt, Region
from baton.kv.row import Row
from baton.wire.records import Logprob
from sampler.params import SamplingParams


class Draw(NamedTuple):
    """How to sample a row at `position`. `seen` are all token ids so far, for the repetition penalty;
    `generated` are those after the prompt."""

    sampling: SamplingParams
    position: int
    seen: Sequence[int]
    generated: Sequence[int] = ()
    forbidden: Sequence[int] = ()  # ids that are not allowed now
    mask: bytes | None = None  # of the ids that are (baton/grammar.py)
    logprobs: int = -1  # number of alternatives to report; -1: no logprobs
    given: int | None = None  # nothing is drawn: report the logprob of this token

    @property
    def plain(self) -> bool:
        """Greedy, and no logit is changed before."""
        free = not self.forbidden and self.mask is None and self.given is None
        return free and self.sampling.plain


class Drawn(NamedTuple):
    """Result of a Draw."""

    token_id: int
    logprob: Logprob | None = None


class DecodeModel(Protocol):
    """The node's interface to engine, sampler and exports, implemented in decode_worker/decoding.py."""

    def expect(self, grant: Grant) -> None:
        """A writer may write into these blocks from now on."""

    def poll(self) -> bool:
        """Receive some of the KV that has arrived, without waiting. True if there is more."""

    def arrival(self, grant: Grant, receipt: Receipt, tokens: int) -> Arrival:
        """Whether the KV of so many tokens, described by this receipt, is in the pool."""

    def retire(self, grant: Grant) -> None:
        """The grant is over: drop what still arrives under it."""

    def let_in(self, writer: str) -> None:
        """This prefill worker may be given grants from now on."""

    def shut_out(self, writer: str) -> None:
        """Nothing that this writer has begun to write arrives any more, as far as the transport can see
        to that; where it cannot, the writer has stopped."""

    def renew_epoch(self, epoch: str) -> tuple[Region, ...]:
        """Export the pool again: the new regions are closed to writers of the old epoch."""

    def use_cores(self, cores: tuple[int, ...]) -> None:
        """Compute on these cores from the next step on."""

    def step(self, rows: Sequence[Row], draws: Sequence[Draw]) -> list[Drawn | None]:
        """One forward, then one result for each draw, in order; None where logits are not finite. Raises
        OutOfMemory; then nothing of the forward counts."""

    def clock(self) -> float:
        """Monotonic seconds, to time a step."""
