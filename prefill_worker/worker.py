"""PrefillWorker, a Node: Fill in, Filled out. One step is one forward over one decode pool.

Short prompts share a forward, long ones are cut into chunks. So a forward is short, and what arrives
meanwhile does not wait long: see plan_chunks() in jobs.py.
"""

from dataclasses import replace
from math import inf

from baton import failpoint
from baton.bounds import INT_MAX
from baton.errors import BatonError, OutOfMemory, TransferError
from baton.kv.region import Region
from baton.pace import Span, TokenBudget
from baton.wire import messages as msg
from baton.wire.membership import Membership, Worker
from baton.wire.messages import Hello, Message
from baton.wire.node import ROUTER, Effect, To
from baton.wire.orders import Ignored, unfit_fill
from baton.wire.paces import Paces
from prefill_worker.jobs import Job, plan_chunks
from prefill_worker.model import News, PrefillModel, Sent, Stopped

POLL_S = 0.001
"""Between two looks at what ends elsewhere: links are opened and KV is sent by threads."""


class PrefillWorker(Worker):
    """Handles grants and token ids; everything about tensors is behind `model`."""

    def __init__(
        self,
        hello: Hello,
        model: PrefillModel,
        *,
        token_budget: int,
        vocabulary: int = INT_MAX,
        paces: Paces | None = None,
    ) -> None:
        """`token_budget`: most tokens in one forward. `paces`: what is known of this machine's speed."""
        self._paces = paces or Paces()
        self._membership = Membership(hello, self._start_anew, paces=self._paces)
        self._hello = hello
        self._vocabulary = vocabulary
        self._pools: dict[str, tuple[str, int]] = {}  # attached: its epoch and blocks
        self._ignored = Ignored()  # orders that cannot be
        self._model = model
        self._budget = TokenBudget(token_budget)
        self._last_pool: str | None = None  # of the last forward
        self._idle = False  # the last step computed nothing
        self._jobs: dict[str, Job] = {}
        self._stopping: dict[str, tuple[str, Message]] = {}  # by run: its pool, what to say then

    def obey(self, message: Message, now: float) -> list[Effect]:
        match message:
            case msg.Attach(worker, epoch, regions):
                self._drop_all(worker)  # earlier writes were under an older epoch
                self._pools[worker] = epoch, max((r.blocks for r in regions), default=INT_MAX)
                try:
                    attached = self._model.attach(worker, epoch, regions)
                    return [To(ROUTER, attached)] if attached is not None else []
                except TransferError as error:
                    return [To(ROUTER, msg.AttachFailed(worker, epoch, str(error)))]
            case msg.Detach(worker):
                self._drop_all(worker)
                self._pools.pop(worker, None)
                self._model.detach(worker)
            case msg.Cores(cores):
                self._model.use_cores(cores)
                self._paces.use(len(cores))
            case msg.Fill():
                return self._accept(message, now)
            case msg.Drop(run):
                if job := self._jobs.pop(run, None):
                    return self._stop(job, msg.Released(run))
                return [] if run in self._stopping else [To(ROUTER, msg.Released(run))]
        return []

    def step(self, now: float) -> list[Effect]:
        effects = self._membership.step(now)
        for news in self._model.poll():
            effects += self._hear(news) if self._membership.joined else []
        effects += self._admit()
        plan = plan_chunks(self._ready(), self._budget.now, self._paces.now, self._last_pool)
        self._idle = not plan
        if not plan:
            return effects
        chunks = [job.chunk(tokens) for job, tokens in plan]
        self._last_pool = chunks[0].grant.worker
        failpoint.hit("prefill.chunk")
        began = self._model.clock()
        try:
            self._model.fill(self._last_pool, chunks)
        except TransferError as error:
            return effects + [e for job, _ in plan for e in self._fail(job, error)]
        except OutOfMemory as error:  # the next forward has fewer tokens
            if not self._budget.ran_out(sum(count for _, count in plan)):
                effects += [e for job, _ in plan for e in self._fail(job, error)]
            return effects
        self._budget.went_well()
        took = self._model.clock() - began
        spans = [Span(job.done, count) for job, count in plan]
        self._paces.after(spans, took, requests=len(plan))
        total = sum(count for _, count in plan)
        self._membership.tally.forward(total)
        for job, count in plan:
            job.done += count
            job.compute_s += took * count / total
            if job.left:
                effects.append(To(ROUTER, msg.ChunkFilled(job.grant.run, job.done)))
            else:
                effects += self._finish(job)
        return effects

    def due(self, now: float) -> float:
        if self._jobs and not self._idle:
            return 0.0
        soon = POLL_S if self._jobs or self._model.waits else inf
        return min(soon, self._membership.due(now))

    # ---- jobs

    def _ready(self) -> list[Job]:
        """Jobs with something to compute whose pool takes it."""
        jobs = [job for job in self._jobs.values() if job.admitted and not job.sending]
        takes = {name: self._model.takes(name) for name in {job.grant.worker for job in jobs}}
        return [job for job in jobs if takes[job.grant.worker]]

    def _hear(self, news: News) -> list[Effect]:
        """What a link or a fill that did not end at once has come to."""
        if isinstance(news, Sent):
            job = self._jobs.pop(news.run, None)
            return [To(ROUTER, job.filled(news.receipt))] if job else []
        if isinstance(news, Stopped):
            _, said = self._stopping.pop(news.run, ("", None))
            return [To(ROUTER, said)] if said else []
        if not isinstance(news, msg.WayLost):
            return [To(ROUTER, news)]
        here = [run for run, job in self._jobs.items() if job.grant.worker == news.worker]
        stopped = [said for pool, said in self._stopping.values() if pool == news.worker]
        self._drop_all(news.worker)
        news = replace(news, runs=tuple(dict.fromkeys((*news.runs, *here))))
        # in this order: the writer is shut out before its stopped fills free their blocks
        return [To(ROUTER, each) for each in (news, *stopped)]

    def _accept(self, order: msg.Fill, now: float) -> list[Effect]:
        """A Fill that is given twice is ignored, one that cannot be fails: neither writes a block."""
        grant, run = order.grant, order.grant.run
        pool = self._pools.get(grant.worker, (grant.epoch, INT_MAX))
        if run in self._jobs:
            return self._ignored.note(run, "Fill of a run that is being filled", now)
        if why := unfit_fill(order, self._hello, self._vocabulary, self.held, pool=pool):
            return [To(ROUTER, msg.FillFailed(run, why))]
        given = order.token_ids, order.rope_floor, order.pooling, order.adapter, order.block_hashes
        self._jobs[run] = Job(grant, *given)
        return []

    def _admit(self) -> list[Effect]:
        """First come, first served: a job without room blocks those behind it."""
        effects: list[Effect] = []
        for job in list(self._jobs.values()):
            if job.admitted:
                continue
            try:
                tokens, hashes = len(job.token_ids), job.block_hashes
                job.admitted = self._model.admit(job.grant, tokens, hashes)
                job.done = job.reused = self._model.known(job.grant) if job.admitted else 0
            except TransferError as error:
                effects += self._fail(job, error)
                continue
            if not job.admitted:
                break
        return effects

    def _finish(self, job: Job) -> list[Effect]:
        failpoint.hit("prefill.computed")
        try:
            if job.pooling:
                vector = self._model.embedded(job.grant)
                del self._jobs[job.grant.run]
                return [To(ROUTER, msg.Embedded(job.grant.run, vector, job.compute_s))]
            receipt = self._model.finish(job.grant, len(job.token_ids))
        except TransferError as error:
            return self._fail(job, error)
        job.sending = receipt is None
        if receipt is None:
            return []
        del self._jobs[job.grant.run]
        return [To(ROUTER, job.filled(receipt))]

    def _fail(self, job: Job, error: BatonError) -> list[Effect]:
        self._jobs.pop(job.grant.run, None)
        return self._stop(job, msg.FillFailed(job.grant.run, str(error)))

    def _stop(self, job: Job, said: Message) -> list[Effect]:
        """Give the fill up, and say so once nothing is written for it any more."""
        if not self._model.abandon(job.grant):
            return [To(ROUTER, said)]
        self._stopping[job.grant.run] = job.grant.worker, said
        return []

    def _drop_all(self, worker: str | None = None) -> None:
        for run, job in list(self._jobs.items()):
            if worker is None or job.grant.worker == worker:
                self._model.abandon(job.grant)
                del self._jobs[run]
        self._stopping = {r: s for r, s in self._stopping.items() if worker not in (None, s[0])}

    def _start_anew(self, epoch: str) -> tuple[Region, ...]:
        """The router has reset this worker, or is gone: stop all writes of the old epoch."""
        self._drop_all()
        return ()
