"""What an Explorer (explore.py) runs: models whose pool is a value, the client, and values of nodes.

Every process is production code but its model. The pretend KV cache holds token ids where a real one
holds keys and values, and the next token is a hash of what stands in the pool.
"""

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from baton.client.tracker import RequestTracker, Update
from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt, Region
from baton.kv.row import Logits, Row
from baton.params import GenerationParams
from baton.wire import messages as msg
from baton.wire.node import ROUTER, Effect, To
from decode_worker.model import Draw, Drawn
from decode_worker.worker import DecodeWorker
from prefill_worker.model import Chunk, News
from prefill_worker.worker import PrefillWorker
from router.priority import PriorityQueue
from tests.pure.town import next_token

BLOCK = 2

MEASURED = frozenset(
    (
        *("_steps", "steps", "since", "spent", "submitted", "first_token", "handover_s"),
        *("detokenize_s", "placed_at", "tally", "_tally", "_works"),
        *("_none_silent_before", "_seen", "_news", "links"),  # these save work, and nobody watches
    )
)
"""Fields that no decision depends on."""


Answers = Mapping[str, tuple[list[int], str]]
"""Tokens and finish reason of each request's undisturbed run."""


class Violation(AssertionError):
    """An invariant does not hold."""


# ---- the models: the pool's content is a value of the world, passed to each transition


@dataclass
class Pool:
    """A decode worker's pool: token ids in the place of KV, and stamps."""

    cells: dict[tuple[int, int], int] = field(default_factory=dict)  # block, offset -> token id
    stamps: dict[int, int] = field(default_factory=dict)

    def copy(self) -> "Pool":
        return Pool(self.cells.copy(), self.stamps.copy())

    def frozen(self) -> tuple[Any, ...]:
        return tuple(sorted(self.cells.items())), tuple(sorted(self.stamps.items()))


@dataclass
class Surroundings:
    """What a transition sees of the world besides its node and message."""

    pools: frozenset[str] = frozenset()  # decode workers whose memory exists
    pool: Pool | None = None  # the decode worker's own
    writes: list["Write"] = field(default_factory=list)  # of a prefill worker, to be applied


class Write(NamedTuple):
    """A prefill worker's write under a grant. `stamped`: the fill is complete."""

    grant: Grant
    start: int
    token_ids: tuple[int, ...]
    stamped: tuple[int, ...] = ()


class Filler:
    """PrefillModel: writes token ids where a real one writes KV."""

    def __init__(self) -> None:
        self.around = Surroundings()
        self.attached: set[str] = set()

    def attach(self, worker: str, epoch: str, regions: Sequence[Region]) -> msg.Attached:
        if worker not in self.around.pools:
            raise TransferError(f"no memory of {worker}")
        self.attached.add(worker)
        return msg.Attached(worker, epoch, "shm", 0.0, "")

    def detach(self, worker: str) -> None:
        self.attached.discard(worker)

    def poll(self) -> list[News]:
        return []

    waits = False

    def takes(self, worker: str) -> bool:
        return True

    def admit(self, grant: Grant, tokens: int, block_hashes: Sequence[bytes] = ()) -> bool:
        if grant.worker not in self.attached:
            raise TransferError(f"not attached to {grant.worker}")
        return True

    def known(self, grant: Grant) -> int:
        return len(grant.prefix) * BLOCK

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self.around.writes.append(Write(chunk.grant, chunk.start, tuple(chunk.token_ids)))

    def finish(self, grant: Grant, tokens: int) -> Receipt:
        filled = grant.table[len(grant.prefix) : -(-tokens // BLOCK)]
        self.around.writes.append(Write(grant, 0, (), filled))
        return Receipt(0, b"", 0.0, "shm")

    def abandon(self, grant: Grant) -> None:
        pass

    def use_cores(self, cores: tuple[int, ...]) -> None:
        pass

    def clock(self) -> float:
        return 0.0


class Reader:
    """DecodeModel: the next token is a hash of what stands in the pool."""

    def __init__(self) -> None:
        self.around = Surroundings()

    @property
    def pool(self) -> Pool:
        assert self.around.pool is not None
        return self.around.pool

    def expect(self, grant: Grant) -> None:
        self.pool.stamps.update(dict.fromkeys(grant.blocks, 0))

    def poll(self) -> bool:
        return False

    def arrival(self, grant: Grant, receipt: Receipt, tokens: int) -> Arrival:
        filled = grant.table[len(grant.prefix) : -(-tokens // BLOCK)]
        good = all(self.pool.stamps.get(block) == grant.generation for block in filled)
        return Arrival.READY if good else Arrival.BAD

    def retire(self, grant: Grant) -> None:
        pass

    def let_in(self, writer: str) -> None:
        pass

    def shut_out(self, writer: str) -> None:
        pass

    def renew_epoch(self, epoch: str) -> tuple[Region, ...]:
        return ()

    def use_cores(self, cores: tuple[int, ...]) -> None:
        pass

    def clock(self) -> float:
        return 0.0  # nothing is learnt of speeds

    def step(self, rows: Sequence[Row], draws: Sequence[Draw]) -> list[Drawn | None]:
        drawn: list[Drawn | None] = []
        for row in rows:
            for place, token in enumerate(row.token_ids, row.start):
                self.pool.cells[row.blocks[place // BLOCK], place % BLOCK] = token
            if row.logits is not Logits.NONE:
                context = [content(self.pool, row.blocks, place) for place in range(row.end)]
                drawn.append(Drawn(next_token(context)))
        return drawn


def content(pool: Pool, table: Sequence[int], place: int) -> int:
    return pool.cells.get((table[place // BLOCK], place % BLOCK), -1)


def with_model(node: Any, around: Surroundings) -> None:
    """Show its model these surroundings."""
    match node:
        case DecodeWorker():
            node.model.around = around  # type: ignore[attr-defined]
        case PrefillWorker():
            node._model.around = around  # type: ignore[attr-defined]


# ---- the client: the production tracker, and what it was told


class Client:
    """A node that submits its requests to every router and keeps what it is told about them."""

    def __init__(self, prompts: Mapping[str, tuple[tuple[int, ...], int]]) -> None:
        self.tracker = RequestTracker(0.0)
        self.tokens: dict[str, list[int]] = {name: [] for name in prompts}
        self.ends: dict[str, list[str]] = {name: [] for name in prompts}
        self.pending = {
            name: self.tracker.submit(msg.Submit(name, prompt, GenerationParams(length)), now=0.0)
            for name, (prompt, length) in prompts.items()
        }

    def handle(self, sender: str, message: msg.Message, now: float) -> list[Effect]:
        self._read(self.tracker.received(message, now))
        return self.step(now)

    def step(self, now: float) -> list[Effect]:
        self._read(self.tracker.tick(now))
        return [To(ROUTER, each) for each in self.tracker.messages_to_send()]

    def abort(self, request: str, now: float) -> list[Effect]:
        self._read(self.tracker.abort(self.pending[request]))
        return self.step(now)

    @property
    def abortable(self) -> tuple[str, ...]:
        """Requests that can still be aborted."""
        return tuple(n for n, p in self.pending.items() if not p.ended and not p.aborted)

    def failures(self, answers: Answers) -> Iterator[str]:
        """Requests that have not ended as they should."""
        for name, (tokens, reason) in answers.items():
            aborted = self.pending[name].aborted and self.ends[name] == ["abort"]
            if not aborted and (self.tokens[name], self.ends[name]) != (tokens, [reason]):
                yield f"{name} got {self.tokens[name]} and ended {self.ends[name]}"

    def due(self, now: float) -> float:
        return 1.0

    def _read(self, events: Iterable[object]) -> None:
        for event in events:
            match event:
                case Update(request, msg.Emitted(_, token_ids)):
                    if self.ends[request.id]:
                        raise Violation(f"{request.id}: tokens after its end")
                    self.tokens[request.id] += token_ids
                case Update(request, msg.Finished(_, reason)):
                    self.ends[request.id].append(reason)
                case Update(request, msg.Failed(_, code)):
                    self.ends[request.id].append(code)


# ---- values of nodes


def value_of(thing: object) -> Any:
    """A hashable value that is equal for objects that behave equally: all their fields, but MEASURED.
    The order of a dict counts, because some are queues."""
    return _value(thing, {})


def _value(thing: Any, seen: dict[int, int]) -> Any:
    kind = type(thing)
    if kind in ATOMS:
        return thing
    if kind is tuple or kind is list or kind is deque:
        return (kind, *[_value(each, seen) for each in thing])
    if kind is PriorityQueue:  # its heap holds what was removed, too
        return (kind, *thing.in_order())
    if kind is dict or kind is OrderedDict:
        return (kind, *[(_value(k, seen), _value(v, seen)) for k, v in thing.items()])
    if kind in SETS:
        return (kind, *sorted([_value(each, seen) for each in thing], key=repr))
    if kind is array:
        return (kind, thing.tobytes())
    if kind is Counter:
        return (kind, *sorted(thing.items()))
    if kind in CODE or isinstance(thing, Enum):
        return thing if kind is not MethodType else thing.__qualname__
    names, frozen = _shape(kind, thing)
    if frozen:
        try:
            hash(thing)
        except TypeError:  # it holds something that changes
            pass
        else:
            return thing
    if id(thing) in seen:  # one object in several places
        return ("again", seen[id(thing)])
    seen[id(thing)] = len(seen)
    names = names or tuple(vars(thing))
    return (kind, *[(n, _value(getattr(thing, n), seen)) for n in names if n not in MEASURED])


ATOMS = frozenset((type(None), int, float, str, bytes, bool))
SETS = frozenset((set, frozenset))
CODE = frozenset((FunctionType, MethodType, type))
_SHAPES: dict[type, tuple[tuple[str, ...], bool]] = {}


def _shape(kind: type, thing: object) -> tuple[tuple[str, ...], bool]:
    """The slots of a class, and whether its objects never change."""
    if (known := _SHAPES.get(kind)) is None:
        slots = tuple(n for each in kind.__mro__ for n in getattr(each, "__slots__", ()))
        assert not (slots and hasattr(thing, "__dict__")), f"{kind} has slots and a __dict__"
        frozen = is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        known = _SHAPES[kind] = slots, frozen
    return known
