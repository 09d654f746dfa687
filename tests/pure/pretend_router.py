"""A router that is not there: answers every Submit at once, word by word, and can be made to die.

Text is a function of the prompt alone, as it is with a real one and a fixed seed.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from baton.client.batch import Follower, FromRouter
from baton.errors import ProtocolError
from baton.offline.link import Link
from baton.wire.messages import Accepted, ClusterInfo, Emitted, Failed, Finished, Submit
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
class PretendLine:
    """Passes for a Client. Each poll hands out one message; `now` moves on a tenth of a second."""

    fail: dict[str, Failed | None] = field(default_factory=dict)  # by prompt
    before_poll: Callable[["PretendLine"], None] = lambda line: None
    answers: bool = True
    now: float = 0.0
    submitted: list[Submit] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    queue: deque[FromRouter] = field(default_factory=deque)

    def clock(self) -> float:
        return self.now

    def submit(self, *requests: Submit) -> None:
        for request in requests:
            self._submit(request)

    def _submit(self, request: Submit) -> None:
        self.submitted.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        assert request.prompt is not None
        failure = self.fail.get(request.prompt)
        self.queue.append(Accepted(request.request, 5, 0.001))
        if failure is not None:
            self.queue.append(Failed(request.request, failure.code, failure.message))
            return
        for token, word in enumerate(words_of(request.prompt, request.params.max_new_tokens)):
            self.queue.append(Emitted(request.request, (token,), word))
        self.queue.append(Finished(request.request, "length", TIMINGS))

    def abort(self, request: str) -> None:
        self.aborted.append(request)

    def poll(self, timeout_s: float) -> Sequence[FromRouter]:
        self.before_poll(self)
        self.now += 0.1
        if not self.queue:
            return []
        message = self.queue.popleft()
        if isinstance(message, Finished | Failed):
            self.running -= 1
        return [message]

    def info(self, *, timeout_s: float) -> ClusterInfo:
        self.now += timeout_s
        if not self.answers:
            raise ProtocolError("no router answers at ipc://pretend")
        return info()


@dataclass
class PretendSupervisor:
    """Passes for a Cluster that has had some restarts."""

    router_restarts: int = 0
    mends: bool = True
    notes: list[str] = field(default_factory=list)
    told: list[ClusterInfo] = field(default_factory=list)

    def check(self, info: ClusterInfo | None = None) -> list[str]:
        if info is not None:
            self.told.append(info)
        notes, self.notes = self.notes, []
        return notes


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


def link_through(line: PretendLine, supervisor: PretendSupervisor | None = None) -> Any:
    """Passes for offline.link.link_to."""

    @contextmanager
    def link_to(place: object, *, batch_size: int, startup: object, observe: object = None) -> Any:
        follower = Follower(
            line, supervisor or PretendSupervisor(), job="j", limit=batch_size, clock=line.clock
        )
        yield Link(follower, True, line)

    return link_to
