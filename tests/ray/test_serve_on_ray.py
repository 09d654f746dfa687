"""`serve --cluster ray` on a real Ray cluster of three nodes on this machine: whatever dies under load,
every request is answered with the text of an undisturbed run.

`make test-ray` runs this in an environment of its own, because ray is an optional dependency. The tests
follow each other on one cluster: a worker's process, its actor, the router, a node that dies, a node
that drains, the end.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from baton.cluster.on_ray import free_port
from baton.package import ROOT

PROMPTS = [f"In the year {year} the" for year in range(2000, 2008)]
TOKENS = 60
PATIENCE_S = 600.0  # of a machine that does much else
ATTEMPTS = 10
UNUSED = ("metrics_agent_port", "dashboard_agent_listen_port")
CPUS = 3  # of a node beside the head: one can hold all workers
HEAD_CPUS = 1  # so two of the three are on other nodes, wherever SPREAD puts them
ENVIRONMENT = os.environ | {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "60",
    "RAY_worker_register_timeout_seconds": "600", "RAY_enable_worker_prestart": "0",
    "RAY_agent_register_timeout_ms": "600000", "RAY_health_check_timeout_ms": "60000",
}  # fmt: skip
pytestmark = pytest.mark.timeout(1800)


def wait_for(what: str, happened: Callable[[], Any]) -> Any:
    """Ask until it is true; fails with `what` after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := happened()):
        assert time.monotonic() < deadline, f"{what} did not happen in {PATIENCE_S:.0f} s"
        threading.Event().wait(0.1)
    return found


class RayNodes:
    """Nodes of one Ray cluster, each started by `ray start`."""

    def __init__(self, folder: Path, *, others: int = 2) -> None:
        self._folder = folder
        self._before = self._servers()
        self.address = f"127.0.0.1:{free_port('127.0.0.1')}"
        self._start(
            "--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false",
            f"--temp-dir={folder}",
        )  # fmt: skip
        try:
            self.others = [self.add() for _ in range(others)]
        except BaseException:
            self.stop()
            raise

    def _start(self, *options: str) -> None:
        """More than once if need be: somebody may take the port."""
        cpus = HEAD_CPUS if "--head" in options else CPUS
        command = [
            str(Path(sys.executable).parent / "ray"), "start", f"--num-cpus={cpus}", *options,
            "--object-store-memory=100000000", "--disable-usage-stats",
        ]  # fmt: skip
        for _ in range(ATTEMPTS):
            node, port = secrets.token_hex(28), free_port("127.0.0.1")
            ran = subprocess.Popen(
                [*command, f"--runtime-env-agent-port={port}"],
                env=ENVIRONMENT | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": node},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            while ran.poll() is None:
                self._answer_for_agents(node)
                threading.Event().wait(0.1)
            said = ran.communicate()[0]
            if ran.returncode == 0:
                return
            if "--head" in options:
                self.stop()
        raise AssertionError(said)

    def _answer_for_agents(self, node: str) -> None:
        """A raylet ends if its agents do not say in these files within 15 s that they have no port, as on
        a machine that does much else."""
        with suppress(FileNotFoundError):  # the session has no folder yet
            session = (self._folder / "session_latest").resolve(strict=True)
            for name in UNUSED:
                if not (file := session / f"{name}_{node}").exists():
                    file.write_text("-1")

    def _servers(self) -> set[int]:
        return {*processes("raylet/raylet"), *processes("gcs/gcs_server")}

    def _raylets(self) -> set[int]:
        return set(processes("raylet/raylet")) - self._before

    def add(self) -> int:
        """One more node. The process id of its raylet."""
        before = self._raylets()
        self._start(f"--address={self.address}")
        (raylet,) = self._raylets() - before
        return raylet

    def id_of(self, raylet: int) -> str:
        """The node id of a raylet."""
        (found,) = re.findall(r"--node_id=([0-9a-f]+)", command_line(raylet))
        return str(found)

    def drain(self, raylet: int) -> None:
        """Announce that the node goes away in ten minutes."""
        ran = subprocess.run(
            [
                str(Path(sys.executable).parent / "ray"), "drain-node", "--address", self.address,
                "--node-id", self.id_of(raylet), "--reason", "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message", "test", "--deadline-remaining-seconds", "600",
            ],
            env=ENVIRONMENT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout + ran.stderr

    def stop(self) -> None:
        """End the processes of this cluster and no others, and remove its files."""
        mine = (self._servers() - self._before) | set(processes(f"{self._folder}/"))
        for pid in mine - {os.getpid()}:
            kill(pid)
        shutil.rmtree(self._folder, ignore_errors=True)


class Service:
    """`serve` on it, and its clients."""

    def __init__(self, nodes: RayNodes, log: Path) -> None:
        self._log = log
        command = [
            sys.executable, "main.py", "serve", "demo", "--cluster", "ray", "--port", "0",
            "--ray-address", nodes.address, "--num-prefill", "1", "--num-decode", "2",
            "--max-num-seqs", "8", "--max-model-len", "256",
            "--queue-timeout", "0",  # both decode workers may have been on the node that is killed
        ]  # fmt: skip
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=out, start_new_session=True
            )
        self.port = int(
            wait_for("the port", lambda: re.search(r"127\.0\.0\.1:(\d+)", self.said()))[1]
        )
        self.wait_until_all_serve()
        self.right = {prompt: self.complete(prompt) for prompt in PROMPTS}

    def said(self) -> str:
        """What it printed so far."""
        return self._log.read_text(errors="replace")

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)) as client:
            headers = {"Content-Type": "application/json"}
            client.request(
                "POST" if body else "GET", path, json.dumps(body) if body else None, headers
            )
            answer = client.getresponse()
            return answer.status, json.loads(answer.read())

    def complete(self, prompt: str) -> str:
        """A greedy completion. A request that comes while there is no router is refused after some
        seconds and sent again, as OpenAI's clients do; one that was taken in must be answered."""
        body = {
            "model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        deadline = time.monotonic() + PATIENCE_S
        while True:
            status, answer = self.ask("/v1/completions", body)
            if status == 200:
                return str(answer["choices"][0]["text"])
            refused = (status, answer["error"].get("code")) == (503, "not_ready")
            assert refused, (status, answer)
            assert time.monotonic() < deadline, answer

    def workers(self) -> set[str]:
        """Names of the workers that are alive, as the router sees it."""
        try:
            _, state = self.ask("/readyz")
        except (OSError, ValueError):
            return set()
        alive = [each for each in state.get("workers", ()) if each.get("state") == "alive"]
        return {each["worker"].partition(".")[0] for each in alive}

    def wait_until_all_serve(self) -> None:
        assert self.process.poll() is None, self.said()
        wait_for("three workers", lambda: len(self.workers()) == 3)


class Load:
    """A context manager: four clients that complete the prompts one after the other, all of them at least
    once. At the end every answer has been the right one, and there were some."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._over = threading.Event()
        self._wrong: list[str] = []
        self.answered = 0
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(4)]

    def _work(self, number: int) -> None:
        while not self._over.is_set():
            for prompt in PROMPTS[number::4]:
                try:
                    if (text := self._service.complete(prompt)) != self._service.right[prompt]:
                        self._wrong.append(f"{prompt!r}: {text!r}")
                except (OSError, ValueError, AssertionError) as error:
                    self._wrong.append(f"{prompt!r}: {error!r}")
                self.answered += 1

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        wait_for("the first answers", lambda: self.answered >= 4)
        return self

    def __exit__(self, *_: object) -> None:
        before = self.answered
        wait_for("answers after it", lambda: self.answered >= before + 4)
        self._over.set()
        for thread in self._threads:
            thread.join()
        assert not self._wrong, "\n".join(self._wrong) + "\n" + self._service.said()


def processes(words: str) -> list[int]:
    """Ids of processes with these words in their command line."""
    found = (int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit())
    return [pid for pid in found if words in command_line(pid)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # it has ended
        return ""


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    made = RayNodes(Path(f"/tmp/baton-ray-{os.getpid()}"))  # short: it holds unix sockets
    yield made
    made.stop()


@pytest.fixture(scope="module")
def service(nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(nodes, tmp_path_factory.mktemp("serve") / "log")
    yield made
    made.process.kill()
    made.process.wait()


def router_address(service: Service) -> str:
    """That of this service: others may run on this machine."""
    (server,) = [
        p for p in processes(f"--port {service.port} ") if "baton.server" in command_line(p)
    ]
    found = re.search(r"--router (tcp://\S+)", command_line(server))
    assert found is not None
    return found[1]


def running(service: Service, name: str) -> int:
    """The process of a worker of this service."""
    address = router_address(service)
    (pid,) = [p for p in processes(f"--name {name} ") if address in command_line(p)]
    return pid


def of_node(raylet: int, service: Service) -> list[str]:
    """Names of the workers on the node of this raylet."""
    return [
        name for name in service.workers() if parent_of(parent_of(running(service, name))) == raylet
    ]


def test_a_worker_process_that_is_killed_costs_nothing(service: Service) -> None:
    with Load(service):
        before = running(service, "decode-0")
        kill(before)
        wait_for("its restart", lambda: "decode-0 died (signal 9)" in service.said())
        service.wait_until_all_serve()
    assert running(service, "decode-0") != before


def test_an_actor_that_is_killed_costs_nothing_and_leaves_no_twin(service: Service) -> None:
    with Load(service):
        worker = running(service, "decode-1")
        kill(parent_of(worker))
        wait_for("the end of its process", lambda: not command_line(worker))
        wait_for("the news", lambda: "decode-1: its owner" in service.said())
        service.wait_until_all_serve()
    assert running(service, "decode-1") != worker


def test_a_router_that_is_killed_costs_nothing_and_keeps_its_address(service: Service) -> None:
    with Load(service):
        (router,) = processes(f"-m router --address {router_address(service)} ")
        kill(router)
        wait_for("its restart", lambda: "router died (signal 9)" in service.said())
        service.wait_until_all_serve()


def node_with_workers(nodes: RayNodes, service: Service) -> int:
    """The raylet of a node beside the head. Nobody else uses it after the test. There is always one:
    the head has room for one worker."""
    found = next(each for each in nodes.others if of_node(each, service))
    nodes.others.remove(found)
    return found


def test_a_node_that_is_killed_costs_nothing(nodes: RayNodes, service: Service) -> None:
    dying, before = node_with_workers(nodes, service), len(service.said())
    names = of_node(dying, service)
    with Load(service):
        kill(dying)
        for name in names:
            news = f"{name}: "
            wait_for(f"news of {name}", lambda news=news: news in service.said()[before:])
        service.wait_until_all_serve()


def test_a_node_that_is_to_go_away_is_left_without_a_loss(
    nodes: RayNodes, service: Service
) -> None:
    leaving, before = node_with_workers(nodes, service), len(service.said())
    nodes.others.append(nodes.add())  # where its workers can go
    names = of_node(leaving, service)
    with Load(service):
        nodes.drain(leaving)
        for name in names:
            news = f"{name} has left"
            wait_for(news, lambda news=news: news in service.said()[before:])
        service.wait_until_all_serve()
    assert not set(names) & service.workers()
    assert "died" not in service.said()[before:].partition("drains: its node")[2]


def test_at_the_end_it_drains_and_leaves_nothing(service: Service) -> None:
    mine = [running(service, name) for name in service.workers()]
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(timeout=PATIENCE_S) == 0, service.said()
    for pid in mine:
        wait_for("the end of a worker", lambda pid=pid: not command_line(pid))
