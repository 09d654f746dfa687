"""DecodeWorker, a Node: owns the pool's blocks, starts filled runs, samples one token a step each.

Reserve -> grant            blocks are reserved, under a lease
Start   -> arriving         until the KV in the pool matches the receipt
        -> running          every step computes the last known token and samples the next
        -> preempted        the pool is full and this run is the youngest: it returns its blocks
last token, Cancel, Reset   its blocks are released (baton/kv/blocks.py)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from baton import failpoint
from baton.errors import OutOfMemory, RequestError
from baton.grammar import Grammars, Matcher
from baton.kv.blocks import ANY_WRITER, BlockTable
from baton.kv.prefix import extended
from baton.kv.region import Arrival, Region
from baton.pace import Span, TokenBudget
from baton.rope import FIXED, RopeRule
from baton.wire import messages as msg
from baton.wire.membership import Membership, Worker
from baton.wire.messages import Message
from baton.wire.node import ROUTER, Effect, To
from baton.wire.orders import Ignored, unfit_start
from baton.wire.paces import Paces
from decode_worker.batching import Share, plan_step
from decode_worker.memory import take_less
from decode_worker.model import DecodeModel, Drawn
from decode_worker.pool_reporter import PoolReporter
from decode_worker.runs import Arriving, Run, RunStep, make_room, outgrown
from decode_worker.speculation import Speculation, Wanted, accepted_prefix
from decode_worker.token_buffer import TokenBuffer
from decode_worker.writers import Writers

LEASE_S = 60.0
# Longest wait for KV after its receipt; then it is filled again. A way on which nothing moves is found
# sooner, by the writer and by the export.
ARRIVAL_S = 20.0
UNSOUND = "numerical_error", "the model's logits for this request are not finite numbers"


@dataclass(slots=True)
class DecodeWorker(Worker):
    """Handles blocks and token ids; everything about tensors is behind `model`."""

    hello: msg.Hello
    model: DecodeModel
    token_budget: int
    speculation: Speculation = field(default_factory=Speculation)
    prefix_caching: bool = True
    grammars: Grammars | None = None
    vocabulary: int = 2**31
    paces: Paces = field(default_factory=Paces)  # what is known of this machine's speed
    rope: RopeRule = FIXED  # of the model
    table: BlockTable = field(init=False)
    block_hashes: dict[str, tuple[bytes, ...]] = field(init=False, default_factory=dict)  # by run
    runs: dict[str, Run] = field(init=False, default_factory=dict)
    arriving: dict[str, Arriving] = field(init=False, default_factory=dict)
    _membership: Membership = field(init=False)
    _reporter: PoolReporter = field(init=False)
    _writers: Writers = field(init=False)
    _buffer: TokenBuffer = field(init=False, default_factory=TokenBuffer)
    _step_began: float = field(init=False, default=0.0)  # the last step
    _more_kv: bool = field(init=False, default=False)  # KV has arrived that is not received yet
    _budget: TokenBudget = field(init=False)
    _blocked: bool = field(init=False, default=False)  # all runs wait for blocks
    _ignored: Ignored = field(init=False, default_factory=Ignored)  # orders that cannot be

    def __post_init__(self) -> None:
        hello = self.hello
        self.table = BlockTable(hello.worker, hello.epoch, hello.blocks, LEASE_S)
        self._membership = Membership(hello, self._start_anew, self.speculation.tally, self.paces)
        self._budget = TokenBudget(self.token_budget)
        self._reporter = PoolReporter(self.table)
        self._writers = Writers(self.table, self.model, hello.host)

    # ---- the Node

    def obey(self, message: Message, now: float) -> list[Effect]:
        match message:
            case msg.Reserve():
                return self._reserve(message, now)
            case msg.Renew(runs):
                for run in runs:
                    self.table.renew(run, now)
            case msg.Start():
                return self._start(message, now)
            case msg.Cancel(run, writer):
                self._release(run, writer)
                self._buffer.drop(run)
            case msg.Cores(cores):
                self.model.use_cores(cores)
                self.paces.use(len(cores))
            case msg.Released(run, writer):
                self.table.writer_released(writer, run)
            case msg.WriterJoined():
                return self._writers.joined(message)
            case msg.WriterClear(writer) | msg.Exited(writer):
                self._writers.clear(writer)
        return []

    def step(self, now: float) -> list[Effect]:
        effects = self._membership.step(now)
        took, self._step_began = now - self._step_began, now
        for run in self.table.expired(now):
            self._release(run, ANY_WRITER)
            effects.append(To(ROUTER, msg.Expired(run)))
        self._more_kv = self.model.poll()
        effects += [e for run in list(self.arriving) for e in self._check_arrival(run, now)]
        effects += self._decode(now)
        effects += self._buffer.take_due(now, now + took)  # by the end of the next step
        alone = bool(self.runs) and not self._blocked and not effects
        if self._membership.joined and (stats := self._reporter.report(now, alone=alone)):
            effects.append(To(ROUTER, stats))
        return effects

    def due(self, now: float) -> float:
        if self._more_kv or (self.runs and not self._blocked):
            return 0.0
        polling = bool(self.arriving or self.runs)  # writes to shared memory wake no loop
        waiting = min(0.001 if polling else float("inf"), self._buffer.due(now))
        if self._membership.joined:
            waiting = min(waiting, self._reporter.due(now))
        return min(waiting, self._membership.due(now))

    # ---- blocks

    def _reserve(self, order: msg.Reserve, now: float) -> list[Effect]:
        if order.tokens < 1 or self.table.holds(order.run):
            return self._ignored.note(order.run, "Reserve of none, or again", now)
        run, blocks = order.run, -(-order.tokens // self.hello.block_size)
        hashes = order.block_hashes[1:] if self.prefix_caching else ()
        try:
            grant = self.table.reserve(run, blocks, now, hashes)
        except RequestError as error:
            return [To(ROUTER, msg.RunFailed(run, error.code, str(error)))]
        if grant is None:
            return [To(ROUTER, msg.Deferred(run))]
        self.block_hashes[run] = order.block_hashes
        self.model.expect(grant)
        return [To(ROUTER, msg.Reserved(grant))]

    def _release(self, run: str, writer: str | None) -> None:
        """End a run on this worker for any reason. `writer` may still write into its blocks."""
        self.runs.pop(run, None)
        self.block_hashes.pop(run, None)
        self.arriving.pop(run, None)
        self.speculation.forget(run)
        if (grant := self.table.release(run, writer)) is not None:
            self.model.retire(grant)

    def _start_anew(self, epoch: str) -> tuple[Region, ...]:
        """The router has reset this worker, or is gone: end every run, even if writers still write."""
        self.runs.clear()
        self.block_hashes.clear()
        self.arriving.clear()
        self._reporter.forget()
        self._buffer.clear()
        for grant in self.table.renew_epoch(epoch):
            self.model.retire(grant)
        regions = self.model.renew_epoch(epoch)
        self._writers.all_shut_out()
        return regions

    # ---- runs

    def _start(self, order: msg.Start, now: float) -> list[Effect]:
        """A Start that is given twice is ignored, one that cannot be fails."""
        if order.run in self.runs or order.run in self.arriving:
            return self._ignored.note(order.run, "Start of a run that is started", now)
        if why := unfit_start(order, self.hello, self.vocabulary, self.held):
            self._release(order.run, None)
            return [To(ROUTER, msg.RunFailed(order.run, "worker_error", why))]
        grant = self.table.start(order.run)
        if grant is None:
            return [To(ROUTER, msg.FillRefused(order.run, "its lease on KV blocks ran out"))]
        try:
            matcher = self._matcher(order)
        except RequestError as error:
            self._release(order.run, None)
            return [To(ROUTER, msg.RunFailed(order.run, error.code, str(error)))]
        ids = list(order.token_ids)
        prompt, params = order.prompt_tokens, order.params
        run = Run(grant, ids, len(ids) - 1, prompt, params, matcher, self.rope, order.itl_s)
        if order.receipt is None:  # this worker computes the uncached tokens itself
            run.computed = len(grant.prefix) * self.hello.block_size
            self.runs[order.run] = run
            return []
        self.arriving[order.run] = Arriving(run, order.receipt, now + ARRIVAL_S)
        return self._check_arrival(order.run, now)

    def _matcher(self, order: msg.Start) -> Matcher | None:
        grammar = order.params.grammar
        if not grammar:
            return None
        if self.grammars is None:
            raise RequestError("this decode worker has no tokenizer, and so no grammars")
        generated, stops = order.token_ids[order.prompt_tokens :], order.params.stop_token_ids
        return self.grammars.open(grammar, generated, stop_token_ids=stops)

    def _check_arrival(self, name: str, now: float) -> list[Effect]:
        """Start the run if its KV has arrived; refuse the fill if it is damaged or late."""
        waiting = self.arriving[name]
        run = waiting.run
        arrival = self.model.arrival(run.grant, waiting.receipt, run.computed)
        if arrival is Arrival.READY:
            self.runs[name] = self.arriving.pop(name).run
            return []
        late = now >= waiting.deadline
        if arrival is Arrival.PENDING and not late:
            return []
        self._release(name, None)  # its writer stopped writing before Filled
        missing = arrival is not Arrival.BAD
        why = "did not arrive" if missing else "arrived damaged"
        return [To(ROUTER, msg.FillRefused(name, f"the KV cache {why}", missing))]

    def _decode(self, now: float) -> list[Effect]:
        """One step of continuous batching."""
        effects: list[Effect] = []
        waiting = self._make_room(effects, now)
        progress = [r.progress(name) for name, r in self.runs.items() if name not in waiting]
        progress = progress[: self._budget.runs]
        shares = plan_step(progress, token_budget=self._budget.now, pace=self.paces.now)
        self._blocked = not shares
        if not shares:
            return effects
        drafts = self._draft(shares) if self.speculation.most else {}
        steps: list[RunStep] = []
        for share in shares:
            try:
                steps.append(self.runs[share.run].next_step(share, drafts.get(share.run, [])))
            except RequestError as error:  # its grammar allows no token
                effects += self._fail(share.run, error.code, str(error), now)
        if not steps:
            return effects
        rows = [each.row for each in steps]
        began = self.model.clock()
        try:
            drawn = self.model.step(rows, [draw for each in steps for draw in each.draws])
        except OutOfMemory as error:
            alone = take_less(self.runs, steps, self._budget)
            failed = self._fail(alone, "worker_error", str(error), now) if alone else []
            return effects + failed
        self._budget.went_well()
        self.speculation.tally.forward(sum(len(row.token_ids) for row in rows))
        chunks = [Span(each.row.start, each.filled) for each in steps if each.filled]
        self.paces.after(chunks, self.model.clock() - began, requests=len(steps))
        return effects + self._accept(steps, drawn, now)

    def _make_room(self, effects: list[Effect], now: float) -> list[str]:
        def give_back(name: str, why: type[msg.Preempted | msg.Outgrown] = msg.Preempted) -> None:
            self._publish(name, self.runs[name])  # reusable until evicted
            self._release(name, None)
            effects.extend([*self._buffer.flush(now), To(ROUTER, why(name))])

        for name in outgrown(self.runs):
            give_back(name, msg.Outgrown)
        ahead = self.speculation.most
        return make_room(self.runs, self.table, self.hello.block_size, give_back, ahead)

    def _draft(self, shares: Sequence[Share]) -> dict[str, list[int]]:
        """Draft tokens by run, within the budget, the blocks and the maximum length of each."""
        wanted = [
            Wanted(share.run, run.token_ids, run.draftable(self.hello.block_size))
            for share in shares
            if share.samples and share.tokens == 1 and (run := self.runs[share.run]).matcher is None
        ]
        taken = sum(share.tokens for share in shares)
        return self.speculation.draft(wanted, self._budget.now - taken)

    def _accept(
        self, steps: Sequence[RunStep], drawn: Sequence[Drawn | None], now: float
    ) -> list[Effect]:
        """Add what was drawn to the runs. `drawn`: the results of all steps, in order."""
        effects: list[Effect] = []
        results = iter(drawn)
        for each in steps:
            mine = list(islice(results, len(each.draws)))
            if each.scores:
                effects += self._score(each.run, mine[: each.scores], now)
                mine = mine[each.scores :]
            if not mine or each.run not in self.runs:
                continue
            if each.draft:
                tokens = [None if d is None else d.token_id for d in mine]
                accepted = accepted_prefix(each.draft, tokens)
                self.runs[each.run].computed += accepted
                self.speculation.update(each.run, drafted=len(each.draft), accepted=accepted)
                mine = mine[: accepted + 1]
            effects += self._append(each.run, mine, now)
        return effects

    def _score(self, name: str, drawn: Sequence[Drawn | None], now: float) -> list[Effect]:
        run = self.runs[name]
        scores = [each.logprob for each in drawn if each is not None and each.logprob is not None]
        if len(scores) < len(drawn):
            return self._fail(name, *UNSOUND, now)
        run.scores += scores
        return [] if run.scoring else [To(ROUTER, msg.PromptLogprobs(name, tuple(run.scores)))]

    def _append(self, name: str, drawn: Sequence[Drawn | None], now: float) -> list[Effect]:
        """Add a run's tokens of this step, up to its end."""
        run = self.runs[name]
        for each in drawn:
            if each is None:
                return self._fail(name, *UNSOUND, now)
            if not run.published:
                self._publish(name, run)
            finish = run.append(each.token_id)
            failpoint.hit(run.stage(finish))
            self._buffer.put(name, run, each, finish, now, runs=len(self.runs))
            if finish is not None:
                self._publish(name, run)
                self._release(name, None)
                break
        return []

    def _fail(self, name: str, code: str, why: str, now: float) -> list[Effect]:
        """End one run with an error, after its buffered tokens; the others continue."""
        self._release(name, None)
        return [*self._buffer.flush(now), To(ROUTER, msg.RunFailed(name, code, why))]

    def _publish(self, name: str, run: Run) -> None:
        """Offer its full blocks to other runs: the prompt's once a token was sampled from finite logits,
        the answer's at its end."""
        if self.prefix_caching and self.block_hashes[name]:
            run.published = True
            hashes, size = self.block_hashes[name], self.hello.block_size
            lengths = self.rope.lengths(run.rope_floor, 0, run.computed)
            hashes = extended(hashes, run.token_ids[: run.computed], size, lengths)
            self.table.publish(name, hashes[1 : 1 + run.computed // size])
