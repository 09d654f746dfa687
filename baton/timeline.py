"""Timeline: the lives of requests, put together from the moments that the router tells.

    moments   queued 0.00   reserving 0.01   filling 0.02   decoding 0.30 (20 ms handed over) ... finished
    stages    queue         reserve          prefill, then handover      decode, stall, decode

    A prompt filled in chunks is told as filling again at the end of each: every chunk is a stage.

Time comes with the moments alone. Watching may begin in the middle of a life.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

STALL_S = 0.5
"""No new token for longer than this while decoding is a stall: a reader notices it."""
REMEMBERED = 10_000
STAGES = {
    "queued": "queue",
    "reserving": "reserve",
    "reserved": "wait",
    "filling": "prefill",
    "decoding": "decode",
}
"""Names of stages by the state that a request is in. `wait`: for a batch to be filled with."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A request came into a state; or has more tokens now: filled, or generated."""

    request: str
    at: float  # seconds of the router's clock
    state: str  # a value of baton.lifecycle.State
    worker: str = ""
    tokens: int = 0  # known when it was queued; filled so far; generated so far, and at its end
    handover_s: float = 0.0  # with the first of decoding: what of the time before went into that
    note: str = ""  # why it ended, or why it is queued again


@dataclass(slots=True)
class Stage:
    """A stretch of a life. `end` is None while it lasts."""

    name: str
    start: float
    end: float | None = None
    worker: str = ""


@dataclass(slots=True)
class Life:
    """One request: its stages in order, without gaps."""

    request: str
    stages: list[Stage] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    ended: str = ""  # why; empty while it lives
    last_token: float | None = None

    def add(self, moment: Moment) -> None:
        """What comes late is taken for as late as what came before it."""
        open_ = self.stages[-1] if self.stages else None
        at = max(moment.at, open_.start) if open_ else moment.at
        if moment.state == "queued" and not self.stages:
            self.prompt_tokens = moment.tokens
        if moment.state in ("decoding", "finished"):
            self.tokens = max(self.tokens, moment.tokens)
        if open_ is not None and open_.name == "decode":
            self._mind_stall(at)
        if moment.state == "decoding" and self._decoding:
            self.last_token = at
            return
        self._close(at, moment.handover_s)
        if moment.state == "finished":
            self.ended = moment.note or "finished"
        elif moment.state in STAGES:
            self.stages.append(Stage(STAGES[moment.state], at, worker=moment.worker))
            self.last_token = at if moment.state == "decoding" else None

    @property
    def _decoding(self) -> bool:
        return bool(self.stages) and self.stages[-1].name == "decode"

    def _mind_stall(self, at: float) -> None:
        stage = self.stages[-1]
        last = max(stage.start, self.last_token or stage.start)
        if at - last <= STALL_S:
            return
        stage.end = last
        self.stages.append(Stage("stall", last, at, stage.worker))
        self.stages.append(Stage("decode", at, worker=stage.worker))

    def _close(self, at: float, handover_s: float) -> None:
        if not self.stages or self.stages[-1].end is not None:
            return
        stage = self.stages[-1]
        stage.end = at
        if stage.name != "prefill" or handover_s <= 0:
            return
        begin = at - handover_s
        while stage.start > begin and len(self.stages) > 1 and self.stages[-2].name == "prefill":
            self.stages.pop()  # a chunk that went by while earlier ones were handed over
            stage = self.stages[-1]
        stage.end = max(stage.start, begin)
        self.stages.append(Stage("handover", stage.end, at, stage.worker))


class Timeline:
    """All live requests and the last `remembered` that have ended."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._live: dict[str, Life] = {}
        self._ended: OrderedDict[str, Life] = OrderedDict()

    def add(self, moments: Iterable[Moment]) -> None:
        """In the order they were told."""
        for moment in moments:
            if moment.request in self._ended and moment.state != "queued":
                continue  # told twice
            life = self._live.setdefault(moment.request, Life(moment.request))
            life.add(moment)
            if life.ended:
                del self._live[moment.request]
                self._ended[moment.request] = life
                while len(self._ended) > self._remembered:
                    self._ended.popitem(last=False)

    def get(self, request: str) -> Life | None:
        """The life of this request."""
        return self._live.get(request) or self._ended.get(request)

    def __iter__(self) -> Iterator[Life]:
        yield from self._ended.values()
        yield from self._live.values()

    def __len__(self) -> int:
        return len(self._live) + len(self._ended)
