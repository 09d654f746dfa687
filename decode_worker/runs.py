"""Runs: the sequences a decode worker generates, and which of them is preempted when the pool is full.

A run begins with blocks for its known tokens and a few more, and grows block by block. When no block is
left, the youngest run returns all of its blocks and begins again later (preemption by recompute). So the
oldest always makes progress, and every request that fits the pool alone finishes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.grammar import Matcher
from baton.kv.blocks import BlockTable
from baton.kv.grant import Grant
from baton.kv.region import Receipt
from baton.kv.row import Logits, Row
from baton.params import GenerationParams
from baton.rope import FIXED, RopeRule
from baton.wire.records import Logprob
from decode_worker.batching import Progress, Share
from decode_worker.model import Draw
from sampler.params import SamplingParams

SCORED_ROWS = 256
"""Most rows of a scored prompt in one forward: each needs logits as wide as the vocabulary."""


@dataclass(slots=True)
class Run:
    """A started run: all its token ids, of which the KV of the first `computed` is in the pool."""

    grant: Grant
    token_ids: list[int]
    computed: int
    prompt_tokens: int  # of token_ids; the others were generated
    params: GenerationParams
    matcher: Matcher | None = None
    rope: RopeRule = FIXED
    itl_s: float = 0.0  # limit of the streams while its prompt is filled (Start)
    sent: bool = False  # its first token was sent
    scores: list[Logprob] = field(default_factory=list)  # of the prompt's tokens but the first
    published: bool = False  # the prompt's blocks are in the prefix cache
    table: list[int] = field(init=False)  # block table
    sampling: SamplingParams = field(init=False)
    max_length: int = field(init=False)  # prompt and generation together, in tokens
    rope_floor: int = field(init=False)
    recompute_at: int = field(init=False)  # with so many tokens all its KV must be computed again

    def __post_init__(self) -> None:
        assert self.params.sampling is not None, "params of a run are resolved"
        self.sampling = self.params.sampling
        self.table = list(self.grant.table)
        self.max_length = self.prompt_tokens + self.params.max_new_tokens
        self.rope_floor = self.rope.floor(self.prompt_tokens, len(self.token_ids))
        self.recompute_at = self.rope.recompute_at(self.rope_floor)

    @property
    def scoring(self) -> bool:
        """Prompt logprobs are not complete yet."""
        return self.params.prompt_logprobs >= 0 and len(self.scores) < self.prompt_tokens - 1

    def draw(self, draft: Sequence[int]) -> Draw:
        """How to sample the token after these draft tokens."""
        seen = self.token_ids + list(draft) if draft else self.token_ids
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
            mask=self.matcher.mask() if self.matcher is not None else None,
            logprobs=self.params.logprobs,
        )

    def progress(self, name: str) -> Progress:
        most = SCORED_ROWS if self.scoring else None
        return Progress(name, len(self.token_ids), self.computed, most, self.itl_s)

    def draftable(self, block_size: int) -> int:
        """How many draft tokens fit its blocks and its maximum length, and need no recomputation."""
        room = min(len(self.table) * block_size, self.recompute_at - 1)
        return min(room, self.max_length - 1) - len(self.token_ids)

    def next_step(self, share: Share, draft: list[int]) -> "RunStep":
        """Its part of the next forward. Raises RequestError if its grammar allows no token."""
        start = self.computed
        tokens = self.token_ids[start : start + share.tokens] + draft
        draws: list[Draw] = []
        if self.scoring:  # each prompt token scores the next one
            ends = range(start + 1, start + share.tokens + 1)
            score = Draw(self.sampling, 0, (), logprobs=self.params.prompt_logprobs)
            draws += [
                score._replace(position=index, given=self.token_ids[index])
                for index in ends
                if index < self.prompt_tokens
            ]
        scores = len(draws)
        if share.samples:
            draws += [self.draw(draft[:i]) for i in range(len(draft) + 1)]
        logits = Logits.ALL if scores or draft else Logits.LAST if draws else Logits.NONE
        self.computed += share.tokens
        row = Row(tokens, start, self.table, logits, self.rope_floor, self.params.adapter)
        filled = 0 if share.samples and share.tokens == 1 else share.tokens
        return RunStep(share.run, row, draws, scores, draft, filled)

    def append(self, token_id: int) -> str | None:
        """Add a token. Returns the finish reason if the run ends with it."""
        self.token_ids.append(token_id)
        if token_id in self.params.stop_token_ids:
            return "stop"
        if self.matcher is not None:
            self.matcher.accept(token_id)
            if self.matcher.finished:
                return "stop"
        return "length" if len(self.token_ids) >= self.max_length else None

    def stage(self, finish: str | None) -> str:
        """The failpoint of its newest token."""
        if finish is not None:
            return "decode.last_token"
        first = len(self.token_ids) == self.prompt_tokens + 1
        return "decode.first_token" if first else "decode.token"


@dataclass(frozen=True, slots=True)
class Arriving:
    """A started run whose KV is still on its way."""

    run: Run
    receipt: Receipt
    deadline: float


class RunStep(NamedTuple):
    """A run's part of one forward. The first `scores` draws score prompt tokens; the others sample, one
    before each draft token and one after the last. `filled`: tokens of a prompt's chunk, 0 in a decode
    step."""

    run: str
    row: Row
    draws: list[Draw]
    scores: int
    draft: list[int]
    filled: int


def outgrown(runs: dict[str, Run]) -> list[str]:
    """Those whose KV must be computed again before their next step (baton/rope.py)."""
    return [name for name, run in runs.items() if len(run.token_ids) >= run.recompute_at]


def make_room(
    runs: dict[str, Run],
    table: BlockTable,
    block_size: int,
    preempt: Callable[[str], None],
    ahead: int = 0,
) -> list[str]:
    """Take blocks for the next step of every run, oldest first. A run that cannot grow preempts the
    youngest, possibly itself; `preempt` must remove it from `runs`. With blocks to spare each run grows
    for `ahead` more tokens.

    Returns the runs that must wait: at most the only run, if grants that are not started hold the rest.
    """
    waiting = []
    for name in list(runs):
        run = runs.get(name)
        if run is None:  # preempted by an older one
            continue
        while len(run.table) * block_size < len(run.token_ids):
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
            soon = min(len(run.token_ids) + ahead, run.max_length - 1)
            while len(run.table) * block_size < soon and table.free_blocks > len(runs):
                block = table.grow(name)
                assert block is not None
                run.table.append(block)
    return waiting
