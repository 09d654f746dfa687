"""How an HTTP server ends, who it lets in, and what it writes down."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from baton.host import any_stopped
from tests.cluster.points import Points, failpoints
from tests.cluster.processes import Terminal, short_folder, terminals
from tests.cluster.serving import Server
from tests.patience import PATIENCE_S, until

Type = Callable[..., Terminal]
LONG = {"model": "demo", "prompt": "In the future", "max_tokens": 2000,
        "extra_body": {"ignore_eos": True}}  # fmt: skip


@dataclass(frozen=True)
class Loading:
    terminal: Terminal
    url: str
    points: Points


@pytest.fixture
def type_in() -> Iterator[Type]:
    with terminals() as opened:
        yield opened


def test_a_stream_that_is_cut_off_is_told_so(type_in: Type) -> None:
    with short_folder() as folder:
        keys = folder / "keys"
        keys.write_text("one\n\nsecret-two\n")
        server = Server(
            type_in, folder, "--shutdown-timeout", 0.5, "--api-key-file", keys, "--log-format",
            "json", "--max-model-len", 2300,
        )  # fmt: skip
        with pytest.raises(openai.AuthenticationError):
            server.client.models.list()
        assert server.get("/health") == ""
        client = server.client.with_options(api_key="secret-two")
        shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
        assert "secret-two" not in shown.stdout
        with client.completions.create(**LONG, stream=True, n=8) as stream:
            chunks = iter(stream)
            next(chunks)
            server.terminal.signal(signal.SIGTERM)
            with pytest.raises(openai.APIError) as cut:
                list(chunks)
        assert cut.value.code == "shutting_down"
        server.client.close()
        client.close()
        said = server.terminal.ends(0)
        assert list(folder.glob("baton-*")) == []
    assert "Traceback" not in said
    assert "In the future" not in re.sub(r"try +curl.*", "", said), "a prompt was logged"
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    asked = [line for line in lines if line["logger"] == "server.access"]
    assert asked
    assert all(line["request"] for line in asked)
    assert len({line["request"] for line in asked}) == len(asked)


@pytest.fixture(scope="module")
def loading() -> Iterator[Loading]:
    """A server that has just been started: its port is there, and one of its workers has stopped."""
    with short_folder() as folder, failpoints() as points, terminals() as opened:
        points.arm("worker.begin:stop:1")
        terminal = opened("main.py", "serve", "--port", 0, TMPDIR=str(folder), **points.environment)
        found = until(lambda: re.search(r"listening on (\S+);", terminal.said), "the port")
        yield Loading(terminal, found[1], points)


def test_while_it_loads_it_says_so(loading: Loading) -> None:
    with pytest.raises(urllib.error.HTTPError) as early:
        urllib.request.urlopen(f"{loading.url}/health", timeout=PATIENCE_S)
    with early.value as answer:
        assert answer.code == 503
        assert answer.headers["retry-after"]
        assert json.load(answer)["error"]["code"] == "not_ready"
    (worker,) = loading.points.fired(1)
    until(lambda: any_stopped([worker]), "the worker stands still")  # it tells before it does
    os.kill(worker, signal.SIGCONT)


def test_a_second_signal_ends_it_now(loading: Loading) -> None:
    """(The last of this server.)"""
    terminal = loading.terminal
    until(lambda: "ready " in terminal.said, "the workers")
    with (
        openai.OpenAI(base_url=f"{loading.url}/v1", api_key="none", max_retries=0) as client,
        client.completions.create(**LONG, stream=True, n=16) as stream,
    ):
        chunks = iter(stream)
        next(chunks)
        terminal.signal(signal.SIGINT)
        until(lambda: "again to end now" in terminal.said, "the first signal")
        terminal.signal(signal.SIGINT)
        with pytest.raises(openai.APIError):
            list(chunks)
    assert "Traceback" not in terminal.ends(130)


def test_a_port_that_is_taken_is_known_at_once(type_in: Type) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        type_in("main.py", "serve", "--port", port).refuses(2, str(port), "in use", "--port")


class Alone:
    """`python -m server` without a router: it answers /livez, and 503."""

    def __init__(self, folder: Path, *, descriptors: int, module: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = folder / "log"
        command = [sys.executable, "-m", module, "--router", f"ipc://{folder}/none", "--port"]

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(self.port)], stdout=log, stderr=log, preexec_fn=limit
            )
        until(self.alive, "the server")

    def alive(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}/livez", timeout=PATIENCE_S
            ) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def alone(folder: Path, *, descriptors: int, module: str = "server") -> Iterator[Alone]:
    server = Alone(folder, descriptors=descriptors, module=module)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(PATIENCE_S)


def test_without_descriptors_it_waits_and_then_goes_on() -> None:
    with short_folder() as folder, alone(folder, descriptors=64) as server:
        for _ in range(2):
            clients = []
            for _ in range(90):
                clients.append(socket.create_connection(("127.0.0.1", server.port), PATIENCE_S))
                clients[-1].sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")  # half a head
            until(lambda: "no more connections" in server.log.read_text(), "the pause")
            for client in clients:
                client.close()
            until(server.alive, "the server")
        said = server.log.read_text()
        assert said.count("no more connections") == 1
        assert "Traceback" not in said
        assert len(said) < 20_000


def test_what_is_sent_too_slowly_ends() -> None:
    """After its error too, though a byte comes now and then."""
    module = "tests.cluster.impatient_server"
    with short_folder() as folder, alone(folder, descriptors=256, module=module) as server:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 4000000\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as client:
            client.sendall(head)
            client.settimeout(0.5)
            told = b""

            def ended() -> bool:
                nonlocal told
                try:
                    client.sendall(b" ")
                    told += client.recv(4096)
                except TimeoutError:
                    return False
                except OSError:
                    return True
                return False

            until(ended, "the end of the connection")
        assert told.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in told.lower()
