"""Simulation: a whole cluster on a virtual clock. The nodes are those of the processes: the same router,
the same schedulers and blocks. Forwards take the time that a Machine says, messages that of a hop.

    arrivals ──► router ◄──► prefill-0, ...   A worker that computes hears nothing until its forward ends,
                   ▲                          and what the forward gave is sent then.
                   └───────► decode-0, ...

So a run is the same whenever and wherever it is repeated.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from baton.params import GenerationParams, Limits
from baton.plan.machine import Machine
from baton.plan.models import BLOCK, SimulatedDecode, SimulatedPrefill, Timed, Wordless
from baton.wire import messages as msg
from baton.wire.messages import Message
from baton.wire.node import ROUTER, Effect, Node, To
from baton.wire.paces import Paces
from baton.wire.records import Timings
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from router.admission import Served
from router.batching import Rules
from router.router import Identity, Router
from sampler.params import SamplingParams

CLIENT = "client"
LEAST_WAIT_S = 1e-4
"""Between two steps of a node that has nothing to compute."""
WARM_UP_S = 3.0
"""Workers join, are attached and send their first heartbeat before the first request arrives."""
STREAM_INTERVAL_S = 0.1
"""Tokens are sent so often, but count as if each was sent at once: _note(). Half of the simulation's time
would be messages that carry one token."""
UNSENT_STEPS = 1024
"""At most so many have tokens that are not sent yet."""
DIGITS = 7
"""Of the times of steps, in seconds: an age is a difference, and not exact."""
TOO_LONG_S = 100_000.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: seconds from the beginning, token ids of its prompt, tokens of its answer."""

    at: float
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(slots=True)
class Answer:
    """What became of one arrival. `tokens`: when the client had each; `why`: who filled it, and why."""

    arrival: Arrival
    tokens: list[float] = field(default_factory=list)
    failed: str = ""
    why: str = ""
    timings: Timings | None = None  # the router's word at its end

    @property
    def ttft_s(self) -> float:
        """Infinite if there was no token."""
        return self.tokens[0] - self.arrival.at if self.tokens else inf

    @property
    def gaps_s(self) -> list[float]:
        """Between successive tokens."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a cluster. `pool_tokens`: of each decode worker."""

    prefills: int = 1
    decodes: int = 1
    pool_tokens: int = 1 << 17
    token_budget: int = 2048
    context: int = 1 << 17


class Simulation:
    """Call run() once."""

    def __init__(self, machine: Machine, rules: Rules, shape: Shape) -> None:
        self.now = 0.0
        self._machine, self._shape = machine, shape
        self._nodes: dict[str, Node] = {}
        self._models: dict[str, Timed] = {}
        self._inbox: dict[str, deque[tuple[str, Message]]] = {}
        self._busy_until: dict[str, float] = {}
        self._ends: dict[str, dict[float, float]] = {}  # of steps whose tokens are not sent yet
        self._wake: dict[str, float] = {}
        self._events: list[tuple[float, int, str, str, Message | None]] = []
        self._serial = 0
        self._found: dict[str, Answer] = {}
        self._live = 0
        served = Served(
            "simulated",
            "s" * 16,
            Limits(shape.context, 1 << 20),
            (),
            SamplingParams(temperature=0.0),
        )
        cores = tuple(range(machine.cores))
        identity = Identity("router/1", "here", 1, cores)
        self.router = Router(identity, served, Wordless(), rules, lambda: 0.0)
        self._add(ROUTER, self.router, None)
        for role, count in (("prefill", shape.prefills), ("decode", shape.decodes)):
            for index in range(count):
                self._start_worker(role, index)

    def run(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        """What became of each arrival, in their order. Times count from the first possible arrival."""
        self._send(CLIENT, [To(ROUTER, msg.Observe())], 0.0)
        for index, each in enumerate(arrivals):
            name = f"r{index}"
            self._found[name] = Answer(each)
            params = GenerationParams(
                each.new_tokens,
                SamplingParams(temperature=0.0),
                ignore_eos=True,
                stream_interval_s=STREAM_INTERVAL_S,
            )
            submit = msg.Submit(name, each.prompt, params)
            self._push(WARM_UP_S + each.at, ROUTER, CLIENT, submit)
        self._live = len(arrivals)
        while self._live and self._events:
            self.now, _, receiver, sender, message = heapq.heappop(self._events)
            if self.now > TOO_LONG_S:
                break
            self._happen(receiver, sender, message)
        for answer in self._found.values():
            if not answer.failed and len(answer.tokens) < answer.arrival.new_tokens:
                answer.failed = f"it was not answered after {self.now:,.0f} s"
        return list(self._found.values())

    # ---- events

    def _happen(self, receiver: str, sender: str, message: Message | None) -> None:
        if receiver == CLIENT:
            assert message is not None
            self._hear(message)
        elif message is not None:
            self._inbox[receiver].append((sender, message))
            self._wake_at(receiver, max(self.now, self._busy_until[receiver]))
        elif self._wake[receiver] == self.now:
            self._turn(receiver)

    def _turn(self, name: str) -> None:
        """Messages first, then a step: the loop of a process."""
        node, model, now = self._nodes[name], self._models.get(name), self.now
        self._wake[name] = inf
        inbox, effects = self._inbox[name], list[Effect]()
        before = model.spent_s if model is not None else 0.0
        while inbox:
            effects += node.handle(*inbox.popleft(), now)
        effects += node.step(now)
        ends = now + (model.spent_s - before if model is not None else 0.0)
        self._busy_until[name] = ends
        if ends > now:
            self._ends[name][round(now, DIGITS)] = ends
        self._note(name, effects, now)
        self._send(name, effects, ends)
        self._wake_at(name, ends + max(LEAST_WAIT_S if ends == now else 0.0, node.due(ends)))

    def _note(self, name: str, effects: Sequence[Effect], now: float) -> None:
        """Tokens in messages to the router. Each has the time at which its step began; it existed at the
        step's end, and is sent over two hops."""
        for effect in effects:
            if not (isinstance(effect, To) and isinstance(effect.message, msg.Decoded)):
                continue
            ends = self._ends[name]
            for each in effect.message.runs:
                request, _, _ = each.run.rpartition("#")
                begun = [now - age for age in each.ages] or [now] * len(each.token_ids)
                sent = 2 * self._machine.hop_s - WARM_UP_S
                self._found[request].tokens += [_end(ends, at) + sent for at in begun]
            for old in list(ends)[:-UNSENT_STEPS]:
                del ends[old]

    def _hear(self, message: Message) -> None:
        match message:
            case msg.Finished() | msg.Failed():
                self._live -= 1
                if isinstance(message, msg.Failed):
                    self._found[message.request].failed = message.message
                else:
                    self._found[message.request].timings = message.timings
            case msg.Observed():
                for moment in message.moments:
                    if moment.state in ("filling", "decoding") and moment.note:
                        self._found[moment.request].why = moment.note

    def _send(self, sender: str, effects: Sequence[Effect], at: float) -> None:
        for effect in effects:
            if isinstance(effect, To):
                self._push(at + self._machine.hop_s, effect.peer, sender, effect.message)

    def _push(self, at: float, receiver: str, sender: str, message: Message | None) -> None:
        self._serial += 1
        heapq.heappush(self._events, (at, self._serial, receiver, sender, message))

    def _wake_at(self, name: str, at: float) -> None:
        if at < self._wake[name]:
            self._wake[name] = at
            self._push(at, name, "", None)

    # ---- nodes

    def _start_worker(self, role: str, index: int) -> None:
        machine, shape, name = self._machine, self._shape, f"{role}-{index}"
        blocks = shape.pool_tokens // BLOCK if role == "decode" else 0
        block_bytes = BLOCK * machine.kv_bytes_per_token
        hello = msg.Hello(
            role, name, f"{name}/0", msg.PROTOCOL, "here", 1, "simulated", "s" * 16, "float32",
            "layout", BLOCK, block_bytes, blocks, (), 1000.0, 0.0, takes_cores=machine.cores > 0,
        )  # fmt: skip
        paces = Paces(*machine.boot(shape.prefills + shape.decodes))
        if role == "decode":
            decode = SimulatedDecode(machine)
            node: Node = DecodeWorker(hello, decode, shape.token_budget, paces=paces)
            self._add(name, node, decode)
        else:
            filling = SimulatedPrefill(machine)
            node = PrefillWorker(hello, filling, token_budget=shape.token_budget, paces=paces)
            self._add(name, node, filling)

    def _add(self, name: str, node: Node, model: Timed | None) -> None:
        self._nodes[name] = node
        if model is not None:
            self._models[name] = model
        self._inbox[name] = deque()
        self._busy_until[name], self._wake[name] = 0.0, inf
        self._ends[name] = {}
        self._wake_at(name, 0.0)


def _end(ends: dict[float, float], began: float) -> float:
    """Of the step that began then."""
    found = ends.get(round(began, DIGITS))
    return found if found is not None else ends[min(ends, key=lambda each: abs(each - began))]
