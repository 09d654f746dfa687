"""PrefillWorker, a Node: Fill in, Filled out. One step is one forward over one decode pool.

A step takes as many tokens as the budget allows, so short prompts share a forward and long ones are cut
into chunks: see plan_chunks().
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton import failpoint
from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.region import Receipt, Region
from baton.wire import messages as msg
from baton.wire.membership import Membership
from baton.wire.messages import Hello, Message
from baton.wire.node import ROUTER, Effect, To


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens to compute now, for positions start, start + 1, ... of this grant's sequence."""

    grant: Grant
    token_ids: Sequence[int]
    start: int


class PrefillModel(Protocol):
    """The node's interface to engine and links, implemented in prefill_worker/filling.py."""

    def attach(self, worker: str, epoch: str, regions: Sequence[Region]) -> msg.Attached:
        """Open a link to this pool, closing an older one. TransferError if no transport works."""

    def detach(self, worker: str) -> None:
        """Close the link; unfinished writes are dropped."""

    def admit(self, grant: Grant, tokens: int) -> bool:
        """Reserve room to compute this sequence. False: no room now. TransferError: it can never fit, or
        the pool is not attached."""

    def known(self, grant: Grant) -> int:
        """Tokens at the beginning whose cached KV can be read in place, so it is not computed again."""

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        """One forward: compute the chunks' KV and write it into the granted blocks."""

    def finish(self, grant: Grant, tokens: int) -> Receipt:
        """All `tokens` are computed: make their KV visible to the owner."""

    def abandon(self, grant: Grant) -> None:
        """Stop writing under this grant."""

    def use_cores(self, cores: tuple[int, ...]) -> None:
        """Compute on these cores from the next forward on."""

    def clock(self) -> float:
        """Monotonic seconds, to time a forward."""


@dataclass(slots=True)
class Job:
    """One sequence being filled."""

    grant: Grant
    token_ids: tuple[int, ...]
    done: int = 0
    admitted: bool = False
    compute_s: float = 0.0

    @property
    def left(self) -> int:
        return len(self.token_ids) - self.done


def plan_chunks(jobs: Sequence[Job], budget: int) -> list[tuple[Job, int]]:
    """Jobs of the next forward and how many tokens of each. All are for the decode worker of the oldest
    job, because one forward writes into one pool. Half of the budget is the oldest job's, so it always
    advances. The rest goes to the jobs with the least left: short prompts do not wait for long ones."""
    if not jobs:
        return []
    oldest = jobs[0]
    taken = {oldest.grant.run: min(oldest.left, max(1, budget // 2))}
    budget -= taken[oldest.grant.run]
    here = [job for job in jobs if job.grant.worker == oldest.grant.worker]
    for job in sorted(here, key=lambda job: job.left - taken.get(job.grant.run, 0)):
        before = taken.get(job.grant.run, 0)
        more = min(job.left - before, budget)
        if more:
            taken[job.grant.run] = before + more
            budget -= more
    return [(job, taken[job.grant.run]) for job in here if job.grant.run in taken]


class PrefillWorker:
    """Handles grants and token ids; everything about tensors is behind `model`."""

    def __init__(self, hello: Hello, model: PrefillModel, *, token_budget: int) -> None:
        self._membership = Membership(hello, self._start_anew)
        self._model = model
        self._budget = token_budget
        self._jobs: dict[str, Job] = {}

    def handle(self, sender: str, message: Message, now: float) -> list[Effect]:
        effects = self._membership.handle(message, now)
        if effects is not None:
            return effects
        match message:
            case msg.Attach(worker, epoch, regions):
                self._drop_all(worker)  # earlier writes were under an older epoch
                try:
                    return [To(ROUTER, self._model.attach(worker, epoch, regions))]
                except TransferError as error:
                    return [To(ROUTER, msg.AttachFailed(worker, epoch, str(error)))]
            case msg.Detach(worker):
                self._drop_all(worker)
                self._model.detach(worker)
            case msg.Cores(cores):
                self._model.use_cores(cores)
            case msg.Fill(grant, token_ids):
                self._jobs[grant.run] = Job(grant, token_ids)
            case msg.Drop(run):
                job = self._jobs.pop(run, None)
                if job is not None:
                    self._model.abandon(job.grant)
                return [To(ROUTER, msg.Released(run))]
        return []

    def step(self, now: float) -> list[Effect]:
        effects = self._membership.step(now)
        effects += self._admit()
        plan = plan_chunks([job for job in self._jobs.values() if job.admitted], self._budget)
        if not plan:
            return effects
        chunks = [Chunk(j.grant, j.token_ids[j.done : j.done + n], j.done) for j, n in plan]
        failpoint.hit("prefill.chunk")
        began = self._model.clock()
        try:
            self._model.fill(chunks[0].grant.worker, chunks)
        except TransferError as error:
            return effects + [e for job, _ in plan for e in self._fail(job, error)]
        took = self._model.clock() - began
        total = sum(count for _, count in plan)
        for job, count in plan:
            job.done += count
            job.compute_s += took * count / total
            if job.left:
                effects.append(To(ROUTER, msg.ChunkFilled(job.grant.run, job.done)))
            else:
                effects += self._finish(job)
        return effects

    def due(self, now: float) -> float:
        return 0.0 if self._jobs else self._membership.due(now)

    # ---- jobs

    def _admit(self) -> list[Effect]:
        """First come, first served: a job without room blocks those behind it."""
        effects: list[Effect] = []
        for job in list(self._jobs.values()):
            if job.admitted:
                continue
            try:
                job.admitted = self._model.admit(job.grant, len(job.token_ids))
                job.done = self._model.known(job.grant) if job.admitted else 0
            except TransferError as error:
                effects += self._fail(job, error)
                continue
            if not job.admitted:
                break
        return effects

    def _finish(self, job: Job) -> list[Effect]:
        failpoint.hit("prefill.computed")
        try:
            receipt = self._model.finish(job.grant, len(job.token_ids))
        except TransferError as error:
            return self._fail(job, error)
        del self._jobs[job.grant.run]
        return [To(ROUTER, msg.Filled(job.grant.run, receipt, job.compute_s))]

    def _fail(self, job: Job, error: TransferError) -> list[Effect]:
        self._jobs.pop(job.grant.run, None)
        self._model.abandon(job.grant)
        return [To(ROUTER, msg.FillFailed(job.grant.run, str(error)))]

    def _drop_all(self, worker: str | None = None) -> None:
        for run, job in list(self._jobs.items()):
            if worker is None or job.grant.worker == worker:
                self._model.abandon(job.grant)
                del self._jobs[run]

    def _start_anew(self, epoch: str) -> tuple[Region, ...]:
        """The router has reset this worker, or is gone: stop all writes of the old epoch."""
        self._drop_all()
        return ()
