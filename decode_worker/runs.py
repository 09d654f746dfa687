"""Runs: the sequences a decode worker is at work on, and who gives way when the pool is full.

A run begins with blocks for what is known of it and a few tokens more, and grows block by block. When
there is none left, the youngest run gives back all of its blocks and begins again later (preemption
by recompute); so the oldest goes on in any case, and everything that fits the pool alone gets done.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.grammar import Guide
from baton.kv.blocks import BlockTable
from baton.kv.grant import Grant
from baton.kv.region import Receipt
from baton.kv.row import Logits, Row
from baton.params import GenerationParams
from baton.wire.records import Logprob
from decode_worker.batching import Progress, Share
from decode_worker.model import Draw
from sampler.params import SamplingParams

SCORED_ROWS = 256
"""Rows of a prompt whose logits are looked at in one forward: each is as wide as the vocabulary."""


@dataclass(slots=True)
class Run:
    """A started run: all its token ids, of which the KV of the first `computed` is in the pool."""

    grant: Grant
    known: list[int]
    computed: int
    prompt_tokens: int  # of the known ones; the others were generated
    params: GenerationParams
    guide: Guide | None = None
    told: bool = False  # its first token is out
    scores: list[Logprob] = field(default_factory=list)  # of the prompt's tokens but the first
    published: bool = False  # its prompt's blocks
    table: list[int] = field(init=False)  # its blocks, those it grew by at the end
    sampling: SamplingParams = field(init=False)
    until: int = field(init=False)  # tokens at which it ends by length

    def __post_init__(self) -> None:
        assert self.params.sampling is not None, "params of a run are resolved"
        self.sampling = self.params.sampling
        self.table = list(self.grant.table)
        self.until = self.prompt_tokens + self.params.max_new_tokens

    @property
    def scoring(self) -> bool:
        """Its prompt's logprobs are wanted and not there yet."""
        return self.params.prompt_logprobs >= 0 and len(self.scores) < self.prompt_tokens - 1

    def draw(self, guessed: Sequence[int]) -> Draw:
        """How to sample what follows the known and these guessed tokens."""
        seen = self.known + list(guessed) if guessed else self.known
        sampling = self.sampling
        counted = sampling.presence_penalty or sampling.frequency_penalty
        generated = seen[self.prompt_tokens :] if counted else ()
        early = len(seen) - self.prompt_tokens < self.params.min_tokens
        return Draw(
            sampling,
            len(seen),
            seen,
            generated,
            forbidden=self.params.stop_token_ids if early else (),
            mask=self.guide.mask() if self.guide is not None else None,
            logprobs=self.params.logprobs,
        )

    def progress(self, name: str) -> Progress:
        """For plan_step()."""
        return Progress(name, len(self.known), self.computed, SCORED_ROWS if self.scoring else None)

    def guessable(self, block_size: int) -> int:
        """How many tokens may be guessed: within its blocks and its length."""
        room = len(self.table) * block_size - len(self.known)
        return min(room, self.until - len(self.known) - 1)

    def ask(self, share: Share, guessed: list[int]) -> "Asked":
        """Its row of the next forward, and what is to be drawn from it. Raises RequestError if its
        grammar leads nowhere."""
        start = self.computed
        tokens = self.known[start : start + share.tokens] + guessed
        draws: list[Draw] = []
        if self.scoring:  # after each token of the prompt, how likely was the next?
            ends = range(start + 1, start + share.tokens + 1)
            draws += [self.score(index) for index in ends if index < self.prompt_tokens]
        scores = len(draws)
        if share.samples:
            draws += [self.draw(guessed[:i]) for i in range(len(guessed) + 1)]
        logits = Logits.ALL if scores or guessed else Logits.LAST if draws else Logits.NONE
        self.computed += share.tokens
        return Asked(share.run, Row(tokens, start, self.table, logits), draws, scores, guessed)

    def score(self, index: int) -> Draw:
        """The known token at this index: how likely was it?"""
        draw = Draw(self.sampling, index, ())
        return draw._replace(logprobs=self.params.prompt_logprobs, given=self.known[index])

    def append(self, token_id: int) -> str | None:
        """One more token; why the run ends with it, if it does."""
        self.known.append(token_id)
        if token_id in self.params.stop_token_ids:
            return "stop"
        if self.guide is not None:
            self.guide.accept(token_id)
            if self.guide.finished:
                return "stop"
        return "length" if len(self.known) >= self.until else None


@dataclass(frozen=True, slots=True)
class Arriving:
    """A started run whose KV is still on its way."""

    run: Run
    receipt: Receipt
    deadline: float


class Asked(NamedTuple):
    """What a run has to do with the next forward: its row, and what is drawn from it, first the
    prompt's scores."""

    run: str
    row: Row
    draws: list[Draw]
    scores: int
    guessed: list[int]


def make_room(
    runs: dict[str, Run],
    table: BlockTable,
    block_size: int,
    preempt: Callable[[str], None],
    ahead: int = 0,
) -> list[str]:
    """Blocks for the next step of every run, oldest first; a run that cannot grow takes those of the
    youngest, by `preempt`, which must take it out of `runs`; or gives up its own if it is that itself.
    While there are blocks to spare, each grows for `ahead` tokens more.

    Returns the runs that must wait: the oldest alone, while all else is held by runs to come.
    """
    waiting = []
    for name in list(runs):
        run = runs.get(name)
        if run is None:  # preempted for an older one
            continue
        while len(run.table) * block_size < len(run.known):
            block = table.grow(name)
            if block is not None:
                run.table.append(block)
                continue
            youngest = next(reversed(runs))
            if len(runs) == 1:
                waiting.append(name)
                break
            preempt(youngest)
            if youngest == name:
                break
        else:
            soon = min(len(run.known) + ahead, run.until - 1)
            while len(run.table) * block_size < soon and table.free_blocks > len(runs):
                block = table.grow(name)
                assert block is not None
                run.table.append(block)
    return waiting
