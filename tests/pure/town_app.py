"""The whole HTTP application over a simulated cluster (town.py), in one process and one event loop.

    a test  --ASGI-->  the application  --ZeroMQ-->  the town's router, prefill and decode workers

Only the model and the clock are simulated. The town runs until every request has ended, then the replies
are sent. So equal requests get equal answers, to the byte. The tokenizer is that of the bundled model.

The town starts when all router requests of one HTTP request have arrived (`submits`). Otherwise the speed
of ZeroMQ would decide which of them are filled together.
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

# ---- the only imports of ours: what a server is put together from (server/run.py does the same)
from baton.client.aio import RouterClient
from baton.grammar import Grammars
from baton.model_files import ModelFiles, resolve_model
from baton.params import Limits
from baton.server.app import make_app
from baton.server.metrics import Metrics
from baton.server.monitor import Monitor
from baton.server.options import ServerSettings
from baton.server.service import GenerationService
from baton.server.templates import ThreadRenderer, read_template
from baton.text import Tokenizer
from baton.wire import messages as msg
from baton.wire.channel import Listener
from baton.wire.node import ROUTER
from baton.wire.records import Logprob
from decode_worker.model import Draw, Drawn
from router.admission import Served
from router.router import Identity, Router
from tests.patience import PATIENCE_S
from tests.pure.town import CORES, GREEDY, PretendDecode, Town, next_token

CONTEXT = 512
JOINING_TURNS = 20  # within them the workers have joined
END = 0
FIRST_WORD, WORDS = 257, 740  # token ids of the bundled model's tokenizer that are whole words
CHATML = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@cache
def pretend_files() -> ModelFiles:
    """The bundled model's tokenizer, under the name that the town's workers say they serve."""
    return replace(resolve_model("demo"), name="pretend", fingerprint="pretend")


@cache
def pretend_tokenizer() -> Tokenizer:
    """The router's. Loaded once."""
    return Tokenizer(pretend_files().tokenizer_file)


@cache
def pretend_grammars() -> Grammars:
    """The decode workers'."""
    files = pretend_files()
    return Grammars(files.tokenizer_file, files.vocab_size, files.eos_token_ids)


class WordyDecode(PretendDecode):
    """Speaks whole words, other ones for each choice, and knows logprobs: exact binary fractions. With a
    grammar it says what the town wants, then the end, where it may."""

    def drawn(self, context: Sequence[int], draw: Draw) -> Drawn | None:
        if draw.given is None and context[0] in self.town.poisoned:
            return None
        token = FIRST_WORD + next_token([draw.sampling.choice, *context]) % WORDS
        if draw.mask is not None:
            token = self.allowed(token, context, int.from_bytes(draw.mask, "little"))
        shown = token if draw.given is None else draw.given
        if draw.logprobs < 0:
            return Drawn(shown)
        tops = range(draw.logprobs)
        value = -(shown % 8) / 4
        chance = Logprob(
            value,
            tuple(FIRST_WORD + (shown - FIRST_WORD + top) % WORDS for top in tops),
            tuple(value - top / 2 for top in tops),
        )
        return Drawn(shown, chance)

    def allowed(self, token: int, context: Sequence[int], mask: int) -> int:
        """The first of these that the mask allows."""
        wants = getattr(self.town, "wants", ())
        said = max(
            k for k in range(len(wants) + 1) if list(wants[:k]) == list(context[len(context) - k :])
        )
        for each in (*wants[said : said + 1], END, token):
            if mask >> each & 1 and (each != END or said == len(wants)):
                return each
        ids = [each for each in range(mask.bit_length()) if mask >> each & 1]
        return ids[token % len(ids)]


class WordyTown(Town):
    """A town with the bundled model's tokenizer. What the router says to its client is kept. `wants`:
    what its model would like to say where a grammar allows it, as ids."""

    decode_model = WordyDecode
    wants: Sequence[int] = ()

    def __init__(self, **options: Any) -> None:
        self.grammars = pretend_grammars()
        self.said: list[msg.Message] = []
        self.open: set[str] = set()
        super().__init__(**options)
        for _ in range(JOINING_TURNS):
            self.turn()

    def start_router(self) -> None:
        self._boots += 1
        files = pretend_files()
        limits = Limits(CONTEXT, files.vocab_size, self.adapters)
        served = Served("pretend", "pretend", limits, files.eos_token_ids, GREEDY)
        identity = Identity(f"router/{self._boots}", "here", 1, CORES)
        self.router = Router(
            *(identity, served, pretend_tokenizer(), self.rules, lambda: self.now, self.catalog())
        )
        self.nodes[ROUTER] = self.router

    def answer(self, asked: Sequence[msg.Message]) -> list[msg.Message]:
        """What the router says until all that was asked for has ended."""
        for message in asked:
            if isinstance(message, msg.Submit | msg.LoadAdapter | msg.UnloadAdapter):
                self.open.add(message.request)
            self.client(message)
        self.turn()
        self.run(lambda: not self.open)
        while self.deliver_one():
            pass
        said, self.said = self.said, []
        return said

    def _client_reads(self, message: msg.Message) -> None:
        if isinstance(message, msg.Finished | msg.Failed | msg.AdapterChanged):
            self.open.discard(message.request)
        self.said.append(message)


class Exchange:
    """The town's socket."""

    def __init__(self, town: WordyTown, address: str) -> None:
        self.town, self.missing = town, 0
        self._asked: list[msg.Message] = []
        self._listener = Listener(address)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener.socket.fileno(), self._read)
        self._read()  # ZeroMQ signals only what comes after a look

    def close(self) -> None:
        self._loop.remove_reader(self._listener.socket.fileno())
        self._listener.close()

    def _read(self) -> None:
        for sender, messages in self._listener.receive():
            self._asked += messages
            self.missing -= sum(isinstance(each, msg.Submit) for each in messages)
            if self.missing <= 0:
                asked, self._asked = self._asked, []
                for each in self.town.answer(asked):
                    assert self._listener.send(sender, each)
                # ZeroMQ signals once for what arrives while we send.
                self._loop.call_soon(self._read)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came over ASGI. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class TownClient:
    """Asks the application, as a web server would."""

    def __init__(
        self, app: Callable[..., Any], exchange: Exchange, service: GenerationService
    ) -> None:
        self.app, self.exchange, self.service = app, exchange, service

    def fresh(self) -> None:
        """Another town, just the same, that has not been asked anything: with no prefix cached."""
        self.exchange.town = WordyTown()
        self.exchange.town.client(msg.Observe())

    async def ask(
        self,
        path: str,
        body: bytes | Mapping[str, Any] | None = None,
        *,
        method: str = "",
        submits: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """GET, or POST of a body. `submits`: requests of the router that it shall become."""
        content = json.dumps(body).encode() if isinstance(body, Mapping) else body or b""
        given = {"host": "localhost:8000", "content-type": "application/json"} | dict(headers or {})
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
            "method": method or ("GET" if body is None else "POST"), "path": path,
            "raw_path": path.encode("utf-8", "surrogateescape"), "query_string": b"", "root_path": "",
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }  # fmt: skip
        request = [{"type": "http.request", "body": content, "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not request:
                await asyncio.Event().wait()  # the client stays
            return request.pop()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        self.exchange.missing = submits
        await asyncio.wait_for(self.app(scope, receive, send), PATIENCE_S)
        assert self.exchange.missing <= 0, f"{self.exchange.missing} requests never came"
        start, *parts = sent
        found = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], found, b"".join(part.get("body", b"") for part in parts))


@asynccontextmanager
async def serving(
    town: WordyTown | None = None,
    *,
    files: ModelFiles | None = None,
    template: str = CHATML,
    **options: Any,
) -> AsyncIterator[TownClient]:
    """The application, connected to a town. `options` are the server's settings."""
    with tempfile.TemporaryDirectory(prefix="town-") as name:
        folder = Path(name)
        chat = folder / "chat.jinja"
        chat.write_text(template)
        address = f"ipc://{folder}/r"
        exchange = Exchange(town or WordyTown(), address)
        settings = ServerSettings(
            address, "demo", chat_template=chat, stream_interval_ms=0.0, **options
        )
        router = RouterClient(address)
        source = read_template(None, chat)
        assert source is not None
        renderer = ThreadRenderer(source)
        service = GenerationService(settings, files or pretend_files(), router, renderer)
        monitor = Monitor(router, Metrics(service.names[0]))

        @asynccontextmanager
        async def lifespan(_: object) -> AsyncIterator[None]:
            yield

        app = make_app(service, monitor, lifespan, "0.0.0")
        try:
            router.connect(monitor.observed, monitor.ended_alone)
            assert await router.answered(10.0) is not None
            service.look()
            yield TownClient(app, exchange, service)
        finally:
            router.close()
            exchange.close()
            await renderer.close()
