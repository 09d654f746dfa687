"""Real workers that are killed, or told to end, and what takes their place."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from baton.client.batch import Completion, complete
from baton.client.blocking import Client
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.params import GenerationParams
from baton.topology import Topology
from baton.wire.messages import ClusterInfo, Submit
from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.processes import Ends, await_workers, children_of
from tests.patience import until

LENGTH = 20
GREEDY = SamplingParams(temperature=0.0)
OPTIONS = ClusterOptions(
    "demo", Topology(("cpu",), ("cpu",)), batch_size=4, spare_worker=True, drain_timeout=0.5
)


class Desk:
    """A cluster with a spare worker, and its client."""

    def __init__(self, cluster: Cluster, client: Client) -> None:
        self.cluster, self.client = cluster, client
        self.notes: list[str] = []
        self.jobs = 0

    def check(self, info: ClusterInfo | None) -> None:
        self.notes += self.cluster.check(info)

    def await_both(self, unlike: tuple[str, ...] = ()) -> dict[str, str]:
        """Until both work and a spare waits; their names as peers."""
        info = await_workers(self.client, 2, check=self.check, unlike=unlike)

        def spare() -> bool:
            self.check(info)
            return "spare" in self.cluster.pids()

        until(spare, "a spare")
        return {each.worker.rpartition(".")[0]: each.worker for each in info.workers}

    def answers(self) -> list[str]:
        self.jobs += 1
        submits = {
            i: Submit(f"job{self.jobs}-{i}", prompt, GenerationParams(LENGTH, GREEDY))
            for i, prompt in enumerate(calm.PROMPTS)
        }
        done = [e for e in complete(self.client, submits, limit=4) if isinstance(e, Completion)]
        return [each.text for each in sorted(done, key=lambda each: each.index)]


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with (
        Cluster(OPTIONS) as cluster,
        closing(Client(cluster.address, supervise=cluster.check, down=cluster.down)) as client,
    ):
        yield Desk(cluster, client)


@pytest.mark.parametrize("name", ["decode-0", "prefill-0"])
def test_the_spare_takes_a_dead_workers_place_and_name_and_a_new_one_waits(
    desk: Desk, name: str
) -> None:
    before = desk.await_both()
    pids = desk.cluster.pids()
    os.kill(pids[name], signal.SIGKILL)
    desk.await_both(unlike=(before[name],))
    after = desk.cluster.pids()
    assert after[name] == pids["spare"] != after["spare"]
    assert children_of(os.getpid())[name] == pids["spare"]
    assert desk.answers() == [each.text for each in calm.answers(LENGTH, GREEDY)]
    log = desk.cluster.run_dir / "logs" / f"{name}.log"
    assert any(
        note.startswith(f"{name} died (signal 9") and str(log) in note for note in desk.notes
    )


def test_a_worker_that_is_told_to_end_is_replaced_and_that_is_no_death(desk: Desk) -> None:
    before, desk.notes = desk.await_both(), []
    pid = desk.cluster.pids()["prefill-0"]
    os.kill(pid, signal.SIGTERM)
    desk.await_both(unlike=(before["prefill-0"],))
    assert desk.notes == ["prefill-0 ended as it was told to (SIGTERM) and is started again"]
    assert desk.cluster.down() == ()
    assert desk.answers() == [each.text for each in calm.answers(LENGTH, GREEDY)]


def test_the_router_has_one_heap_and_workers_have_what_they_like(desk: Desk) -> None:
    pids = desk.cluster.pids()
    for name, one in (("router", True), ("prefill-0", False), ("decode-0", False)):
        environment = Path(f"/proc/{pids[name]}/environ").read_bytes().split(b"\0")
        assert (b"MALLOC_ARENA_MAX=1" in environment) == one


def test_stopping_ends_the_spare_too(desk: Desk) -> None:
    """The last of this cluster. Nothing drains: the router ends as well."""
    desk.await_both()
    ends, folder = Ends(desk.cluster.pids()), desk.cluster.run_dir
    desk.cluster.stop()
    ends.wait()
    assert desk.cluster.pids() == {}
    assert not folder.exists()
