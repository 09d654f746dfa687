"""EngineWorker, a Node: answers Start and Cancel with the tokens of another server.

    Start --> one HTTP request --> its pieces --> tokens, batched --> Decoded
    Cancel, Reset, a lost router --> the HTTP request is closed, so that the upstream stops

It holds no KV, so Reserve and Fill do not exist for it. What goes wrong at the upstream is told in one of
three ways: RunFailed (the request cannot be served), RunReturned (another try may succeed), Paused (no
request is served for now).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from baton.errors import RequestError
from baton.kv.region import Region
from baton.wire import messages as msg
from baton.wire.membership import Membership, Worker
from baton.wire.messages import Message
from baton.wire.node import ROUTER, Effect, To
from baton.wire.orders import Ignored
from decode_worker.model import Drawn
from decode_worker.token_buffer import TokenBuffer
from decode_worker.upstream.answer import Answer, Diverged, Faulty, Gap, Hopeless
from decode_worker.upstream.dialects import DIALECTS, Json, Piece, body_of, read_piece
from decode_worker.upstream.health import Blame, Health, Look, blame
from decode_worker.upstream.survey import Survey
from decode_worker.upstream.texts import Texts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Events:
    """Events of a streamed reply, as texts of JSON."""

    call: int
    data: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """A reply ended as HTTP says it should."""

    call: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A reply with another status than 200."""

    call: int
    status: int
    why: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """The connection broke, or nothing came for too long. `begun`: it had been made."""

    call: int
    why: str
    begun: bool


@dataclass(frozen=True, slots=True)
class Looked:
    """The result of a look; `why` is empty if the upstream serves. `answered`: see Health.missed."""

    how: Look
    why: str = ""
    answered: bool = True


Heard = Events | Ended | Refused | Broken | Looked


class Upstream(Protocol):
    """The server, seen from the node. Calls return at once; poll() tells what came of them."""

    def ask(self, call: int, path: str, body: Json) -> None:
        """POST this and stream the reply."""

    def close(self, call: int) -> None:
        """Close the connection of a call, whatever its state; nothing more is heard of it."""

    def look(self, how: Look) -> None:
        """Look whether it serves; heard as Looked."""

    def poll(self) -> list[Heard]:
        """What has happened since the last call, in order."""


@dataclass(slots=True)
class EngineWorker(Worker):
    """`url` names the upstream in messages, `survey` what was found there at the start. `texts`: for a
    server of text."""

    hello: msg.Hello
    upstream: Upstream
    url: str
    survey: Survey
    vocabulary: int
    texts: Texts | None = None
    runs: dict[str, Answer] = field(init=False, default_factory=dict)
    health: Health = field(init=False, default_factory=Health)
    _calls: dict[int, str] = field(init=False, default_factory=dict)  # call -> run
    _made: int = field(init=False, default=0)  # calls so far
    _membership: Membership = field(init=False)
    _buffer: TokenBuffer = field(init=False, default_factory=TokenBuffer)
    _told: str = field(init=False, default="")  # the router: why this worker is paused
    _ignored: Ignored = field(init=False, default_factory=Ignored)

    def __post_init__(self) -> None:
        self._membership = Membership(self.hello, self._start_anew)

    # ---- the Node

    def obey(self, message: Message, now: float) -> list[Effect]:
        match message:
            case msg.Start():
                return self._start(message, now)
            case msg.Cancel(run):
                self._drop(run)
                self._buffer.drop(run)
            case msg.Reserve(run) | msg.Drop(run):
                return self._ignored.note(run, "an engine has no blocks", now)
        return []

    def step(self, now: float) -> list[Effect]:
        effects = self._membership.step(now)
        for heard in self.upstream.poll():
            effects += self._heard(heard, now)
        if (how := self.health.look(now)) is not None:
            self.upstream.look(how)
        effects += self._buffer.take_due(now, now)
        why = self.health.why(now)
        if not self._membership.joined or why == self._told:
            return effects
        if why:
            logger.warning("takes no new requests: %s", why)
        else:
            logger.warning("takes requests again: %s", self.url)
        self._told, busy = why, bool(why) and not self.health.out_of_order
        return [To(ROUTER, msg.Paused(why, busy)), *effects]  # before the runs that it returns

    def due(self, now: float) -> float:
        waits = (self._membership.due(now), self._buffer.due(now), self.health.due(now))
        return min(waits)

    # ---- runs

    def _start(self, order: msg.Start, now: float) -> list[Effect]:
        run, dialect = order.run, DIALECTS[self.survey.dialect]
        if run in self.runs:
            return self._ignored.note(run, "Start of a run that is started", now)
        if why := self._unfit(order):
            return [To(ROUTER, msg.RunFailed(run, "worker_error", why))]
        if why := self.health.why(now):
            return [To(ROUTER, msg.RunReturned(run, why, suspect=False))]
        if len(self.runs) >= self.hello.blocks:
            why = f"all {self.hello.blocks} places of {self.url} are taken"
            return [To(ROUTER, msg.RunReturned(run, why, suspect=False))]
        answer = Answer.of(order, dialect, self.vocabulary, self.texts)
        try:
            self._ask(run, answer)
        except RequestError as error:
            return [To(ROUTER, msg.RunFailed(run, error.code, str(error)))]
        self.runs[run] = answer
        return []

    def _unfit(self, order: msg.Start) -> str:
        ids, length = order.token_ids, len(order.token_ids)
        if not 1 <= order.prompt_tokens <= length:
            return f"Start with {order.prompt_tokens} prompt tokens among {length}"
        if length - order.prompt_tokens >= order.params.max_new_tokens:
            return f"Start with {length - order.prompt_tokens} tokens, and it ends with fewer"
        if max(ids) >= self.vocabulary:
            return f"Start with token id {max(ids)}, the vocabulary has {self.vocabulary}"
        return ""

    def _ask(self, run: str, answer: Answer) -> None:
        """Raises RequestError if this kind of upstream cannot be asked for it."""
        body = body_of(answer.dialect, answer.asked(self.survey.model))
        self._made += 1
        answer.call = self._made
        self._calls[answer.call] = run
        self.upstream.ask(answer.call, answer.dialect.path, body)

    def _hang_up(self, answer: Answer) -> None:
        self._calls.pop(answer.call, None)
        self.upstream.close(answer.call)

    def _drop(self, run: str) -> None:
        """End a run here, for any reason."""
        if (answer := self.runs.pop(run, None)) is not None:
            self._hang_up(answer)
            self.health.freed()

    def _start_anew(self, epoch: str) -> tuple[Region, ...]:
        for run in list(self.runs):
            self._drop(run)
        self._buffer.clear()
        self._told = ""
        return ()

    # ---- what comes from the upstream

    def _heard(self, heard: Heard, now: float) -> list[Effect]:
        if isinstance(heard, Looked):
            return self._looked(heard, now)
        run = self._calls.get(heard.call)
        if run is None:  # of a call that was closed meanwhile
            return []
        match heard:
            case Events(_, data):
                self.health.heard()
                return self._events(run, data, now)
            case Ended():
                return self._returned(
                    run, f"{self.url} ended its reply in the middle of an answer", now
                )
            case Broken(_, why, begun):
                self.health.down(f"{self.url}: {why}", now)
                return self._returned(run, f"{self.url}: {why}", now, suspect=begun)
            case Refused():
                return self._refused(run, heard, now)

    def _events(self, run: str, data: tuple[str, ...], now: float) -> list[Effect]:
        answer = self.runs[run]
        try:
            for text in data:
                piece = read_piece(text)
                if why := self._swapped(piece):
                    self.health.down(why, now)
                    return self._returned(run, why, now)
                for token, finish in answer.take(piece):
                    self._buffer.put(run, answer, Drawn(token), finish, now, runs=len(self.runs))
                if answer.ended:
                    self._drop(run)
                    break
        except Faulty as error:
            return self._returned(run, f"{self.url}: {error}", now)
        except ValueError as error:  # whatever it is, it would answer the next request so, too
            self.health.down(f"{self.url}: {error}", now)
            return self._returned(run, f"{self.url}: {error}", now)
        except Hopeless as error:
            return self._failed(run, "worker_error", f"{self.url}: {error}", now)
        except Diverged:
            logger.warning("%s: %s gave other tokens for the same prompt and seed", run, self.url)
            return self._ask_again(run, answer, answer.go_on, now)
        except Gap:
            return self._ask_again(run, answer, answer.ask_whole, now)
        return []

    def _swapped(self, piece: Piece) -> str:
        """Why this is not the model that was found at the start: an upstream may be started again with
        another one between two looks."""
        known = self.survey.answers_as
        if not known or piece.model in ("", known):
            return ""
        return f"{self.url}: {piece.model!r:.200} answered, where {known!r:.200} did"

    def _ask_again(
        self, run: str, answer: Answer, prepare: Callable[[], None], now: float
    ) -> list[Effect]:
        """In another way than before."""
        self._hang_up(answer)
        try:
            prepare()
            self._ask(run, answer)
        except (Hopeless, RequestError) as error:
            return self._failed(run, "worker_error", f"{self.url}: {error}", now)
        return []

    def _refused(self, run: str, heard: Refused, now: float) -> list[Effect]:
        why = f"{self.url} answered {heard.status}: {heard.why}"
        match blame(heard.status):
            case Blame.REQUEST:
                return self._failed(run, "invalid_request", why, now)
            case Blame.BUSY:
                effects = self._returned(run, why, now, suspect=False)
                self.health.busy(why, heard.retry_after_s, now)
                return effects
            case Blame.SETTING:
                self.health.down(why, now)
                return self._returned(run, why, now, suspect=False)
            case Blame.SERVER:
                return self._returned(run, why, now)

    def _looked(self, heard: Looked, now: float) -> list[Effect]:
        if not heard.why:
            self.health.found(heard.how, now)
            return []
        why = f"{self.url}: {heard.why}"
        if not self.health.missed(why, now, answered=heard.answered):
            return []
        return [each for run in list(self.runs) for each in self._returned(run, why, now)]

    def _returned(self, run: str, why: str, now: float, *, suspect: bool = True) -> list[Effect]:
        """Give the run back, after the tokens that it has."""
        self._drop(run)
        return [*self._buffer.flush(now), To(ROUTER, msg.RunReturned(run, why, suspect))]

    def _failed(self, run: str, code: str, why: str, now: float) -> list[Effect]:
        self._drop(run)
        return [*self._buffer.flush(now), To(ROUTER, msg.RunFailed(run, code, why))]
