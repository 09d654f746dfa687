"""Requests: every request from Submit to its one Finished or Failed. Part of the router: it writes the
ledger and returns what to send. The scheduler decides placement.
"""

from collections.abc import Callable

from baton.clock import Clock
from baton.errors import RequestError
from baton.lifecycle import LIVE, PLACED, Event, State
from baton.text import Tokenizer
from baton.wire import messages as msg
from baton.wire.node import Effect, To
from router import failures
from router.admission import Served, admit
from router.ledger import Entry, Ledger
from router.scheduling import Scheduler
from router.timings import timings


class Requests:
    """Methods return the effects to carry out."""

    def __init__(
        self,
        ledger: Ledger,
        scheduler: Scheduler,
        served: Served,
        tokenizer: Tokenizer,
        clock: Clock,
    ) -> None:
        self._ledger = ledger
        self._scheduler = scheduler
        self.served = served
        self._tokenizer = tokenizer
        self._clock = clock  # measures tokenizing only; elsewhere time is an argument
        self._dropping: dict[str, tuple[str, str]] = {}  # run -> prefill, decode; Released expected

    # ---- from clients

    def submit(self, client: str, submit: msg.Submit, now: float) -> list[Effect]:
        """Add a new request, or refuse it with a reason."""
        if self._ledger.get(submit.request) is not None:
            why = f"request id {submit.request!r} is in use"
            return [To(client, msg.Failed(submit.request, "invalid_request", why))]
        if submit.pooling and (why := self._scheduler.cannot_embed):
            return [To(client, msg.Failed(submit.request, "unsupported", why))]
        started = self._clock()
        try:
            entry = admit(submit, client, self.served, self._tokenizer)
        except RequestError as error:
            return [To(client, msg.Failed(submit.request, error.code, str(error)))]
        self._ledger.add(entry, now)
        took = self._clock() - started
        return [To(client, msg.Accepted(submit.request, len(entry.prompt_ids), took))]

    def abort(self, client: str, request: str, now: float) -> list[Effect]:
        """Ignored unless the request is this client's."""
        entry = self._ledger.get(request)
        if entry is None or entry.client != client:
            return []
        return self._end(entry, "abort", now)

    def client_gone(self, client: str, now: float) -> list[Effect]:
        """The client has disconnected: cancel its requests."""
        effects: list[Effect] = []
        for entry in self._ledger.of_client(client):
            effects += self._withdraw(entry)
            self._ledger.apply(entry, Event.FINISH, now, note="abort")
        return effects

    # ---- from workers

    def report(self, sender: str, message: msg.Message, now: float) -> list[Effect]:
        """A worker's report on a run."""
        follow = self._ledger.follow
        match message:
            case msg.Reserved(grant):
                entry = follow(grant.run, State.RESERVING, by=sender)
                if entry is None:
                    return [To(sender, msg.Cancel(grant.run))]
                self._scheduler.granted(entry, grant, now)
            case msg.Deferred(run):
                if entry := follow(run, State.RESERVING, by=sender):
                    self._scheduler.deferred(entry, now)
            case msg.Preempted(run) | msg.Outgrown(run):
                if entry := follow(run, State.DECODING, by=sender):
                    is_full = isinstance(message, msg.Preempted)
                    event = Event.PREEMPTED if is_full else Event.OUTGROWN
                    self._ledger.apply(entry, event, now, note=event.value)
            case msg.Expired(run):
                if entry := follow(run, *PLACED, by=sender):
                    return self._refill(entry, "its lease on KV blocks ran out", now)
            case msg.ChunkFilled(run, tokens):
                if entry := follow(run, State.FILLING, by=sender):
                    self._ledger.filled_to(entry, tokens, now)
            case msg.Filled():
                return self._filled(sender, message, now)
            case msg.Embedded(run, vector):
                if entry := follow(run, State.FILLING, by=sender):
                    return self._embedded(entry, vector, now)
            case msg.FillFailed(run, why) | msg.FillRefused(run, why):
                entry = follow(run, State.FILLING, State.DECODING, by=sender)
                if entry is not None and isinstance(message, msg.FillRefused) and message.missing:
                    return self._detour(entry, why, now)
                return self._refill(entry, why, now) if entry else self._settled(run, sender)
            case msg.Released(run):
                return self._settled(run, sender)
            case msg.PromptLogprobs(run, logprobs):
                entry = follow(run, State.DECODING, by=sender)
                if entry is not None and not entry.scored:
                    entry.scored = True
                    return [To(entry.client, msg.PromptScored(entry.id, logprobs))]
            case msg.Decoded(runs):
                return self._decoded(sender, runs, now)
            case msg.RunReturned(run, why, suspect):
                if entry := follow(run, State.DECODING, by=sender):
                    return self._returned(entry, why, now, suspect=suspect)
            case msg.RunFailed(run, code, why):
                entry = follow(run, *PLACED, by=sender)
                return self._fail(entry, code, why, now) if entry else []
        return []

    def worker_gone(
        self, worker: str, removed: list[Effect], now: float, *, expected: bool = False
    ) -> list[Effect]:
        """Queue its requests again; each keeps its emitted tokens. `removed`: what to send to the other
        workers about this one. `expected`: it left of its own accord, which is no fault of a request."""
        effects = removed
        self._dropping = {r: pair for r, pair in self._dropping.items() if worker not in pair}
        for entry in self._ledger.on_worker(worker):
            effects += self._withdraw(entry, gone=worker)
            entry.tries.deaths += not expected
            if entry.tries.deadly:
                effects += self._fail(entry, *failures.worker_lost(entry), now, placed=False)
            else:
                self._ledger.apply(entry, Event.LOST, now, note="worker lost")
        for entry in self._ledger.queued_again():  # preempted ones, too, may have lost their worker
            self._ledger.waits(entry, now)
        return effects

    def adapter_lost(self, digest: str, why: str, now: float) -> list[Effect]:
        """Fail what runs with an adapter that no new worker can load."""
        mine = [e for e in self._ledger.in_state(*LIVE) if e.params.adapter == digest]
        return [x for e in mine for x in self._fail(e, "model_not_found", why, now)]

    # ---- by time

    def fail_overdue(self, now: float, missing: Callable[[], str]) -> list[Effect]:
        """Fail the requests whose time is over. `missing`: what the cluster lacks, empty if nothing."""
        effects: list[Effect] = []
        while (name := self._ledger.deadlines.late_to_end(now)) is not None:
            entry = self._ledger.entry(name)
            effects += self._fail(entry, *failures.deadline_exceeded(entry), now)
        lacking = ""
        while (name := self._ledger.deadlines.late_to_start(now)) is not None:
            running, waiting = self._ledger.count(*PLACED), self._ledger.count(State.QUEUED)
            busy = f"all are busy ({running} running, {waiting} waiting)"
            entry, lacking = self._ledger.entry(name), lacking or missing() or busy
            effects += self._fail(entry, *failures.queue_timeout(entry, lacking), now)
        return effects

    def refuse_unplaceable(self, now: float) -> list[Effect]:
        """Fail requests that no pool here could ever hold, and embeddings that came before the workers,
        if these compute none."""
        effects: list[Effect] = []
        while (entry := self._ledger.aside()) and (why := self._scheduler.cannot_embed):
            effects += self._fail(entry, "unsupported", why, now)
        while rejection := self._scheduler.never_fits(now):
            effects += self._fail(rejection[0], "context_length_exceeded", rejection[1], now)
        return effects

    # ---- fills and tokens

    def _filled(self, sender: str, message: msg.Filled, now: float) -> list[Effect]:
        entry = self._ledger.follow(message.run, State.FILLING, by=sender)
        if entry is None:  # cancelled during the fill, or filled by a worker declared dead
            return self._settled(message.run, sender)
        self._ledger.filled(entry)
        entry.receipt = message.receipt
        self._scheduler.roles.handed_over(entry, message)
        entry.handover_s += message.receipt.seconds
        entry.moved_bytes += message.receipt.moved_bytes
        entry.prefill_reused = message.reused
        return [self._scheduler.start(entry, now)]

    def _embedded(self, entry: Entry, vector: bytes, now: float) -> list[Effect]:
        """Decode gets its blocks back: nobody writes into them any more."""
        assert entry.decode is not None
        self._ledger.filled(entry)
        freed = To(entry.decode, msg.Cancel(entry.run))
        return [freed, *self._end(entry, "stop", now, running=False, embedding=vector)]

    def _decoded(self, sender: str, runs: tuple[msg.RunTokens, ...], now: float) -> list[Effect]:
        emitted: dict[str, list[msg.Emitted]] = {}
        others: list[Effect] = []
        for tokens in runs:
            entry = self._ledger.follow(tokens.run, State.DECODING, by=sender)
            if entry is None:
                continue
            if tokens.position != entry.length or not tokens.token_ids:
                others += self._gap(entry, now)
                continue
            emission, end = self._emit(entry, tokens, now)
            emitted.setdefault(entry.client, []).append(emission)
            others += end
        messages = {c: e[0] if len(e) == 1 else msg.Emissions(tuple(e)) for c, e in emitted.items()}
        return [*(To(client, message) for client, message in messages.items()), *others]

    def _emit(
        self, entry: Entry, new: msg.RunTokens, now: float
    ) -> tuple[msg.Emitted, list[Effect]]:
        """The new tokens for the client, and the effects of its end if they are the last."""
        params, stream, ids, started = entry.params, entry.text, new.token_ids, self._clock()
        silent = new.finish == "stop" and not params.include_stop
        silent = silent and ids[-1] in params.stop_token_ids
        found = stream.take(ids[:-1] if silent else ids)
        if found.tokens < len(ids) - silent:  # up to where a stop string ends
            ids = ids[: found.tokens]
        reason = "stop" if stream.stopped else new.finish
        text = found.text if reason is None else found.text + stream.finish()
        entry.detokenize_s += self._clock() - started
        count, ages = len(ids), new.ages[: len(ids)]
        times = [max(entry.submitted, now - age) for age in ages] or [now] * count
        self._ledger.tokens(entry, ids, times)
        emission = msg.Emitted(entry.id, ids, text, new.logprobs[:count], ages)
        if reason is None:
            return emission, []
        return emission, self._end(entry, reason, now, running=new.finish is None)

    def _withdraw(self, entry: Entry, gone: str | None = None) -> list[Effect]:
        """Cancel the entry's run on its workers, except on `gone`."""
        effects: list[Effect] = []
        filling = entry.state is State.FILLING
        if filling and entry.prefill is not None and entry.prefill != gone:
            effects.append(To(entry.prefill, msg.Drop(entry.run)))
            if entry.decode is not None and entry.decode != gone:
                self._dropping[entry.run] = (entry.prefill, entry.decode)
        if entry.decode is not None and entry.decode != gone:
            effects.append(
                To(entry.decode, msg.Cancel(entry.run, entry.prefill if filling else None))
            )
        return effects

    def _settled(self, run: str, writer: str) -> list[Effect]:
        """The writer has stopped writing for a cancelled run: its blocks may leave quarantine."""
        if self._dropping.get(run, ("", ""))[0] != writer:
            return []
        _, decode = self._dropping.pop(run)
        return [To(decode, msg.Released(run, writer))]

    # ---- ends

    def _end(
        self, entry: Entry, reason: str, now: float, *, running: bool = True, embedding: bytes = b""
    ) -> list[Effect]:
        """Finish a request. `running`: the decode worker still holds the run."""
        effects = self._withdraw(entry) if running else []
        client, kv_bytes = entry.client, self._scheduler.kv_bytes_per_token(entry)
        self._ledger.apply(entry, Event.FINISH, now, note=reason)
        times, stop = timings(entry, now, kv_bytes), entry.text.stop
        return [*effects, To(client, msg.Finished(entry.id, reason, times, stop, embedding))]

    def _fail(
        self, entry: Entry, code: str, why: str, now: float, *, placed: bool = True
    ) -> list[Effect]:
        """`placed`: its run must still be cancelled on its workers."""
        effects = self._withdraw(entry) if placed else []
        self._ledger.apply(entry, Event.FINISH, now, note=code)
        return [*effects, To(entry.client, msg.Failed(entry.id, code, why))]

    def _refill(self, entry: Entry, why: str, now: float) -> list[Effect]:
        """The run's KV is unusable and its workers have released it: queue it again. Decode fills the
        prompt itself after two such tries, so damaged hand-overs fail no request."""
        entry.tries.refills += 1
        if entry.tries.unfillable:
            return self._fail(entry, *failures.fill_failed(entry, why), now)
        return self._again(entry, why, now)

    def way_lost(
        self, prefill: str, decode: str, runs: tuple[str, ...], why: str, now: float
    ) -> list[Effect]:
        """What was on this way is filled again: its fills, and those of `runs` (sent, and perhaps not
        arrived) that gave no token yet."""
        here = [e for e in self._ledger.in_state(State.FILLING) if e.prefill == prefill]
        sent = [e for run in dict.fromkeys(runs) if (e := self._ledger.running(run)) is not None]
        here += [e for e in sent if e.receipt and e.prefill == prefill and e.length == e.began]
        for entry in self._ledger.reserved():
            if entry.decode == decode:  # its blocks were granted for the way as it was
                entry.writers = frozenset(each for each in entry.writers if each[0] != prefill)
        on_it = [entry for entry in here if entry.decode == decode]
        effects = [effect for entry in on_it for effect in self._detour(entry, why, now)]
        for entry in self._ledger.queued_again():  # preempted ones, too, may have lost their way
            self._ledger.waits(entry, now)
        return effects

    def _detour(self, entry: Entry, why: str, now: float) -> list[Effect]:
        """A fault of the way is no try of the request."""
        entry.tries.detours += 1
        return self._again(entry, why, now)

    def _returned(self, entry: Entry, why: str, now: float, *, suspect: bool) -> list[Effect]:
        """An engine worker gave the run up: like a worker's death, if the run may be at fault."""
        entry.tries.deaths += suspect
        if entry.tries.deadly:
            return self._fail(entry, *failures.engine_failed(entry, why), now, placed=False)
        self._ledger.apply(entry, Event.LOST, now, note=why)
        return []

    def _gap(self, entry: Entry, now: float) -> list[Effect]:
        """Tokens of this run did not arrive: continue from those that did."""
        why = "tokens were lost between the decode worker and the router"
        entry.tries.gaps += 1
        if entry.tries.garbled:
            return self._fail(entry, *failures.tokens_lost(entry, why), now)
        return self._again(entry, why, now)

    def _again(self, entry: Entry, why: str, now: float) -> list[Effect]:
        effects = self._withdraw(entry)
        self._ledger.apply(entry, Event.RETRY, now, note=why)
        return effects
