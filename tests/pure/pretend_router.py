"""A router that is not there: answers every Submit at once, word by word, and can be made to die.

Text is a function of the prompt alone, as it is with a real one and a fixed seed.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from baton.client.blocking import Client
from baton.wire.messages import (
    Abort,
    Accepted,
    ClusterInfo,
    Emitted,
    Failed,
    Finished,
    GetClusterInfo,
    Message,
    Submit,
    Unreachable,
)
from baton.wire.node import ROUTER
from baton.wire.records import Timings, WorkerInfo
from sampler.params import SamplingParams

TIMINGS = Timings(
    queue_s=0.1,
    prefill_s=0.2,
    handover_s=0.05,
    decode_s=0.4,
    ttft_s=0.4,
    total_s=0.8,
    kv_bytes=1000,
)


def words_of(prompt: str, count: int) -> list[str]:
    """What the pretend model says."""
    return [f" {prompt[:3]}{n}" for n in range(count)]


@dataclass
class PretendRouter:
    """Passes for the channel of a Client. One message arrives in each turn; the clock moves on a tenth
    of a second with each wait. What is sent while it does not answer is lost."""

    fail: dict[str, Failed | None] = field(default_factory=dict)  # by prompt
    before_turn: Callable[["PretendRouter"], None] = lambda router: None
    answers: bool = True
    now: float = 0.0
    submitted: list[Submit] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    most_running: int = 0
    queue: deque[Message] = field(default_factory=deque)

    def clock(self) -> float:
        return self.now

    def client(self, supervisor: "PretendSupervisor | None" = None) -> Client:
        return Client(
            "ipc://pretend",
            channel=self,  # type: ignore[arg-type]
            clock=self.clock,
            supervise=supervisor.check if supervisor is not None else None,
        )

    def die(self) -> None:
        """Lose everything, and be another router at once."""
        self.queue.clear()
        self.running.clear()
        self.queue.append(Unreachable(ROUTER))

    # ---- a channel

    @property
    def socket(self) -> "PretendRouter":
        return self

    def poll(self, timeout_ms: int, flags: int) -> bool:
        self.now += 0.1
        return bool(self.queue)

    def send(self, peer: str, *messages: Message) -> bool:
        for message in messages if self.answers else ():
            match message:
                case Submit():
                    self._submit(message)
                case Abort(request):
                    self.aborted.append(request)
                case GetClusterInfo():
                    self.queue.appendleft(info())
        return self.answers

    def receive(self) -> Iterator[tuple[str, list[Message]]]:
        self.before_turn(self)
        if self.queue:
            message = self.queue.popleft()
            if isinstance(message, Finished | Failed):
                self.running.discard(message.request)
            yield ROUTER, [message]

    def close(self, *, linger_s: float) -> None:
        pass

    def _submit(self, request: Submit) -> None:
        self.submitted.append(request)
        self.running.add(request.request)
        self.most_running = max(self.most_running, len(self.running))
        assert isinstance(request.prompt, str)
        failure = self.fail.get(request.prompt)
        self.queue.append(Accepted(request.request, 5, 0.001))
        if failure is not None:
            self.queue.append(Failed(request.request, failure.code, failure.message))
            return
        for token, word in enumerate(words_of(request.prompt, request.params.max_new_tokens)):
            self.queue.append(Emitted(request.request, (token,), word))
        self.queue.append(Finished(request.request, "length", TIMINGS))


@dataclass
class PretendSupervisor:
    """Passes for a Cluster."""

    notices: list[str] = field(default_factory=list)
    checked: list[ClusterInfo] = field(default_factory=list)

    def check(self, info: ClusterInfo | None = None) -> list[str]:
        if info is not None:
            self.checked.append(info)
        notices, self.notices = self.notices, []
        return notices


def info(*, ready: bool = True, transports: tuple[str, ...] = ("shm",)) -> ClusterInfo:
    """A cluster of one prefill and one decode worker."""
    return ClusterInfo(
        ready=ready,
        model="pretend",
        fingerprint="f" * 32,
        context=64,
        vocabulary=100,
        dtype="float32",
        sampling=SamplingParams(temperature=0.0),
        workers=(
            WorkerInfo("prefill-0.a1", "prefill", "cpu", "alive", transports, 1.0),
            WorkerInfo("decode-0.b2", "decode", "cpu", "alive", (), 2.0),
        ),
        waiting_for="" if ready else "no decode worker has joined",
    )


def link_through(router: PretendRouter, supervisor: PretendSupervisor | None = None) -> Any:
    """Passes for offline.link.link_to."""

    @contextmanager
    def link_to(target: object, *, startup: object, observe: object = None) -> Any:
        yield router.client(supervisor or PretendSupervisor())

    return link_to
