"""DecodeModel: what the decode worker's node needs of tensors, as a protocol, so that the node is tested
without any.

Objects made for each run at each step are NamedTuples, here and beside: on two cores the time of Python
adds to every step, and a frozen dataclass takes four times as long to make.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt, Region
from baton.kv.row import Row
from baton.wire.records import Logprob
from sampler.params import SamplingParams


class Draw(NamedTuple):
    """How to sample a row: at `position`, by a function of (seed, choice, position) alone. `seen`
    are all token ids so far, for the repetition penalty, `generated` those without the prompt."""

    sampling: SamplingParams
    position: int
    seen: Sequence[int]
    generated: Sequence[int] = ()
    forbidden: Sequence[int] = ()  # ids that may not come now
    mask: bytes | None = None  # of the ids that may (baton/grammar.py)
    logprobs: int = -1  # of the token, and so many of the likeliest
    given: int | None = None  # nothing is drawn: this token stands, and is asked about

    @property
    def plain(self) -> bool:
        """It is the likeliest token, and no logit is touched before."""
        free = not self.forbidden and self.mask is None and self.given is None
        return free and self.sampling.plain


class Drawn(NamedTuple):
    """The result of a Draw."""

    token_id: int
    logprob: Logprob | None = None


class DecodeModel(Protocol):
    """What the node asks of the engine, sampler and exports. decode_worker/decoding.py is real."""

    def expect(self, grant: Grant) -> None:
        """Someone may write into these blocks from now on."""

    def poll(self) -> bool:
        """Take in some of the KV that has arrived; True if there is more. Never waits."""

    def arrival(self, grant: Grant, receipt: Receipt, tokens: int) -> Arrival:
        """Is the KV of so many tokens, which this receipt speaks of, in the pool?"""

    def retire(self, grant: Grant) -> None:
        """The grant is over: what still arrives under it is dropped."""

    def renew_epoch(self, epoch: str) -> tuple[Region, ...]:
        """Offer the pool anew: writers of the old epoch cannot reach it through the new regions."""

    def use_cores(self, cores: tuple[int, ...]) -> None:
        """Compute on these from the next step on."""

    def step(self, rows: Sequence[Row], draws: Sequence[Draw]) -> list[Drawn | None]:
        """One forward; one token for each position that asks for logits, in order, None where they
        are not finite."""
