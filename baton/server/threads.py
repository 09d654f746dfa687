"""Threads: work beside the event loop, in turns of tenants.

    work of a -> [a a a a a]   a job of each in turn;       -> threads
    work of b -> [b]           of one in no more than half

asyncio's own threads take what came first, so a client that sends 40 long texts at once would have all
others' grammars and texts wait until they are done. FairThreads is asyncio's default executor in the
server: to_thread() and run_in_executor() use it as they are.
"""

import os
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from threading import Lock
from typing import Any, Generic, TypeVar

TENANT: ContextVar[str] = ContextVar("tenant", default="")
"""Who the current request is from."""
THREADS = min(32, (os.cpu_count() or 1) + 4)
"""As many as asyncio would have."""

Job = TypeVar("Job")


class Turns(Generic[Job]):
    """Which job is next. Pure. One tenant gets half of the `places`: the event loop, too, waits for the
    interpreter's lock behind every thread that computes."""

    def __init__(self, places: int) -> None:
        self._places, self._share = places, (places + 1) // 2
        self._waiting: OrderedDict[str, deque[Job]] = (
            OrderedDict()
        )  # whose turn is next at the front
        self._running = Counter[str]()

    def add(self, tenant: str, job: Job) -> None:
        self._waiting.setdefault(tenant, deque()).append(job)

    def next(self) -> tuple[str, Job] | None:
        """The job that may begin now, and whose it is: of the tenant with the fewest that run, and among
        equals of the one that has waited longest for its turn."""
        if self._running.total() >= self._places:
            return None
        free = [each for each in self._waiting if self._running[each] < self._share]
        if not free:
            return None
        tenant = min(free, key=lambda each: self._running[each])
        jobs = self._waiting.pop(tenant)
        job = jobs.popleft()
        if jobs:
            self._waiting[tenant] = jobs  # behind the others
        self._running[tenant] += 1
        return tenant, job

    def done(self, tenant: str) -> None:
        """A job of this tenant has ended."""
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]

    def clear(self) -> list[Job]:
        """The jobs that have not begun, which are forgotten."""
        found = [job for jobs in self._waiting.values() for job in jobs]
        self._waiting.clear()
        return found


class FairThreads(ThreadPoolExecutor):
    """Threads that tenants share."""

    def __init__(self, threads: int = THREADS, name: str = "work") -> None:
        super().__init__(threads, name)
        self._turns = Turns[tuple[Future[Any], Callable[[], Any]]](threads)
        self._turn = Lock()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        """As any executor's. The job is the current request's."""
        promise = Future[Any]()
        with self._turn:
            self._turns.add(TENANT.get(), (promise, lambda: fn(*args, **named)))
        self._begin()
        return promise

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """What has not begun is cancelled in any case; what has is not."""
        with self._turn:
            waiting = self._turns.clear()
        for promise, _ in waiting:
            promise.cancel()
        super().shutdown(wait)

    def _begin(self) -> None:
        while True:
            with self._turn:
                found = self._turns.next()
            if found is None:
                return
            tenant, (promise, work) = found
            if promise.set_running_or_notify_cancel():
                super().submit(self._do, tenant, work).add_done_callback(partial(_told, promise))
            else:
                self._done(tenant)

    def _do(self, tenant: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        finally:
            self._done(tenant)
            self._begin()

    def _done(self, tenant: str) -> None:
        with self._turn:
            self._turns.done(tenant)


def _told(promise: Future[Any], work: Future[Any]) -> None:
    """What became of the work belongs to who waits for it."""
    if (error := work.exception()) is not None:
        promise.set_exception(error)
    else:
        promise.set_result(work.result())
