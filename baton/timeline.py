"""Timeline: the stages of requests, built from the moments that the router sends to observers.

    moments   queued 0.00   reserving 0.01   filling 0.02   decoding 0.30 (20 ms handed over) ... finished
    stages    queue         reserve          prefill, then handover      decode, stall, decode

    A prompt filled in chunks sends filling again at the end of each: every chunk is a stage.

Time comes from the moments. Observation may begin in the middle of a request.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgpack

from baton.bounds import Bytes, Line, Name, OptionalName, Seconds, Tokens, TotalSeconds

STALL_S = 0.5
"""No new token for longer than this while decoding is a stall: a reader notices it. The router says so
(Moment.gap_s): only it knows the time of each token."""
REMEMBERED = 10_000
STAGES = {
    "queued": "queue",
    "reserving": "reserve",
    "reserved": "wait",
    "filling": "prefill",
    "decoding": "decode",
}
"""Stage names by state. `wait`: for a Fill batch."""


def short_name(worker: str) -> str:
    """A worker's name without its last part, which tells one boot from another. Others are kept."""
    return worker.rpartition(".")[0] or worker


@dataclass(frozen=True, slots=True)
class Moment:
    """A request entered a state, or has more tokens, filled or generated."""

    request: Name
    at: TotalSeconds  # seconds of the router's clock
    state: Name  # a value of baton.lifecycle.State
    worker: OptionalName = ""
    tokens: Tokens = 0  # queued: of the prompt; filling: filled so far; then: generated so far
    handover_s: Seconds = 0.0  # with the first decoding: how much of the time before was hand-over
    note: Line = ""  # reason of an end, of a retry, or of who fills the prompt
    transport: OptionalName = ""  # of that hand-over
    moved_bytes: Bytes = 0  # by it; 0 where memory is shared
    gap_s: TotalSeconds = 0.0  # since the token before, if it ends here
    reused: Tokens = 0  # with the first decoding: first tokens that prefill did not compute


@dataclass(slots=True)
class Stage:
    """One interval of a request. `end` is None while it lasts. `why`: of a prefill or a decode, who fills
    the prompt and the figures behind that (router/role_policy.py). `reused`: of the first prefill of a
    fill, the tokens at the beginning whose KV was not computed, because it was there."""

    name: str
    start: float
    end: float | None = None
    worker: str = ""
    why: str = ""
    reused: int = 0


@dataclass(slots=True)
class Life:
    """One request: its stages in order, without gaps."""

    request: str
    stages: list[Stage] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    ended: str = ""  # the reason; empty while it is live

    def add(self, moment: Moment) -> None:
        """A moment with an older time counts at the time of the one before it."""
        open_ = self.stages[-1] if self.stages else None
        at = max(moment.at, open_.start) if open_ else moment.at
        if moment.state == "queued" and not self.stages:
            self.prompt_tokens = moment.tokens
        if moment.state in ("decoding", "finished"):
            self.tokens = max(self.tokens, moment.tokens)
        if open_ is not None and open_.name == "decode":
            self._note_stall(at, moment.gap_s)
        if moment.state == "decoding" and self._decoding:
            return
        self._close(at, moment.handover_s)
        if moment.reused:
            self._note_reused(moment.reused)
        if moment.state == "finished":
            self.ended = moment.note or "finished"
        elif moment.state in STAGES:
            why = moment.note if moment.state in ("filling", "decoding") else ""
            self.stages.append(Stage(STAGES[moment.state], at, worker=moment.worker, why=why))

    @property
    def stalled_s(self) -> float:
        """Seconds of all its stalls."""
        return sum(
            (each.end or each.start) - each.start for each in self.stages if each.name == "stall"
        )

    @property
    def _decoding(self) -> bool:
        return bool(self.stages) and self.stages[-1].name == "decode"

    def _note_stall(self, at: float, gap_s: float) -> None:
        if gap_s <= STALL_S:
            return
        stage = self.stages[-1]
        last = max(stage.start, at - gap_s)
        stage.end = last
        self.stages.append(Stage("stall", last, at, stage.worker))
        self.stages.append(Stage("decode", at, worker=stage.worker))

    def _note_reused(self, tokens: int) -> None:
        fill: list[Stage] = []
        for stage in reversed(self.stages):
            if stage.name not in ("prefill", "handover"):
                break
            fill += [stage] if stage.name == "prefill" else []
        if fill:
            fill[-1].reused = tokens

    def _close(self, at: float, handover_s: float) -> None:
        if not self.stages or self.stages[-1].end is not None:
            return
        stage = self.stages[-1]
        stage.end = at
        if stage.name != "prefill" or handover_s <= 0:
            return
        begin = at - handover_s
        while stage.start > begin and len(self.stages) > 1 and self.stages[-2].name == "prefill":
            self.stages.pop()  # a chunk that lies within the hand-over
            stage = self.stages[-1]
        stage.end = max(stage.start, begin)
        self.stages.append(Stage("handover", stage.end, at, stage.worker))


class Copy:
    """The requests of a timeline at one moment, packed. To unpack one takes as long as to pack two, and
    is left to whoever reads it."""

    def __init__(self, packed: Sequence[tuple[str, bytes]]) -> None:
        self._packed = packed

    def __iter__(self) -> Iterator[Life]:
        for request, packed in self._packed:
            yield _unpacked(request, packed)


class Timeline:
    """All live requests and the last `remembered` that have ended. Those are kept packed: as objects,
    10,000 of them are half a million small pieces of memory, 50 MiB, with gaps that only grow."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._live: dict[str, Life] = {}
        self._ended: OrderedDict[str, bytes] = OrderedDict()

    def add(self, moments: Iterable[Moment]) -> None:
        """Add moments in the order in which they were sent."""
        for moment in moments:
            if moment.request in self._ended and moment.state != "queued":
                continue  # sent twice
            life = self._live.setdefault(moment.request, Life(moment.request))
            life.add(moment)
            if life.ended:
                del self._live[moment.request]
                self._ended[moment.request] = _packed(life)
                while len(self._ended) > self._remembered:
                    self._ended.popitem(last=False)

    def copy(self) -> "Copy":
        """As it is now, for another thread. Here that packs the live requests: 3 us for each."""
        live = [(request, _packed(life)) for request, life in self._live.items()]
        return Copy([*self._ended.items(), *live])

    def get(self, request: str) -> Life | None:
        life, packed = self._live.get(request), self._ended.get(request)
        return life or (_unpacked(request, packed) if packed is not None else None)

    def __iter__(self) -> Iterator[Life]:
        for request, packed in self._ended.items():
            yield _unpacked(request, packed)
        yield from self._live.values()

    def __len__(self) -> int:
        return len(self._live) + len(self._ended)


def _packed(life: Life) -> bytes:
    stages = [(s.name, s.start, s.end, s.worker, s.why, s.reused) for s in life.stages]
    packed: bytes = msgpack.packb((stages, life.prompt_tokens, life.tokens, life.ended))
    return packed


def _unpacked(request: str, packed: bytes) -> Life:
    stages, *rest = msgpack.unpackb(packed)
    return Life(request, [Stage(*each) for each in stages], *rest)
