"""RequestThread: the one thread that runs an LLM's requests.

    baton/llm.py  ->  RequestThread  ->  LocalCluster     router, workers and model in this process
                                     ->  Client           worker processes, or a running cluster

Only the thread touches the backend: nodes, sockets and CUDA's current device belong to one thread, and
Ctrl-C, which Python raises in the main thread, can never leave a node half way through a message.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from baton.client.blocking import Notice, Received
from baton.client.tracker import News
from baton.errors import BatonError
from baton.wire.messages import ClusterInfo, Failed, Finished, Message, Submit

POLL_S = 0.005  # poll timeout while requests run: the longest delay of a new request

Deliver = Callable[[News | Exception], object]
"""Called in the RequestThread. An Exception is the end of all requests."""

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """What Client and LocalCluster have in common. `idle_s`: how often to poll while there are no
    requests; None: not at all."""

    idle_s: float | None

    def submit(self, *requests: Submit) -> None: ...
    def abort(self, request: str) -> None: ...
    def poll(self, timeout_s: float) -> Sequence[Received | Message]: ...


Start = Callable[[], AbstractContextManager[tuple[Backend, ClusterInfo]]]
"""Starts a backend, with what it serves; ends it at the end of the block."""


@dataclass(frozen=True, slots=True)
class _Submission:
    requests: Sequence[Submit]
    deliver: Deliver


@dataclass(frozen=True, slots=True)
class _Abandon:
    requests: Sequence[str]


class RequestThread:
    """Owns a backend, made by `start` in the thread itself. All methods may be called from any thread.
    `info` is what the backend served last.

    When the backend raises, every request under way is delivered the exception, and submit() raises
    from then on."""

    info: ClusterInfo

    def __init__(self, start: Start) -> None:
        """Returns when the backend is ready; raises what `start` raises."""
        self._commands: SimpleQueue[_Submission | _Abandon | None] = SimpleQueue()
        self._running: dict[str, Deliver] = {}
        self._over: Exception | None = None
        self._guard = threading.Lock()  # of _over, and that nothing is put in after it is set
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(start, ready), name="baton-llm", daemon=True
        )
        self._thread.start()
        try:
            ready.result()
        except BaseException:
            self._commands.put(None)  # the thread ends when the current load is complete
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

    def _run(self, start: Start, ready: Future[None]) -> None:
        over: Exception = BatonError("close() was called")
        try:
            with start() as (backend, info):
                self.info = info
                ready.set_result(None)
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
        if isinstance(message, Notice):
            logger.warning("%s", message.text)
        if isinstance(message, ClusterInfo):
            self.info = message  # adapters may come and go
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
