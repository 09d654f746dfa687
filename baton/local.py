"""LocalCluster: the router, the prefill and decode workers and the model in this one process.

    submit() -> | router | <-> | prefill-0 |        one queue of messages, no sockets, no threads
    poll()   <- |        | <-> | decode-0  |        one model, one KV pool, written in place

The nodes are those that the processes run (`python -m router`, ...). Only what surrounds them differs:
messages wait in a queue instead of a socket, and step() delivers one of them or lets one node work.

    cluster = LocalCluster(LocalOptions("demo"))
    cluster.submit(Submit("r1", "In the future", GenerationParams(4)))
    while (done := cluster.step()) is not None:
        print(done)                     # router -> decode-0: Reserve; prefill-0 works; ...
    print(cluster.poll(0))

Loading. On a CPU the model is mapped from the store of compiled models (baton/engine/cpu/store.py): no
checkpoint is read, transformers is not imported, and the first token comes some 0.3 s after torch is
imported. Where the store lacks it, the constructor compiles it, as a worker process would: seconds for
a small model, once for each model and dtype, and about 10 s more for the C++ library, once for each
machine. Compiling is not put off until later: tokens are then the same in the first session and in
all others. Without a C++ compiler the model runs in torch, at the price of importing transformers.
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from baton.clock import Clock, monotonic
from baton.dtypes import DTYPES, KV_DTYPES
from baton.engine.boot import Engine, boot
from baton.engine.pool import decode_pool_blocks, spare_blocks
from baton.errors import InputError, ProtocolError
from baton.grammar import Grammars
from baton.kv.region import Region
from baton.model_files import ModelFiles, resolve_model
from baton.text import Tokenizer
from baton.transfer.base import Link
from baton.transfer.in_place import InPlaceExport, InPlaceLink
from baton.transfer.slabs import allocate_slabs
from baton.wire import messages as msg
from baton.wire.messages import Message
from baton.wire.node import ROUTER, Effect, Node, Stop, To
from baton.wire.paces import Paces
from decode_worker.decoding import Decoding
from decode_worker.worker import DecodeWorker
from prefill_worker.filling import Filling
from prefill_worker.worker import PrefillWorker
from router.admission import Served
from router.batching import Rules
from router.router import Identity, Router

CLIENT = "client"
HOST = "local"
BLOCK_SIZE = 16
FILL_TOKENS = 8192  # in one batch of prompts, as of `python -m router`
PATIENCE_S = 86_000.0  # workers share our thread: they cannot stall while the router goes on


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """`prefills` 0: decode fills its own blocks. Each decode worker has a pool of its own, for
    `max_num_seqs` sequences of the longest length, or as much of that as fits the memory."""

    model: str = "demo"
    device: str = "auto"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    prefills: int = 1
    decodes: int = 1
    max_num_seqs: int = 64
    max_model_len: int | None = None
    kv_cache_memory_bytes: int | None = None
    max_num_batched_tokens: int = 2048
    prefix_caching: bool = True
    lora: tuple[str, ...] = ()  # adapters, NAME=FOLDER each
    download: bool = False

    def __post_init__(self) -> None:
        if self.prefills < 0 or self.decodes < 1:
            raise InputError(
                f"there must be at least one decode worker and no fewer than 0 prefill workers, got "
                f"{self.decodes} and {self.prefills}"
            )
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        for name, known in (("dtype", DTYPES), ("kv_cache_dtype", KV_DTYPES)):
            if (given := getattr(self, name)) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {given!r}")


@dataclass(frozen=True, slots=True)
class Delivered:
    """A node, or the client, has taken in a message."""

    sender: str
    receiver: str
    message: Message

    def __str__(self) -> str:
        return f"{self.sender} -> {self.receiver}: {type(self.message).__name__}"


@dataclass(frozen=True, slots=True)
class Worked:
    """A node has done one unit of its own work: a round of planning, or one forward."""

    node: str

    def __str__(self) -> str:
        return f"{self.node} works"


class LocalCluster:
    """Ready to work when it is constructed. Use it from one thread, the one that constructed it.

    Its clock runs in step() and while poll() waits, and stops in between, so pauses in a debugger or
    between requests cause no timeouts. A long forward or a breakpoint may let it jump within a step,
    which causes none either: the router runs first, so a running worker has just heard from it. The
    deadlines of a Submit count its time alone."""

    idle_s: float | None = None  # for RequestThread: without requests there is nothing to do

    def __init__(self, options: LocalOptions, *, clock: Clock = monotonic) -> None:
        """Raises ModelError, InputError, OutOfMemory."""
        self._clock = clock
        self._spent_s = 0.0  # in steps and waits
        self._now = 0.0  # the time passed to the nodes
        self._mail: deque[tuple[str, str, Message]] = deque()
        self._inbox: list[Message] = []
        self._heard: set[str] = set()  # nodes that have taken in messages since they last worked
        self._planned = False  # the router has run in this round; next comes a worker
        self._decodings: dict[str, Decoding] = {}
        files = resolve_model(options.model, download=options.download).with_lora(options.lora)
        self.tokenizer = Tokenizer(files.tokenizer_file)  # first: it takes less time to be wrong
        engine = boot(
            files,
            device=options.device,
            dtype=options.dtype,
            kv_dtype=options.kv_cache_dtype,
            block_size=BLOCK_SIZE,
        )
        self.router = self._make_router(options, files)
        self.nodes: dict[str, Node] = {ROUTER: self.router}
        try:
            for index in range(options.decodes):
                self._add_decode(f"decode-{index}", options, engine, files)
            for index in range(options.prefills):
                self._add_prefill(f"prefill-{index}", options, engine, files)
            self._workers = deque(name for name in self.nodes if name != ROUTER)
            while self.step() is not None:  # until all have joined and are attached
                pass
            if why := self.info().waiting_for:
                raise ProtocolError(f"the workers cannot work together: {why}")
        except BaseException:
            self.close()
            raise

    # ---- for clients: the calls of baton.client.blocking.Client

    def info(self) -> msg.ClusterInfo:
        """What is served."""
        return self.router.info(self._now)

    def submit(self, *requests: msg.Submit) -> None:
        """Put requests into the router's queue."""
        self._mail += [(CLIENT, ROUTER, each) for each in requests]

    def abort(self, request: str) -> None:
        """End a request: Finished(reason="abort") comes through poll()."""
        self._mail.append((CLIENT, ROUTER, msg.Abort(request)))

    def poll(self, timeout_s: float) -> list[Message]:
        """Work until there is something for the client, then return all there is; empty after about
        `timeout_s`. What a node raises is raised here, and the cluster is of no more use then."""
        deadline = self._clock() + timeout_s
        while not self._inbox:
            if self.step() is None:
                began = self._clock()
                time.sleep(max(0.0, min(self._wait_s(), deadline - began)))
                self._spent_s += self._clock() - began
            if self._clock() >= deadline and not self._mail:
                break
        inbox, self._inbox = self._inbox, []
        return inbox

    def close(self) -> None:
        """Give the KV pools back."""
        for decoding in self._decodings.values():
            decoding.close()
        self._decodings.clear()

    # ---- one step

    def step(self) -> Delivered | Worked | None:
        """Deliver the oldest message; if there is none, let the next node work. None: every node
        waits for time to pass, which poll() lets it."""
        began = self._clock()
        done = self._step()
        self._spent_s += self._clock() - began
        if isinstance(done, Worked) and done.node != ROUTER:
            self._now = self._spent_s  # a forward takes time, and its reports come after it
        return done

    def _step(self) -> Delivered | Worked | None:
        if self._mail:
            return self._deliver(*self._mail.popleft())
        if self._planned:
            self._planned = False
            if (worker := self._next_worker()) is not None:
                return self._work(worker)
        self._now = self._spent_s
        if self._wait_s() > 0:
            return None
        self._planned = True
        return self._work(ROUTER)

    def _deliver(self, sender: str, receiver: str, message: Message) -> Delivered:
        if receiver == CLIENT:
            each = message.emitted if isinstance(message, msg.Emissions) else (message,)
            self._inbox += each
        else:
            self._heard.add(receiver)
            self._carry_out(receiver, self.nodes[receiver].handle(sender, message, self._now))
        return Delivered(sender, receiver, message)

    def _work(self, name: str) -> Worked:
        self._heard.discard(name)
        self._carry_out(name, self.nodes[name].step(self._now))
        return Worked(name)

    def _carry_out(self, node: str, effects: Sequence[Effect]) -> None:
        """Nodes of one process end together, so there is nothing to Watch."""
        for effect in effects:
            if isinstance(effect, To):
                self._mail.append((node, effect.peer, effect.message))
            elif isinstance(effect, Stop):
                raise ProtocolError(f"{node} stops: {effect.why}")

    def _next_worker(self) -> str | None:
        """The workers take turns; one that has nothing to do is passed over."""
        for _ in range(len(self._workers)):
            self._workers.rotate(-1)
            if self._due(name := self._workers[-1]) <= 0:
                return name
        return None

    def _due(self, name: str) -> float:
        return 0.0 if name in self._heard else self.nodes[name].due(self._now)

    def _wait_s(self) -> float:
        """Seconds until a node has something to do."""
        return min(self._due(name) for name in self.nodes)

    # ---- nodes: what router/__main__.py and the workers' process.py do for a process each

    def _make_router(self, options: LocalOptions, files: ModelFiles) -> Router:
        rules = Rules(options.max_num_seqs, 0.0, FILL_TOKENS, colocated=options.prefills == 0)
        served = Served.of(files, options.max_model_len)
        identity = Identity(f"{ROUTER}/0", HOST, os.getpid())
        return Router(identity, served, self.tokenizer, rules, self._clock)

    def _add_decode(
        self, name: str, options: LocalOptions, engine: Engine, files: ModelFiles
    ) -> None:
        tokens = options.max_num_seqs * files.context(options.max_model_len)
        blocks = decode_pool_blocks(
            engine.layout, engine.device, options.kv_cache_memory_bytes, tokens
        )
        slabs = allocate_slabs(engine.layout, blocks, engine.device, shared=False)
        decoding = Decoding(
            *(engine, slabs),
            kinds=(),
            run_dir=None,
            bind_host=None,
            keys=None,
            export=lambda epoch: InPlaceExport(slabs, epoch=epoch),
        )
        self._decodings[name] = decoding
        regions = decoding.renew_epoch(f"{name}/0")
        granted = blocks - spare_blocks(engine.device)
        hello = _hello("decode", name, engine, files, blocks=granted, regions=regions)
        self.nodes[name] = DecodeWorker(
            *(hello, decoding, options.max_num_batched_tokens),
            prefix_caching=options.prefix_caching,
            grammars=Grammars(files.tokenizer_file, files.vocab_size, files.eos_token_ids),
            vocabulary=files.vocab_size,
            paces=Paces(engine.pace),
            rope=files.rope,
        )

    def _add_prefill(
        self, name: str, options: LocalOptions, engine: Engine, files: ModelFiles
    ) -> None:
        filling = Filling(
            engine,
            writer=name,
            transport="auto",
            scratch_tokens=0,
            keys=None,
            open_link=self._link_to,
        )
        self.nodes[name] = PrefillWorker(
            _hello("prefill", name, engine, files),
            filling,
            token_budget=options.max_num_batched_tokens,
            vocabulary=files.vocab_size,
            paces=Paces(engine.pace),
        )

    def _link_to(self, worker: str, epoch: str, regions: Sequence[Region]) -> Link:
        slabs = self._decodings[worker].slabs
        return InPlaceLink(slabs.layout, slabs.tensors, epoch=epoch)


def _hello(
    role: str,
    name: str,
    engine: Engine,
    files: ModelFiles,
    *,
    blocks: int = 0,
    regions: tuple[Region, ...] = (),
) -> msg.Hello:
    return msg.Hello(
        role=role,
        worker=name,
        epoch=f"{name}/0",
        protocol=msg.PROTOCOL,
        host=HOST,
        pid=os.getpid(),
        device=str(engine.device),
        model=files.fingerprint,
        adapters=files.adapters,
        dtype=engine.dtype,
        kv_dtype=engine.layout.dtype,
        layout=engine.layout.fingerprint,
        block_size=engine.layout.block_size,
        block_bytes=engine.layout.block_bytes,
        blocks=blocks,
        regions=regions,
        patience_s=PATIENCE_S,
        load_s=0.0,
        how=engine.runner.backend,
    )
