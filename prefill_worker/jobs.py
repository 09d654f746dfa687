"""Jobs: the sequences that a prefill worker fills, and which tokens the next forward computes. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.kv.grant import Grant
from baton.kv.region import Receipt
from baton.pace import Pace, Prompt, share_out
from baton.wire import messages as msg
from prefill_worker.model import Chunk


@dataclass(slots=True)
class Job:
    """One sequence being filled."""

    grant: Grant
    token_ids: tuple[int, ...]
    rope_floor: int = 0
    pooling: str = ""
    adapter: str = ""  # digest
    block_hashes: tuple[bytes, ...] = ()  # of its full blocks; empty: its KV is not kept
    reused: int = 0  # first tokens whose KV was there
    done: int = 0
    admitted: bool = False
    sending: bool = False  # computed
    compute_s: float = 0.0

    @property
    def left(self) -> int:
        return len(self.token_ids) - self.done

    def chunk(self, tokens: int) -> Chunk:
        """Its next tokens, so many."""
        ids = self.token_ids[self.done : self.done + tokens]
        return Chunk(self.grant, ids, self.done, self.rope_floor, self.pooling, self.adapter)

    def filled(self, receipt: Receipt) -> msg.Filled:
        """The report on its end."""
        return msg.Filled(self.grant.run, receipt, self.compute_s, self.reused)


def next_pool(jobs: Sequence[Job], last: str | None) -> str:
    """The decode worker whose pool the next forward writes into: one forward writes into one pool. They
    take turns after the `last` one, in the order of their oldest jobs, so a long prompt for one of them
    does not delay the prompts for the others."""
    pools = list(dict.fromkeys(job.grant.worker for job in jobs))
    return pools[(pools.index(last) + 1) % len(pools)] if last in pools else pools[0]


def plan_chunks(
    jobs: Sequence[Job], budget: int, pace: Pace, last: str | None = None
) -> list[tuple[Job, int]]:
    """Jobs of the next forward and how many tokens of each: at most `budget` in all, and no more than
    this worker computes in a short time (baton/pace.py). `last`: the decode worker of the forward before
    this one."""
    if not jobs:
        return []
    pool = next_pool(jobs, last)
    here = [job for job in jobs if job.grant.worker == pool]
    given = share_out([Prompt(job.done, job.left) for job in here], pace, token_budget=budget)
    return [(job, tokens) for job, tokens in zip(here, given, strict=True) if tokens]
