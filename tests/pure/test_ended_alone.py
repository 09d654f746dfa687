"""Requests that end while no router answers are counted, and once."""

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

from baton.client.aio import Queue, RouterClient
from baton.params import GenerationParams
from baton.server.metrics import Metrics
from baton.server.monitor import Monitor
from baton.wire.messages import Observed, Submit
from baton.wire.records import Ended, Timings


def ends(metrics: Metrics, reason: str) -> float | None:
    labels = {"model_name": "m", "reason": reason}
    return metrics.registry.get_sample_value("baton:request_failure_total", labels)


def test_they_are_counted_by_their_reasons_and_once() -> None:
    async def work(address: str) -> None:
        router, metrics = RouterClient(address), Metrics("m")
        monitor, queue = Monitor(router, metrics), Queue()
        router.connect(monitor.observed, monitor.ended_alone)
        try:
            one = router.submit(Submit("a", (1,), GenerationParams(1)), queue)
            router.submit(Submit("b", (1,), GenerationParams(1)), queue)
            router.abort(one)
            router.abort(one)
            router.fail_all("shutting_down", "the server ends")
            assert (await queue.get())[1].request == "b"
        finally:
            router.close()
        assert (ends(metrics, "abort"), ends(metrics, "shutting_down")) == (1, 1)
        late = Ended("a", "abort", 1, 0, "", Timings())  # by a router that was only silent
        monitor.observed(Observed(0.0, (), (late,), None))
        assert ends(metrics, "abort") == 1

    with TemporaryDirectory(prefix="alone-") as folder:
        asyncio.run(work(f"ipc://{Path(folder)}/r"))


def test_a_request_of_the_same_name_is_counted_again() -> None:
    metrics = Metrics("m")
    monitor = Monitor(RouterClient("ipc:///nowhere"), metrics)
    for each in ("r-0", "r-1", "s-0"):
        monitor.ended_alone(each, "abort")
    monitor.begin("r", None, 2)
    late = tuple(Ended(each, "timeout", 1, 0, "", Timings()) for each in ("r-0", "r-1", "s-0"))
    monitor.observed(Observed(0.0, (), late, None))
    assert (ends(metrics, "abort"), ends(metrics, "timeout")) == (3, 2)
