"""A whole cluster inside one function, like tests/pure/town.py, but with real tensors: a real model,
real pools, real transfer links, the real sampler. Messages go through the real codec.

What it adds to the pretend town: it takes note of the way every request took, and it looks at the
pools themselves: when a run speaks its first token, its blocks must be stamped as filled under its
very grant.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
import zmq

from baton.grammar import Grammars
from baton.kv.region import Receipt, Region
from baton.pace import Pace
from baton.params import Limits
from baton.transfer.courier import Courier
from baton.transfer.slabs import allocate_slabs
from baton.wire import messages as msg
from baton.wire.messages import Message
from baton.wire.node import ROUTER, Effect, Node
from baton.wire.paces import Paces
from decode_worker.decoding import Decoding
from decode_worker.worker import DecodeWorker
from prefill_worker.filling import Filling
from prefill_worker.worker import PrefillWorker
from router.admission import Served
from router.batching import Rules
from router.router import Identity, Router
from sampler.params import SamplingParams
from tests.cluster.reference import Model
from tests.pure.town import Town

WHOLE = 2048  # tokens of one forward: every prompt here goes in one chunk
UNTIMED = Pace(1e-9, 1e-9)  # so fast that the tokens of a forward limit it, not its time


@dataclass
class Way:
    """The way one request took, its last run."""

    filled_by: str = ""
    decoded_by: str = ""
    receipt: Receipt | None = None
    known: int = 0  # tokens at its start: prompt, and what an earlier run had said
    spoken: bool = False
    runs: list[str] = field(default_factory=list)


class Beside:
    """A prefill worker's node that works in a thread, while the owners of the pools go on taking in
    what it sends: as in a process of its own. One thing at a time all the same. A link that it is told to
    open is open, or has failed, before the town goes on: the router gives work to the first that is."""

    def __init__(self, inner: Node, town: "RealTown") -> None:
        self.inner, self.town = inner, town

    def handle(self, sender: str, message: Message, now: float) -> list[Effect]:
        effects = self.town.beside(lambda: self.inner.handle(sender, message, now))
        if isinstance(message, msg.Attach):
            self.town.let_couriers_work()
        return effects

    def step(self, now: float) -> list[Effect]:
        return self.town.beside(lambda: self.inner.step(now))

    def due(self, now: float) -> float:
        return self.inner.due(now)


class RealTown(Town):
    """Router, prefill and decode workers of one model. Close it."""

    def __init__(
        self,
        model: Model,
        *,
        prefills: int = 1,
        decodes: int = 1,
        transport: str = "shm",
        chunk: int = WHOLE,
        batch_size: int = 8,
        local_tokens: int = 0,
        eos: tuple[int, ...] = (),
        blocks: int = 64,
    ) -> None:
        self.model, self.eos = model, eos
        self.transport = transport
        self.ways: dict[str, Way] = defaultdict(Way)
        self.finished: dict[str, msg.Finished] = {}
        self.fillings: dict[str, Filling] = {}
        self.decodings: dict[str, Decoding] = {}
        self._buried: list[Filling] = []  # of killed workers: their sockets are ours to close
        self._folder = tempfile.TemporaryDirectory(prefix="baton-town-")  # of mode 0700
        self._thread = ThreadPoolExecutor(1)
        rules = Rules(batch_size, 0.01, 8192, colocated=prefills == 0, local_tokens=local_tokens)
        super().__init__(
            prefills=prefills, decodes=decodes, blocks=blocks, rules=rules, prefill_budget=chunk
        )
        self.before = self._take_note

    # ---- processes

    def start_router(self) -> None:
        self._boots += 1
        files = self.model.files
        limits = Limits(files.max_positions, files.vocab_size)
        default = SamplingParams.from_generation_config(files.generation_config)
        served = Served(files.name, files.fingerprint, limits, self.eos, default, files.rope)
        identity = Identity(f"router/{self._boots}", "here", 1)
        self.router = Router(identity, served, self.model.tokenizer, self.rules, lambda: self.now)
        self.nodes[ROUTER] = self.router

    def start_worker(self, role: str, index: int) -> str:
        self._boots += 1
        name, engine = f"{role}-{index}.{self._boots}", self.model.engine
        regions = self._open_pool(name) if role == "decode" else ()
        hello = msg.Hello(
            role=role, worker=name, epoch=f"{name}/0", protocol=msg.PROTOCOL, host="here",
            pid=1000 + self._boots, device="cpu", model=self.model.files.fingerprint,
            dtype=engine.dtype, layout=engine.layout.fingerprint,
            block_size=engine.layout.block_size, block_bytes=engine.layout.block_bytes,
            blocks=self._blocks if role == "decode" else 0, regions=regions,
            patience_s=self._patience, load_s=0.0,
        )  # fmt: skip
        if role == "decode":
            files = self.model.files
            grammars = Grammars(files.tokenizer_file, files.vocab_size, self.eos)
            self.nodes[name] = DecodeWorker(
                *(hello, self.decodings[name], self._budget),
                grammars=grammars,
                paces=Paces(UNTIMED),
                rope=files.rope,
            )
            return name
        self.fillings[name] = Filling(
            engine, writer=name, transport=self.transport, scratch_tokens=1024, keys=None
        )
        node = PrefillWorker(
            hello, self.fillings[name], token_budget=self._budget, paces=Paces(UNTIMED)
        )
        self.nodes[name] = node if self.transport == "shm" else Beside(node, self)
        return name

    def _open_pool(self, name: str) -> tuple[Region, ...]:
        engine = self.model.engine
        slabs = allocate_slabs(engine.layout, self._blocks, "cpu", shared=True)
        for slab in slabs.tensors[:-1]:  # what nobody wrote is not a number: reading it would show
            slab.view(torch.float32).fill_(float("nan"))
        self.decodings[name] = Decoding(
            engine,
            slabs,
            kinds=[self.transport],
            run_dir=Path(self._folder.name),
            bind_host=None,
            keys=None,
        )
        return self.decodings[name].renew_epoch(f"{name}/0")

    def kill(self, name: str, *, restart: bool = True) -> None:
        super().kill(name, restart=restart)
        if name in self.decodings:
            self.decodings.pop(name).close()
        if name in self.fillings:
            self._buried.append(self.fillings.pop(name))

    def beside(self, work: Callable[[], list[Effect]]) -> list[Effect]:
        """Run it in the thread; until it is done, every owner takes in what arrives."""
        future: Future[list[Effect]] = self._thread.submit(work)
        while wait([future], timeout=0.0005).not_done:
            for decoding in self.decodings.values():
                decoding.poll()
        return future.result()

    def turn(self) -> None:
        for name, node in self.nodes.items():  # bytes travel in real time, all else does not
            if isinstance(node, DecodeWorker) and node.arriving:
                sockets = [s for e in self.decodings[name]._exports for s in e.wakeups()]
                if sockets:
                    zmq.select(sockets, [], [], 1.0)
        self.let_couriers_work()
        super().turn()

    def let_couriers_work(self) -> None:
        """Until each has news or is idle; its deadlines end this. Sockets do not tell of its news."""
        sockets = [s for e in self.decodings.values() for x in e._exports for s in x.wakeups()]
        ways = [way.link for f in self.fillings.values() for way in f._ways._ways.values()]
        couriers = [link for link in ways if isinstance(link, Courier)]
        while any(each._owing > 0 and not each._news for each in couriers):
            zmq.select(sockets, [], [], 0.0005)
            for decoding in self.decodings.values():
                decoding.poll()

    # ---- what is seen

    def _take_note(self, sender: str, receiver: str, message: Message) -> None:
        match message:
            case msg.Filled(run, receipt) if receiver == ROUTER:
                way = self.ways[run.partition("#")[0]]
                way.filled_by, way.receipt = sender.partition(".")[0], receipt
            case msg.Start():
                way = self.ways[message.run.partition("#")[0]]
                way.decoded_by, way.spoken = receiver.partition(".")[0], False
                way.known = len(message.token_ids)
                way.runs.append(message.run)
                if message.receipt is None:
                    way.filled_by, way.receipt = "", None
            case msg.Decoded(runs) if sender in self.nodes:
                for said in runs:
                    self._check_stamps(sender, said.run)
            case msg.Finished(request):
                self.finished[request] = message

    def _check_stamps(self, worker: str, run: str) -> None:
        """A run that speaks for the first time: filled blocks carry its generation, no other does."""
        way = self.ways[run.partition("#")[0]]
        node = self.nodes[worker]
        assert isinstance(node, DecodeWorker)
        if way.spoken or run not in node.runs:
            return
        way.spoken = True
        state = node.runs[run]
        stamps = self.decodings[worker]._pool.stamps[list(state.grant.blocks)].tolist()
        layout = self.model.engine.layout
        filled = layout.blocks_for(way.known - 1) if way.receipt is not None else 0
        filled = max(0, filled - len(state.grant.prefix))
        expected = [state.grant.generation] * filled + [0] * (len(stamps) - filled)
        assert stamps == expected, f"{run}: stamps {stamps}, expected {expected}"

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        length: int,
        sampling: Sequence[SamplingParams] | None = None,
        *,
        clean: bool = True,
        **options: object,
    ) -> list[list[int]]:
        """Tokens for all prompts, sent at once. Afterwards all is at rest. `clean`: nothing was ever
        dropped either."""
        names = [f"q{i}" for i in range(len(prompts))]
        chosen = sampling or [SamplingParams(temperature=0)] * len(prompts)
        for name, prompt, params in zip(names, prompts, chosen, strict=True):
            self.submit(name, prompt, length, sampling=params, **options)
        self.run_all(names)
        self.check_clean(nothing_dropped=clean)
        for name in names:
            assert self.outcomes[name].ends in (["length"], ["stop"]), self.outcomes[name]
        return [self.outcomes[name].tokens for name in names]

    def check_clean(self, *, nothing_dropped: bool = True) -> None:
        """No block held anywhere, nothing half sent."""
        for filling in self.fillings.values():
            scratch = filling._scratch
            if scratch is not None:
                assert scratch.held == {}
                scratch.table.check()
                assert scratch.table.idle
        for decoding in self.decodings.values():
            for export in decoding._exports:
                assert not (nothing_dropped and export.dropped), export.dropped

    def close(self) -> None:
        self.beside(self._hang_up)
        self._thread.shutdown()
        for decoding in self.decodings.values():
            decoding.close()
        self._folder.cleanup()

    def _hang_up(self) -> list[Effect]:
        for filling in (*self.fillings.values(), *self._buried):
            for worker in list(filling._ways._ways):
                filling.detach(worker)
        return []

    def __enter__(self) -> "RealTown":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
