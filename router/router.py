"""Router, a Node: every request's way from Submit to its end. Message in, messages out.

What may happen to a request is baton/lifecycle.py; who is filled next is batching.py; who gets it
is placement.py; who is alive is health.py and members.py. This file joins them.
"""

from dataclasses import dataclass

from baton.clock import Clock
from baton.errors import RequestError
from baton.lifecycle import PLACED, Event, State
from baton.text import TextStream, Tokenizer
from baton.wire import messages as msg
from baton.wire.messages import Message
from baton.wire.node import Effect, To
from router.cores import CoreKeeper
from router.health import BEAT_S
from router.intake import Served, read_submit
from router.ledger import Entry, Ledger, timings
from router.members import Members
from router.scheduling import Rules, Scheduler
from router.watchers import Watchers, cluster_info

MAX_TRIES = 3


@dataclass(frozen=True, slots=True)
class Identity:
    """This router process."""

    epoch: str
    host: str
    pid: int
    cores: tuple[int, ...] = ()  # of the host, to be handed out to its workers


class Router:
    """The one process that knows every request."""

    def __init__(
        self, identity: Identity, served: Served, tokenizer: Tokenizer, rules: Rules, clock: Clock
    ) -> None:
        self.ledger = Ledger()
        self.members = Members(model=served.fingerprint, host=identity.host)
        self._scheduler = Scheduler(self.ledger, self.members, rules)
        self._identity = identity
        self._served = served
        self._tokenizer = tokenizer
        self._rules = rules
        self._cores = CoreKeeper(identity.host, identity.cores)
        self._clock = clock  # for the cost of tokenizing alone; everything else is told the time
        self._watchers = Watchers()
        self._dropping: dict[str, tuple[str, str]] = {}  # run -> who writes, who waits for Released
        self._next_beat = 0.0
        self._steps = 0

    # ---- the Node

    def handle(self, sender: str, message: Message, now: float) -> list[Effect]:
        match message:
            case msg.Submit():
                return self._submit(sender, message, now)
            case msg.Abort(request):
                entry = self.ledger.get(request)
                if entry is None or entry.request.client != sender:
                    return []
                return self._end(entry, "abort", now)
            case msg.Inquire():
                self._watchers.add(sender)
                return []  # step() tells whoever has not been told
            case msg.Exited(peer):
                return self._peer_gone(peer, now, proven_dead=True)
            case msg.Unreachable(peer):
                return self._peer_gone(peer, now, proven_dead=False)
            case msg.Hello():
                return self._hello(sender, message, now)
        self.members.heard(sender, now)
        if self.members.get(sender) is None:
            return [
                To(sender, msg.Reset("the router does not know you: you were given up, say Hello"))
            ]
        return self._report(sender, message, now)

    def step(self, now: float) -> list[Effect]:
        self._steps += 1
        effects: list[Effect] = []
        for worker in self.members.dead(now):
            effects += self._worker_gone(worker, now, proven_dead=False)
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
            beat = msg.Beat(self._identity.epoch, self._steps)
            effects += [To(member.worker, beat) for member in self.members]
            effects += self._scheduler.renew_leases()
        effects += self._refuse_unplaceable(now)
        orders = self._scheduler.place(now)
        effects += self._cores.hand_out(self.members, self.ledger) + orders  # cores before work
        return effects + self._watchers.tell(lambda: self.info(now))

    def due(self, now: float) -> float:
        return max(0.0, min(self._next_beat - now, self._scheduler.due(now)))

    # ---- workers

    def _hello(self, sender: str, hello: msg.Hello, now: float) -> list[Effect]:
        misfit = self.members.misfit(sender, hello)
        if misfit is not None:
            return [To(sender, msg.Refused(misfit))]
        identity = self._identity
        welcome = To(sender, msg.Welcome(identity.epoch, identity.host, identity.pid))
        known = self.members.get(sender)
        if known is not None and known.hello.epoch == hello.epoch:
            return [welcome]  # it knocked again before it had our answer
        # One that we know under another epoch has started anew before it was missed.
        effects = self._worker_gone(sender, now, proven_dead=True) if known else []
        return [*effects, welcome, *self.members.join(hello, now)]

    def _report(self, sender: str, message: Message, now: float) -> list[Effect]:
        """What a member says of its work."""
        member = self.members.get(sender)
        assert member is not None
        match message:
            case msg.Attached():
                return self.members.attached(member, message)
            case msg.AttachFailed(worker, epoch, why):
                decode = self.members.get(worker)
                if decode is not None and decode.hello.epoch == epoch:
                    member.failed[worker] = why
            case msg.Reserved(grant):
                entry = self.ledger.follow(grant.run, State.RESERVING, by=sender)
                if entry is None:
                    return [To(sender, msg.Cancel(grant.run))]
                self._scheduler.granted(entry, grant, now)
            case msg.Deferred(run):
                if entry := self.ledger.follow(run, State.RESERVING, by=sender):
                    self._scheduler.deferred(entry, now)
            case msg.Preempted(run):
                if entry := self.ledger.follow(run, State.DECODING, by=sender):
                    entry.preemptions += 1
                    self.ledger.apply(entry, Event.PREEMPTED, now)
            case msg.Expired(run):
                if entry := self.ledger.follow(run, *PLACED, by=sender):
                    return self._again(entry, "its lease on KV blocks ran out", now)
            case msg.Filled():
                return self._filled(sender, message, now)
            case msg.FillFailed(run, why) | msg.FillRefused(run, why):
                entry = self.ledger.follow(run, State.FILLING, State.DECODING, by=sender)
                return self._again(entry, why, now) if entry else self._settled(run, sender)
            case msg.Released(run):
                return self._settled(run, sender)
            case msg.Decoded(tokens):
                return self._decoded(sender, tokens, now)
            case msg.Broke(run, code, why):
                entry = self.ledger.follow(run, *PLACED, by=sender)
                return self._fail(entry, code, why, now) if entry else []
        return []

    def _peer_gone(self, peer: str, now: float, *, proven_dead: bool) -> list[Effect]:
        """The process behind this peer is dead, or cannot be reached: a worker that lives will be
        told to start anew, a client has left."""
        if self.members.get(peer) is not None:
            return self._worker_gone(peer, now, proven_dead=proven_dead)
        effects: list[Effect] = self.members.remove(peer, proven_dead=proven_dead)
        self._watchers.remove(peer)
        for entry in self.ledger.of_client(peer):
            effects += self._withdraw(entry)
            self.ledger.apply(entry, Event.FINISH, now)
        return effects

    def _worker_gone(self, worker: str, now: float, *, proven_dead: bool) -> list[Effect]:
        """Move its requests. Each keeps what it has emitted and goes on elsewhere."""
        lost = self.ledger.on_worker(worker)[::-1]  # each goes to the head of the line
        effects = self.members.remove(worker, proven_dead=proven_dead)
        self._dropping = {r: pair for r, pair in self._dropping.items() if worker not in pair}
        for entry in lost:
            effects += self._withdraw(entry, gone=worker)
            entry.losses += 1
            if entry.losses >= MAX_TRIES:
                effects += self._fail(entry, "worker_lost", _lost_text(entry), now, placed=False)
            else:
                self.ledger.apply(entry, Event.LOST, now)
        return effects

    def _withdraw(self, entry: Entry, gone: str | None = None) -> list[Effect]:
        """Tell the workers that still live that the entry's run is over."""
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
        """The writer is done with a run that is over: its blocks may leave quarantine."""
        if self._dropping.get(run, ("", ""))[0] != writer:
            return []
        _, decode = self._dropping.pop(run)
        return [To(decode, msg.Released(run, writer))]

    # ---- requests

    def _submit(self, client: str, submit: msg.Submit, now: float) -> list[Effect]:
        if self.ledger.get(submit.request) is not None:
            why = f"request id {submit.request!r} is in use"
            return [To(client, msg.Failed(submit.request, "invalid_request", why))]
        started = self._clock()
        try:
            request = read_submit(submit, client, self._served, self._tokenizer)
        except RequestError as error:
            return [To(client, msg.Failed(submit.request, error.code, str(error)))]
        text = TextStream(self._tokenizer, request.prompt_ids, request.stop)
        self.ledger.add(request, text, now)
        took = self._clock() - started
        return [To(client, msg.Accepted(submit.request, len(request.prompt_ids), took))]

    def _filled(self, sender: str, message: msg.Filled, now: float) -> list[Effect]:
        entry = self.ledger.follow(message.run, State.FILLING, by=sender)
        if entry is None:  # cancelled while it was filled, or filled by one given up for dead
            return self._settled(message.run, sender)
        entry.receipt = message.receipt
        entry.handover_s += message.receipt.seconds
        entry.moved_bytes += message.receipt.moved_bytes
        return self._scheduler.start(entry, now)

    def _decoded(self, sender: str, tokens: tuple[msg.Token, ...], now: float) -> list[Effect]:
        effects: list[Effect] = []
        for token in tokens:
            entry = self.ledger.follow(token.run, State.DECODING, by=sender)
            if entry is None:
                continue
            if token.position != len(entry.known_ids):
                effects += self._again(entry, "tokens were lost on their way to the router", now)
            else:
                effects += self._token(entry, token, now)
        return effects

    def _token(self, entry: Entry, token: msg.Token, now: float) -> list[Effect]:
        entry.emitted.append(token.token_id)
        entry.first_token = now if entry.first_token is None else entry.first_token
        self.ledger.apply(entry, Event.TOKEN, now)
        started = self._clock()
        text = entry.text.push([token.token_id])
        reason = "stop" if entry.text.stopped else token.finish
        if reason is not None:
            text += entry.text.finish()
        entry.detokenize_s += self._clock() - started
        request = entry.request
        effects: list[Effect] = [
            To(request.client, msg.Emitted(request.id, (token.token_id,), text))
        ]
        return effects + (
            self._end(entry, reason, now, told=token.finish is None) if reason else []
        )

    def _end(self, entry: Entry, reason: str, now: float, *, told: bool = True) -> list[Effect]:
        """The good end. `told`: the decode worker does not know yet that it is over."""
        effects = self._withdraw(entry) if told else []
        client, request = entry.request.client, entry.request.id
        kv_bytes = self._scheduler.kv_bytes_per_token(entry)
        self.ledger.apply(entry, Event.FINISH, now)
        return [*effects, To(client, msg.Finished(request, reason, timings(entry, now, kv_bytes)))]

    def _fail(
        self, entry: Entry, code: str, why: str, now: float, *, placed: bool = True
    ) -> list[Effect]:
        """The other end. The client is told what happened and how much it got."""
        effects = self._withdraw(entry) if placed else []
        self.ledger.apply(entry, Event.FINISH, now)
        return [*effects, To(entry.request.client, msg.Failed(entry.request.id, code, why))]

    def _again(self, entry: Entry, why: str, now: float) -> list[Effect]:
        """The run's KV is not usable and its workers have let go of it: fill it again."""
        entry.refills += 1
        if entry.refills >= MAX_TRIES:
            text = f"the KV cache could not be filled in {MAX_TRIES} tries; the last: {why}"
            return self._fail(entry, "fill_failed", text, now)
        effects = self._withdraw(entry)
        self.ledger.apply(entry, Event.RETRY, now)
        return effects

    def _refuse_unplaceable(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        while misfit := self._scheduler.never_fits():
            effects += self._fail(misfit[0], "context_length_exceeded", misfit[1], now)
        return effects

    def info(self, now: float) -> msg.ClusterInfo:
        """What is served, and by whom."""
        return cluster_info(self._served, self.members, now, colocated=self._rules.colocated)


def _lost_text(entry: Entry) -> str:
    return (
        f"{entry.losses} workers died while this request was on them, so it is not tried again; "
        f"{len(entry.emitted)} tokens were sent"
    )
