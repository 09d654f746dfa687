"""A whole cluster inside one function: the real nodes, a pretend model, a pretend network and clock.

The pretend KV cache holds token ids where a real one holds keys and values, and the pretend model's
next token is a hash of every token it reads through the block table. So a block that was not filled,
filled late, or overwritten by somebody else changes the answer, exactly as in the real thing.
"""

import hashlib
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from baton.adapters.changes import Entry
from baton.adapters.identity import Adapter
from baton.errors import ModelError, TransferError
from baton.grammar import Grammars
from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt, Region
from baton.kv.row import Logits, Row
from baton.params import GenerationParams, Limits
from baton.rope import FIXED, RopeRule
from baton.wire import messages as msg
from baton.wire.codec import decode, encode
from baton.wire.node import ROUTER, Node, Stop, To, Watch
from baton.wire.records import Logprob
from decode_worker.model import Draw, Drawn
from decode_worker.speculation import Proposer, Speculation
from decode_worker.worker import DecodeWorker
from prefill_worker.model import Chunk, News
from prefill_worker.worker import PrefillWorker
from router.admission import Served
from router.batching import Rules
from router.catalog import Catalog
from router.router import Identity, Router
from sampler.params import SamplingParams

BLOCK = 4
VOCABULARY = 997
EOS = 0
CORES = (0, 1, 2, 3)  # of the one machine
GREEDY = SamplingParams(temperature=0.0)


def next_token(context: Sequence[int]) -> int:
    """What the pretend model says after this context; never EOS but by chance of the hash."""
    digest = hashlib.blake2b(repr(list(context)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % VOCABULARY


def calm_answer(
    prompt: Sequence[int], length: int, rope: RopeRule = FIXED, adapter: str = ""
) -> tuple[list[int], str]:
    """Tokens and finish reason of an undisturbed run: transformers' generate() of the pretend model, one
    forward for the prompt and one for each token. A forward's frequencies are those of its length."""
    known, cache = list(prompt), []
    for _ in range(length):
        if rope.recomputes and any(len(cache) <= limit < len(known) for limit in rope.switches):
            cache = []
        frequencies = rope.effective(len(known))
        cache += [cell(token, frequencies, adapter) for token in known[len(cache) :]]
        known.append(next_token(cache))
        if known[-1] == EOS:
            return known[len(prompt) :], "stop"
    return known[len(prompt) :], "length"


def cell(token: int, frequencies: int, adapter: str = "") -> int:
    """What the pretend KV cache holds for a token that was computed with these rotary frequencies and
    this adapter, whose digest is a hexadecimal number."""
    return token + VOCABULARY * (frequencies + (int(adapter or "0", 16) << 32))


class Killed(Exception):
    """A process died in the middle of its step."""


@dataclass
class Memory:
    """One decode worker's pool: reachable by name, gone when its process is."""

    cells: dict[tuple[int, int], int] = field(default_factory=dict)  # (block, offset) -> token id
    stamps: dict[int, int] = field(default_factory=dict)

    def write(self, blocks: Sequence[int], position: int, token: int) -> None:
        self.cells[blocks[position // BLOCK], position % BLOCK] = token

    def read(self, blocks: Sequence[int], position: int) -> int | None:
        return self.cells.get((blocks[position // BLOCK], position % BLOCK))


class PretendReading:
    """Takes until the town's clock moves, and fails if there is no such folder by then."""

    def __init__(self, shelf: "PretendShelf", entry: Entry) -> None:
        self.shelf, self.entry = shelf, entry
        self.began = shelf.town.now

    @property
    def done(self) -> bool:
        return self.shelf.town.now > self.began

    def add(self) -> None:
        adapter, town = self.entry.adapter, self.shelf.town
        if adapter not in town.adapters and adapter.digest not in town.folders:
            raise ModelError(f"adapter {adapter.name}: there is no folder {self.entry.path}")
        self.shelf.holds.add(adapter.digest)

    def give_up(self) -> None:
        self.shelf.given_up += 1


class PretendShelf:
    """The adapters of one worker. Its rows may name no others."""

    def __init__(self, town: "Town") -> None:
        self.town = town
        self.holds = {each.digest for each in town.adapters}
        self.given_up = 0

    def read(self, entry: Entry) -> PretendReading:
        return PretendReading(self, entry)

    def drop(self, digest: str) -> None:
        self.holds.remove(digest)


class PretendTokenizer:
    """Words are ids."""

    longest_token = 4
    falls_back = cleans_up = False

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return "".join(f"{i} " for i in ids)

    decode_whole = decode_loose = decode_whole_loose = decode


class PretendPrefill:
    """Writes token ids straight into the memory of the decode worker it is attached to."""

    def __init__(self, town: "Town") -> None:
        self.town = town
        self.shelf = PretendShelf(town)
        self.pools: dict[str, Memory] = {}
        self.pooled: dict[str, list[int]] = {}  # tokens of embeddings, by run

    def attach(self, worker: str, epoch: str, regions: Sequence[Region]) -> msg.Attached:
        if worker not in self.town.memories:
            raise TransferError(f"no memory of {worker}")
        self.pools[worker] = self.town.memories[worker]
        return msg.Attached(worker, epoch, self.town.transport, 0.0, "")

    def detach(self, worker: str) -> None:
        self.pools.pop(worker, None)

    def poll(self) -> list[News]:
        return []

    waits = False

    def takes(self, worker: str) -> bool:
        return True

    def admit(self, grant: Grant, tokens: int, block_hashes: Sequence[bytes] = ()) -> bool:
        if grant.worker not in self.pools:
            raise TransferError(f"not attached to {grant.worker}")
        return True

    def known(self, grant: Grant) -> int:
        return len(grant.prefix) * BLOCK

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            given = chunk.token_ids, chunk.start, chunk.rope_floor, chunk.adapter
            assert chunk.adapter in ("", *self.shelf.holds)
            cells = self.town.cells(*given)
            for offset, token in enumerate(cells):
                self.pools[worker].write(chunk.grant.table, chunk.start + offset, token)
            if chunk.pooling:
                self.pooled.setdefault(chunk.grant.run, []).extend(chunk.token_ids)
            first = self.pools[worker].read(chunk.grant.table, 0)
            self.town.survive("prefill", first, chunk.start + len(chunk.token_ids))

    def finish(self, grant: Grant, tokens: int) -> Receipt:
        for block in grant.table[len(grant.prefix) : -(-tokens // BLOCK)]:
            self.pools[grant.worker].stamps[block] = grant.generation
        damaged = self.town.damage and self.town.damage(grant)
        if damaged:
            self.pools[grant.worker].stamps[grant.blocks[0]] = -1
        return Receipt(0, b"", 0.0, "shm")

    def embedded(self, grant: Grant) -> bytes:
        return array("f", self.pooled.pop(grant.run)).tobytes()

    def abandon(self, grant: Grant) -> None:
        self.pooled.pop(grant.run, None)

    def use_cores(self, cores: tuple[int, ...]) -> None:
        self.cores = cores

    def clock(self) -> float:
        return self.town.now


class PretendDecode:
    """Reads the context through the block table and hashes it."""

    def __init__(self, town: "Town", memory: Memory) -> None:
        self.town = town
        self.shelf = PretendShelf(town)
        self.memory = memory

    def expect(self, grant: Grant) -> None:
        for block in grant.blocks:
            self.memory.stamps[block] = 0

    def poll(self) -> bool:
        return False

    def arrival(self, grant: Grant, receipt: Receipt, tokens: int) -> Arrival:
        filled = grant.table[len(grant.prefix) : -(-tokens // BLOCK)]
        good = all(self.memory.stamps.get(block) == grant.generation for block in filled)
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
        self.cores = cores

    def clock(self) -> float:
        return self.town.now

    def step(self, rows: Sequence[Row], draws: Sequence[Draw]) -> list[Drawn | None]:
        contexts: list[list[int]] = []
        for row in rows:
            assert row.adapter in ("", *self.shelf.holds)
            cells = self.town.cells(row.token_ids, row.start, row.rope_floor, row.adapter)
            for offset, token in enumerate(cells):
                self.memory.write(row.blocks, row.start + offset, token)
            self.town.survive("decode", self.memory.read(row.blocks, 0), row.end)
            if row.logits is not Logits.NONE:
                context = [self.memory.read(row.blocks, p) for p in range(row.end)]
                known = [-1 if token is None else token for token in context]
                first = row.start + 1 if row.logits is Logits.ALL else row.end
                contexts += [known[:end] for end in range(first, row.end + 1)]
        return [self.drawn(known, draw) for known, draw in zip(contexts, draws, strict=True)]

    def drawn(self, context: Sequence[int], draw: Draw) -> Drawn | None:
        """The token after this context; None: its logits are no numbers."""
        if context[0] in self.town.poisoned:
            return None
        token = next_token(context)
        return Drawn(token) if draw.given is None else Drawn(draw.given, Logprob(-float(token)))


@dataclass
class Outcome:
    """What the client saw of one request."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ends: list[str] = field(default_factory=list)
    why: str = ""
    cached_tokens: int = 0
    preemptions: int = 0
    logprobs: list[Logprob] = field(default_factory=list)
    scores: tuple[Logprob, ...] = ()
    embedding: bytes = b""


class Town:
    """Real nodes, delivered to one message at a time. `before` runs before each delivery."""

    transport = "shm"
    decode_model = PretendDecode
    prefill_model = PretendPrefill
    grammars: Grammars | None = None  # of decode workers

    def __init__(
        self,
        *,
        prefills: int = 1,
        decodes: int = 1,
        blocks: int = 64,
        rules: Rules | None = None,
        prefill_budget: int = 16,
        decode_budget: int = 16,
        context: int = 512,
        patience_s: float = 0.0,
        proposer: Callable[[], Proposer] | None = None,
        rope: RopeRule = FIXED,
        adapters: tuple[Adapter, ...] = (),
        updates: bool = False,
    ) -> None:
        self.now = 0.0
        self.nodes: dict[str, Node] = {}
        self.memories: dict[str, Memory] = {}
        self.stalled: set[str] = set()
        self.mail: dict[tuple[str, str], deque[bytes | msg.Message]] = defaultdict(deque)
        self.watching: dict[str, set[str]] = defaultdict(set)  # peer -> who wants to know
        self.outcomes: dict[str, Outcome] = defaultdict(Outcome)
        self.infos: list[msg.ClusterInfo] = []
        self.delivered = 0
        self.before: Callable[[str, str, msg.Message], None] | None = None
        self.damage: Callable[[Grant], bool] | None = None
        self.deadly: Callable[[str, int | None, int], bool] | None = None
        self.deaths: list[str] = []  # workers that died of a row
        self.poisoned: set[int] = set()  # contexts that begin so give logits that are no numbers
        self.rules = rules or Rules(batch_size=4, window_s=0.01, token_budget=64)
        self._blocks, self._budget, self._patience = blocks, prefill_budget, patience_s
        self._decode_budget, self._context = decode_budget, context
        self.prefill_models: list[PretendPrefill] = []  # of every worker so far
        self.decode_models: list[PretendDecode] = []
        self._boots = 0
        self._proposer = proposer
        self.rope = rope
        self.adapters = adapters
        self.updates = updates
        self.folders: set[str] = set()  # adapters that can be loaded, by digest
        self.changed: dict[str, msg.AdapterChanged] = {}  # answers, by request
        self.start_router()
        for index in range(prefills):
            self.start_worker("prefill", index)
        for index in range(decodes):
            self.start_worker("decode", index)

    # ---- processes

    def start_router(self) -> None:
        self._boots += 1
        limits = Limits(self._context, VOCABULARY, self.adapters)
        served = Served("pretend", "pretend", limits, (EOS,), GREEDY, self.rope)
        identity = Identity(f"router/{self._boots}", "here", 1, CORES)
        self.router = Router(
            *(identity, served, PretendTokenizer(), self.rules, lambda: self.now, self.catalog())
        )
        self.nodes[ROUTER] = self.router

    def catalog(self) -> Catalog:
        """A new router's."""
        return Catalog(self.adapters, model="pretend", updates=self.updates, most=4)

    def start_worker(self, role: str, index: int) -> str:
        self._boots += 1
        name = f"{role}-{index}.{self._boots}"
        hello = msg.Hello(
            role, name, f"{name}/0", msg.PROTOCOL, "here", 1000 + self._boots, "pretend", "pretend",
            "float32", "layout", BLOCK, BLOCK * 8, self._blocks if role == "decode" else 0, (),
            self._patience, 0.0, takes_cores=True, adapters=self.adapters,
        )  # fmt: skip
        if role == "decode":
            self.memories[name] = Memory()
            model = self.decode_model(self, self.memories[name])
            speculation = Speculation(self._proposer() if self._proposer else None, most=4)
            self.decode_models.append(model)
            node = DecodeWorker(
                *(hello, model, self._decode_budget, speculation),
                grammars=self.grammars,
                rope=self.rope,
            )
            self.nodes[name] = node
        else:
            model = self.prefill_model(self)
            self.prefill_models.append(model)
            node = PrefillWorker(hello, model, token_budget=self._budget)
            self.nodes[name] = node
        if self.updates:
            node.load_from(model.shelf)
        return name

    def kill(self, name: str, *, restart: bool = True) -> None:
        """SIGKILL: what it had sent arrives, what was sent to it does not."""
        self.nodes.pop(name)
        self.stalled.discard(name)
        self.memories.pop(name, None)
        for (_, receiver), queue in self.mail.items():
            if receiver == name:
                queue.clear()
        for watcher in self.watching.pop(name, set()):
            self.mail["kernel", watcher].append(msg.Exited(name))
        if name == ROUTER:
            self.start_router()
        elif restart:
            role, index = name.split(".")[0].split("-")
            self.start_worker(role, int(index))

    def cells(
        self, token_ids: Sequence[int], start: int, rope_floor: int, adapter: str = ""
    ) -> list[int]:
        """What a forward writes for these tokens."""
        if not self.rope.varies:
            return [cell(token, 0, adapter) for token in token_ids]
        lengths = self.rope.lengths(rope_floor, start, start + len(token_ids))
        pairs = zip(token_ids, lengths, strict=True)
        return [cell(token, length, adapter) for token, length in pairs]

    def survive(self, role: str, first: int | None, end: int) -> None:
        """A forward computes a sequence that begins with this token, up to this position: it may be
        one that kills the process."""
        if self.deadly is not None and self.deadly(role, first, end):
            raise Killed

    def step(self, name: str) -> None:
        """One step of a node; what it would have sent is lost if it dies."""
        try:
            effects = self.nodes[name].step(self.now)
        except Killed:
            self.deaths.append(name)
            self.kill(name)
        else:
            self.send(name, effects)

    def terminate(self, name: str, within_s: float = 30.0) -> None:
        """SIGTERM."""
        self.mail["kernel", name].append(msg.Terminate(within_s))

    def workers(self, role: str = "") -> list[str]:
        return [name for name in self.nodes if name != ROUTER and name.startswith(role)]

    # ---- the network

    def send(self, sender: str, effects: Iterable[object]) -> None:
        for effect in effects:
            match effect:
                case To(peer, message):
                    self.mail[sender, peer].append(encode(message))
                case Watch(peer, _):
                    if peer in self.nodes:
                        self.watching[peer].add(sender)
                    else:
                        self.mail["kernel", sender].append(msg.Exited(peer))
                case Stop(0, ""):  # SIGTERM, and nothing left to do
                    self.kill(sender, restart=False)
                case Stop(_, why):
                    raise AssertionError(f"{sender} stopped: {why}")

    def client(self, message: msg.Message, name: str = "client") -> None:
        self.mail[name, ROUTER].append(encode(message))

    def submit(self, request: str, prompt: Sequence[int], length: int, **options: object) -> None:
        self.client(msg.Submit(request, tuple(prompt), GenerationParams(length, **options)))

    def deliver_one(self) -> bool:
        """The next message, the channels taking turns. False: nobody has any."""
        for channel in list(self.mail):
            sender, receiver = channel
            if not self.mail[channel] or receiver in self.stalled:
                continue
            data = self.mail[channel].popleft()
            self.mail[channel] = self.mail.pop(channel)  # to the back of the line
            message = decode(data) if isinstance(data, bytes) else data
            self.delivered += 1
            if self.before is not None:
                self.before(sender, receiver, message)
            if receiver in self.nodes:
                self.send(receiver, self.nodes[receiver].handle(sender, message, self.now))
            elif receiver.startswith("client"):
                self._client_reads(message)
            return True
        return False

    def _client_reads(self, message: msg.Message) -> None:
        match message:
            case msg.PromptScored(request, scores):
                assert not self.outcomes[request].scores, f"{request}: scored twice"
                self.outcomes[request].scores = scores
            case msg.Emissions(emitted):
                for each in emitted:
                    self._client_reads(each)
            case msg.Emitted(request, tokens, text, logprobs, ages):
                assert len(ages) in (0, len(tokens))
                assert all(0 <= later <= age for age, later in pairwise(ages))
                self.outcomes[request].logprobs += logprobs
                assert not self.outcomes[request].ends, f"{request}: tokens after its end"
                self.outcomes[request].tokens += tokens
                self.outcomes[request].text += text
            case msg.Finished(request, reason, timings, _, embedding):
                self.outcomes[request].ends.append(reason)
                self.outcomes[request].embedding = embedding
                self.outcomes[request].cached_tokens = timings.cached_tokens
                self.outcomes[request].preemptions = timings.preemptions
            case msg.Failed(request, code, why):
                self.outcomes[request].ends.append(code)
                self.outcomes[request].why = why
            case msg.ClusterInfo():
                self.infos.append(message)
            case msg.AdapterChanged(request):
                assert request not in self.changed, f"{request}: answered twice"
                self.changed[request] = message

    def turn(self) -> None:
        """Messages first, then everybody's step, then time: the loop of every process, in one."""
        while self.deliver_one():
            pass
        for name in list(self.nodes):
            if name in self.nodes and name not in self.stalled:
                self.step(name)
        if not any(queue for (_, to), queue in self.mail.items() if to not in self.stalled):
            waits = [n.due(self.now) for name, n in self.nodes.items() if name not in self.stalled]
            self.now += max(min(waits), 0.001)

    def run(self, until: Callable[[], bool], turns: int = 4000) -> None:
        for _ in range(turns):
            if until():
                return
            self.turn()
        raise AssertionError(f"nothing came of it in {turns} turns: {dict(self.outcomes)}")

    def run_all(self, requests: Iterable[str]) -> None:
        """Until every request has ended, and what was on its way has arrived."""
        names = list(requests)
        self.run(lambda: all(self.outcomes[name].ends for name in names))
        self.settle()

    def settle(self) -> None:
        """Let everything come to rest: no live request, no block held, no block in quarantine."""
        self.stalled.clear()
        self.run(lambda: self.at_rest(), turns=200)

    def at_rest(self) -> bool:
        tables = [n.table for n in self.nodes.values() if isinstance(n, DecodeWorker)]
        for table in tables:
            table.check()
        quiet = not any(queue for queue in self.mail.values())
        return quiet and len(self.router.ledger) == 0 and all(table.idle for table in tables)
