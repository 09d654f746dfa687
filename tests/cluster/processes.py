"""What the tests with real processes share: waiting with a deadline, watching processes end, typing
commands. Nothing here sleeps to synchronise: every wait is for something, and gives up."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from baton.client.blocking import Client
from baton.errors import ProtocolError
from baton.params import GenerationParams
from baton.wire import messages as msg
from sampler.params import SamplingParams
from tests.patience import PATIENCE_S, patiently

ROOT = Path(__file__).resolve().parents[2]
ASK_S = 0.2


class Ends:
    """Processes whose end will be seen, even where nobody waits for their zombies."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._descriptors = {name: os.pidfd_open(pid) for name, pid in pids.items()}

    def wait(self) -> None:
        """Until every one of them has ended."""
        poller = select.poll()
        names = {descriptor: name for name, descriptor in self._descriptors.items()}
        for descriptor in names:
            poller.register(descriptor, select.POLLIN)
        for _ in patiently(lambda: f"the end of {sorted(names.values())}"):
            if not names:
                return
            for descriptor, _ in poller.poll(100):
                poller.unregister(descriptor)
                os.close(descriptor)
                del names[descriptor]


def children_of(pid: int) -> dict[str, int]:
    """The direct children, by what they are: router, prefill-0, decode-0, ..."""
    found = {}
    for entry in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):
            words = Path(f"/proc/{entry}/cmdline").read_text().split("\0")
            if "-m" in words:
                module = words[words.index("-m") + 1]
                name = module.rpartition(".")[2]
                if "--name" in words:
                    name = words[words.index("--name") + 1]
                found[name] = int(entry)
    return found


def shared_memory() -> set[str]:
    """What lies in /dev/shm."""
    with suppress(OSError):
        return {entry.name for entry in Path("/dev/shm").iterdir()}
    return set()


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder of mode 0700 with a path short enough for sockets, which a test's tmp_path is not."""
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as name:
        yield Path(name)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


OPENED: list["Terminal"] = []
"""The terminals of the running test, whose words are told when it fails."""


class Terminal:
    """A command somebody typed. Its output goes to a file, as nobody reads along."""

    def __init__(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.command, self.log = " ".join(arguments), log
        OPENED.append(self)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ends(self, code: int) -> str:
        """It leaves with this exit code; what it said."""
        found = self.process.wait(PATIENCE_S)
        assert found == code, f"exit code {found}, expected {code}; it said: {self.said}"
        return self.said

    def refuses(self, code: int, *words: str) -> None:
        """It leaves with this exit code, one line, and these words in it."""
        said = self.ends(code)
        assert said.startswith("error: "), said
        assert said.count("\n") == 1, said
        for each in words:
            assert each in said

    def runs(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """It and whatever it has started in its session."""
        if self.runs():
            self.process.kill()
        self.process.wait(PATIENCE_S)


@contextmanager
def terminals() -> Iterator[Callable[..., Terminal]]:
    """type("-m", "router", ...): a new terminal with this command. All are closed in the end."""
    opened: list[Terminal] = []
    with tempfile.TemporaryDirectory(prefix="bt-logs-") as logs:

        def type_in(*arguments: object, **environment: str) -> Terminal:
            log = Path(logs) / f"{len(opened)}.log"
            opened.append(Terminal([str(each) for each in arguments], log, environment))
            return opened[-1]

        try:
            yield type_in
        finally:
            for each in opened:
                each.kill()
                OPENED.remove(each)


def await_workers(
    client: Client,
    wanted: int,
    *,
    check: Callable[[msg.ClusterInfo | None], object] = lambda info: None,
    unlike: Sequence[str] = (),
) -> msg.ClusterInfo:
    """Until the router can work with so many workers, none of them one of `unlike`."""
    seen: list[msg.ClusterInfo] = []
    for _ in patiently(lambda: f"{wanted} workers together: {seen[-1:]}"):
        info = seen[-1] if seen else None
        if info is not None:
            assert "cannot write to" not in info.waiting_for, info.waiting_for
            if _together(info, wanted, unlike):
                return info
        check(info)
        news = [each for each in client.poll(ASK_S) if isinstance(each, msg.ClusterInfo)]
        if not news:
            with suppress(ProtocolError):  # no news is no answer: it may be another router by now
                news = [client.info(timeout_s=ASK_S)]
        seen.extend(news)
    raise AssertionError("patiently() ends no loop")


def _together(info: msg.ClusterInfo, wanted: int, unlike: Sequence[str]) -> bool:
    alive = {each.worker for each in info.workers if each.state == "alive"}
    decodes = sum(1 for each in info.workers if each.role == "decode")
    ways = [len(each.transports) for each in info.workers if each.role == "prefill"]
    joined = len(info.workers) == len(alive) == wanted and not alive & set(unlike)
    return info.ready and joined and all(each == decodes for each in ways)


class Talk:
    """What one client asked for, and what has come of it so far."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.tokens: dict[str, list[int]] = {}
        self.texts: dict[str, str] = {}
        self.ends: dict[str, msg.Finished | msg.Failed] = {}

    def ask(
        self,
        request: str,
        prompt: str,
        length: int,
        sampling: SamplingParams,
    ) -> None:
        self.tokens[request], self.texts[request] = [], ""
        self.client.submit(msg.Submit(request, prompt, GenerationParams(length, sampling)))

    def listen(self, enough: Callable[[], bool]) -> None:
        """Until enough has come."""
        for _ in patiently(lambda: f"tokens {self.tokens}, ends {self.ends}"):
            if enough():
                return
            for news in self.client.poll(0.2):
                match news:
                    case msg.Emitted(request, ids, text):
                        self.tokens[request] += ids
                        self.texts[request] += text
                    case msg.Finished(request) | msg.Failed(request):
                        self.ends[request] = news

    def all_ended(self) -> bool:
        return len(self.ends) == len(self.tokens)


def journaled(part: Path) -> int:
    """Answers in the journal of an unfinished job."""
    try:
        lines = part.read_bytes().split(b"\n")[1:-1]
    except FileNotFoundError:
        return 0
    return sum(1 for line in lines if "index" in json.loads(line.rpartition(b"\t")[0]))
