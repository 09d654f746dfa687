"""A real Router among pretend workers, on a virtual clock. Only the router's own work is counted."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from baton.kv.grant import Grant
from baton.kv.region import Receipt
from baton.lifecycle import State
from baton.pace import Pace
from baton.params import GenerationParams, Limits
from baton.text import Tokenizer
from baton.wire import messages as msg
from baton.wire.messages import Message
from baton.wire.node import Effect, To
from baton.wire.paces import Paces
from router.admission import Served
from router.batching import Rules
from router.role_policy import Cause, RolePolicy
from router.router import Identity, Router
from sampler.params import SamplingParams

BLOCK = 16
VOCABULARY = 50_257
GREEDY = SamplingParams(temperature=0.0)
CLIENT = "client"
TURN_S, BEAT_S = 0.001, 1.0
"""Virtual time from one turn to the next, and from one heartbeat of a worker to the next."""


class Words(Tokenizer):
    """A tokenizer without text: what text costs is measured apart."""

    longest_token = 4
    falls_back = False
    cleans_up = False

    def __init__(self) -> None:
        pass

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [1] * (len(text) // self.longest_token)

    def decode_loose(self, ids: Sequence[int], *, special: bool = False) -> str:
        return "word" * len(ids)

    def decode_whole_loose(self, ids: Sequence[int], *, special: bool = False) -> str:
        return "word" * len(ids)


class PretendWorkers:
    """Workers that answer every order at once and correctly. Half of them fill, half decode."""

    def __init__(self, workers: int, pool: int, *, host: str = "there") -> None:
        """`pool`: blocks of each decode worker. Those on host "here" share the cores of the router."""
        self.decoding: dict[str, dict[str, int]] = {}  # decode worker -> run -> next position
        self.filling: list[str] = [f"prefill-{index}" for index in range(workers // 2)]
        self._pool, self._host, self._generation = pool, host, 0
        for index in range(workers // 2):
            self.decoding[f"decode-{index}"] = {}

    def hellos(self) -> list[msg.Hello]:
        """What they say first."""
        return [
            self._hello(name, index) for index, name in enumerate((*self.filling, *self.decoding))
        ]

    def _hello(self, name: str, index: int) -> msg.Hello:
        role, _, _ = name.partition("-")
        pool = self._pool if role == "decode" else 0
        return msg.Hello(
            role, name, f"{name}/0", msg.PROTOCOL, self._host, 1000 + index, "cpu", "pretend",
            "float32", "layout", BLOCK, BLOCK * 1024, pool, (), 60.0, 1.0, "", self._host == "here",
        )  # fmt: skip

    def answer(self, worker: str, order: Message) -> Message | None:
        """The worker's report on an order, if it makes one."""
        match order:
            case msg.Attach(decode, epoch):
                return msg.Attached(decode, epoch, "tcp", 1.0, "")
            case msg.Reserve(run, tokens):
                return msg.Reserved(self._grant(worker, run, tokens))
            case msg.Fill(grant):
                return msg.Filled(grant.run, Receipt(0, b"", 0.0, "tcp"), 0.0)
            case msg.Drop(run):
                return msg.Released(run)
            case msg.Start(run, token_ids) if worker in self.decoding:
                self.decoding[worker][run] = len(token_ids)
            case msg.Cancel(run) if worker in self.decoding:
                self.decoding[worker].pop(run, None)
        return None

    def _grant(self, worker: str, run: str, tokens: int) -> Grant:
        """Blocks are taken in turn, and never given back: the router cannot tell."""
        count = -(-tokens // BLOCK)
        first = self._generation * count % (self._pool - count)
        self._generation += 1
        return Grant(
            worker, f"{worker}/0", run, self._generation, tuple(range(first, first + count))
        )

    def decode(self, worker: str, each: int) -> msg.Decoded | None:
        """`each` new tokens of each of the worker's runs."""
        runs, reported = self.decoding[worker], []
        for run, position in runs.items():
            ages = tuple(TURN_S * (each - 1 - i) for i in range(each)) if each > 1 else ()
            reported.append(msg.RunTokens(run, position, (7,) * each, ages=ages))
            runs[run] = position + each
        return msg.Decoded(tuple(reported)) if reported else None


def submission(number: int, prompt: int, new: int) -> msg.Submit:
    """A request with a prompt of its own. `prompt` and `new` are tokens."""
    ids = tuple(1 + (number * 7919 + i) % 50_000 for i in range(prompt))
    return msg.Submit(f"request-{number}", ids, GenerationParams(new, GREEDY, ignore_eos=True))


def pretend_router(
    running: int, clock: Callable[[], float], *, cores: int = 0, tokenizer: Tokenizer | None = None,
    policy: RolePolicy = RolePolicy.SPLIT,
) -> Router:  # fmt: skip
    """A real router. `running`: requests on workers at most."""
    served = Served("pretend", "pretend", Limits(1 << 20, VOCABULARY), (0,), GREEDY)
    rules = Rules(batch_size=running, window_s=0.0, token_budget=8192, role_policy=policy)
    identity = Identity("router/1", "here", 1, tuple(range(cores)))
    return Router(identity, served, tokenizer or Words(), rules, clock)


def pool_for(workers: int, running: int, tokens: int) -> int:
    """Blocks of each decode worker, so that none is ever full. `tokens`: of each request."""
    return 2 * (running // max(1, workers // 2) + 1) * (tokens // BLOCK + 2)


class PretendCluster:
    """Router and workers. `prompt` and `new` are tokens of each request."""

    def __init__(
        self, workers: int, running: int, *, prompt: int, new: int, near: bool = False,
        tokenizer: Tokenizer | None = None, policy: RolePolicy = RolePolicy.SPLIT,
    ) -> None:  # fmt: skip
        """`running`: requests on workers at most. `near`: the workers share the router's host, and its
        cores."""
        self.now = 0.0
        self.router = pretend_router(
            running, lambda: self.now, cores=2 * workers, tokenizer=tokenizer, policy=policy
        )
        self.spent: dict[str, float] = defaultdict(float)  # CPU seconds by kind of work
        self.calls: dict[str, int] = defaultdict(int)
        pool = pool_for(workers, running, prompt + new)
        self.workers = PretendWorkers(workers, pool, host="here" if near else "there")
        self.decoding = self.workers.decoding
        self._prompt, self._new = prompt, new
        self._submitted = 0
        self._next_beat = 0.0
        paces = Paces(Pace(0.01, 0.0001), 2 if near else 0)
        self._told = paces.report(), paces.idle, paces.requests
        self._replies: deque[tuple[str, Message]] = deque()
        for hello in self.workers.hellos():
            self.handle(hello.worker, hello, "join")
        self.answer_all()

    # ---- the router's work, counted

    def handle(self, sender: str, message: Message, kind: str) -> None:
        """The router handles a message."""
        router, now = self.router, self.now
        self._counted(kind, lambda: router.handle(sender, message, now))

    def step(self, kind: str) -> None:
        """One step, after some virtual time."""
        self.now += TURN_S
        if self.now >= self._next_beat:
            self._next_beat = self.now + BEAT_S
            for name in (*self.decoding, *self.workers.filling):
                beat = msg.Heartbeat(f"{name}/0", 1, None, *self._told)
                self.handle(name, beat, "beat")
        router, now = self.router, self.now
        self._counted(kind, lambda: router.step(now), lambda: router.due(now))

    def _counted(
        self, kind: str, work: Callable[[], list[Effect]], *more: Callable[[], object]
    ) -> None:
        began = time.process_time()
        effects = work()
        for each in more:
            each()
        self.spent[kind] += time.process_time() - began
        self.calls[kind] += 1
        for effect in effects:
            if isinstance(effect, To):
                answer = self.workers.answer(effect.peer, effect.message)
                if answer is not None:
                    self._replies.append((effect.peer, answer))

    # ---- what happens

    def answer_all(self, kind: str = "start") -> None:
        """Until the workers have nothing left to report, one step after all that came together."""
        self.step(kind)
        while self._replies:
            for _ in range(len(self._replies)):
                self.handle(*self._replies.popleft(), kind)
            self.step(kind)

    def submit(self, count: int, kind: str) -> None:
        """So many new requests."""
        for _ in range(count):
            self._submitted += 1
            self.handle(CLIENT, submission(self._submitted, self._prompt, self._new), kind)

    def tokens(self, worker: str, each: int, kind: str) -> int:
        """A decode worker reports `each` new tokens of each of its runs. Returns how many tokens."""
        decoded = self.workers.decode(worker, each)
        if decoded is None:
            return 0
        self.handle(worker, decoded, kind)
        return len(decoded.runs) * each

    def finish(self, worker: str, kind: str) -> None:
        """The worker's oldest run ends with one more token."""
        run, position = next(iter(self.decoding[worker].items()))
        del self.decoding[worker][run]
        tokens = msg.RunTokens(run, position, (7,), "stop")
        self.handle(worker, msg.Decoded((tokens,)), kind)

    def decide(self) -> float:
        """CPU seconds of the decision who would fill the prompt of the oldest run, by its figures."""
        entry = self.router.ledger.in_state(State.DECODING)[0]
        roles = self.router._scheduler.roles
        began = time.process_time()
        decision = roles.decide(entry, self.now, alone=False)
        took = time.process_time() - began
        assert decision.cause in (Cause.TTFT, Cause.ITL, Cause.WAITING), decision
        return took

    def kill(self, worker: str, kind: str) -> None:
        """The process of a decode worker dies."""
        del self.decoding[worker]
        self.handle(worker, msg.Exited(worker), kind)
