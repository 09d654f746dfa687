"""Backends: what runs an LLM's requests, and the one thread that talks to it.

    baton/llm.py  ->  RequestThread  ->  LocalCluster      router, workers and model in this process
                                     ->  RouterBackend     worker processes, or a running cluster

Only the thread touches the backend: nodes, sockets and CUDA's current device belong to one thread, and
Ctrl-C, which Python raises in the main thread, can never leave a node half way through a message.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from math import inf
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from baton.client.blocking import Client, Received
from baton.client.tracker import News
from baton.clock import monotonic
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.errors import BatonError, ProtocolError
from baton.wire.keys import load_keys
from baton.wire.messages import ClusterInfo, Failed, Finished, Message, Submit

POLL_S = 0.005  # while requests run: the longest that a new one of another thread waits
IDLE_S = 0.25  # else: between two looks at the worker processes
ANSWER_S = 5.0
READY_S = 900.0
GIVE_UP_S = 30.0  # so long requests wait for a lost router that nothing here restarts

Deliver = Callable[[News | Exception], object]
"""Called in the RequestThread. An Exception is the end of all requests."""

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """The calls of baton.client.blocking.Client, which LocalCluster has too. `idle_s`: how often to
    poll while there are no requests; None: not at all."""

    idle_s: float | None

    def info(self, *, timeout_s: float) -> ClusterInfo: ...
    def submit(self, *requests: Submit) -> None: ...
    def abort(self, request: str) -> None: ...
    def poll(self, timeout_s: float) -> Sequence[Received | Message]: ...
    def close(self) -> None: ...


class RouterBackend:
    """A router in another process. With `options` it and its workers are started here, looked after
    and ended with close()."""

    idle_s: float | None = IDLE_S

    def __init__(
        self,
        address: str = "",
        *,
        keys: Path | None = None,
        options: ClusterOptions | None = None,
    ) -> None:
        """Waits until the cluster can work. Raises ProtocolError if nothing answers at `address`, and
        what a worker process ended with."""
        self._cluster = Cluster(options) if options is not None else None
        self._client: Client | None = None
        try:
            if self._cluster is not None:
                self._cluster.start()
                address = self._cluster.address
            give_up_s = GIVE_UP_S if self._cluster is None else inf
            self._client = Client(
                address, keys=load_keys(keys) if keys else None, give_up_s=give_up_s
            )
            self._ready = self._await_ready(self._client)
        except BaseException:
            self.close()
            raise

    def info(self, *, timeout_s: float) -> ClusterInfo:
        """What is served."""
        return self._ready

    def submit(self, *requests: Submit) -> None:
        """See Client."""
        self._open().submit(*requests)

    def abort(self, request: str) -> None:
        """See Client."""
        self._open().abort(request)

    def poll(self, timeout_s: float) -> Sequence[Received]:
        """See Client. Restarts worker processes that have died; raises WorkerLost and others for what
        cannot be mended."""
        received = self._open().poll(timeout_s)
        infos = [each for each in received if isinstance(each, ClusterInfo)]
        self._look_after(infos[-1] if infos else None)
        return received

    def close(self) -> None:
        """Disconnect; end the processes that were started."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._cluster is not None:
            self._cluster.stop()

    def _open(self) -> Client:
        assert self._client is not None
        return self._client

    def _look_after(self, info: ClusterInfo | None) -> None:
        if self._cluster is not None:
            for note in self._cluster.check(info):
                logger.warning("%s", note)

    def _await_ready(self, client: Client) -> ClusterInfo:
        deadline = monotonic() + READY_S
        info: ClusterInfo | None = None
        while info is None or not info.ready:
            try:
                info = client.info(timeout_s=IDLE_S if self._cluster is not None else ANSWER_S)
            except ProtocolError:
                if self._cluster is None or monotonic() >= deadline:
                    raise
            self._look_after(info)
            if info is not None and not info.ready:
                if monotonic() >= deadline:
                    raise ProtocolError(
                        f"the cluster was not ready after {READY_S:.0f} s; it waits for "
                        f"{info.waiting_for}"
                    )
                client.poll(IDLE_S)
        return info


@dataclass(frozen=True, slots=True)
class _Submission:
    requests: Sequence[Submit]
    deliver: Deliver


@dataclass(frozen=True, slots=True)
class _Abandon:
    requests: Sequence[str]


class RequestThread:
    """Owns a backend, made by `start` in the thread itself. All methods may be called from any thread.

    When the backend raises, every request under way is delivered the exception, and submit() raises
    from then on."""

    def __init__(self, start: Callable[[], Backend]) -> None:
        """Returns when the backend is ready; raises what `start` raises."""
        self._commands: SimpleQueue[_Submission | _Abandon | None] = SimpleQueue()
        self._running: dict[str, Deliver] = {}
        self._over: Exception | None = None
        self._guard = threading.Lock()  # of _over, and that nothing is put in after it is set
        ready: Future[ClusterInfo] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(start, ready), name="baton-llm", daemon=True
        )
        self._thread.start()
        try:
            self.info = ready.result()
        except BaseException:
            self._commands.put(None)  # it ends as soon as what it is loading is loaded
            raise

    def submit(self, requests: Sequence[Submit], deliver: Deliver) -> None:
        """Start these together. BatonError if the backend is no more."""
        with self._guard:
            if self._over is not None:
                raise BatonError(f"this LLM is closed: {self._over}") from self._over
            self._commands.put(_Submission(requests, deliver))

    def abandon(self, requests: Iterable[str]) -> None:
        """Abort these; nothing more of them is delivered. Those that have ended are passed over."""
        self._commands.put(_Abandon(tuple(requests)))

    def close(self) -> None:
        """End the backend and wait for it. Requests under way are delivered a BatonError."""
        self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self, start: Callable[[], Backend], ready: "Future[ClusterInfo]") -> None:
        over: Exception = BatonError("close() was called")
        try:
            with closing(start()) as backend:
                ready.set_result(backend.info(timeout_s=ANSWER_S))
                self._work(backend)
        except Exception as error:
            over = error
        self._end(over)
        if not ready.done():
            ready.set_exception(over)

    def _work(self, backend: Backend) -> None:
        while self._obey(backend):
            for message in backend.poll(POLL_S if self._running else 0.0):
                self._pass_on(message)

    def _obey(self, backend: Backend) -> bool:
        """Do what was ordered; with nothing else to do, wait for an order. False: the end."""
        wait_s = 0.0 if self._running else backend.idle_s
        try:
            command = self._commands.get(wait_s != 0.0, wait_s)
            while command is not None:
                if isinstance(command, _Submission):
                    self._running.update(
                        (each.request, command.deliver) for each in command.requests
                    )
                    backend.submit(*command.requests)
                else:
                    for request in command.requests:
                        if self._running.pop(request, None) is not None:
                            backend.abort(request)
                command = self._commands.get_nowait()
        except Empty:
            return True
        return False

    def _pass_on(self, message: Received | Message) -> None:
        if not isinstance(message, News):
            return
        ended = isinstance(message, Finished | Failed)
        take = self._running.pop if ended else self._running.get
        if (deliver := take(message.request, None)) is not None:
            deliver(message)

    def _end(self, over: Exception) -> None:
        with self._guard:
            self._over = over
        delivers = dict.fromkeys(self._running.values())
        while not self._commands.empty():
            if isinstance(command := self._commands.get(), _Submission):
                delivers[command.deliver] = None
        for deliver in delivers:
            deliver(over)
