"""Workers of two ranks in a real cluster: whichever rank is killed, its worker is, and no rank is left."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing

import pytest

from baton.client.blocking import Client
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.topology import Topology
from baton.wire.messages import ClusterInfo
from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.processes import Ends, Talk, await_workers, children_of

LENGTH = 400
GREEDY = SamplingParams(temperature=0.0)
OPTIONS = ClusterOptions(
    "demo", Topology(("cpu",), ("cpu",)), batch_size=4, dtype="float32", tensor_parallel_size=2
)
ROLES = ("prefill-0", "decode-0")


class Desk:
    """A cluster whose workers have two ranks each, and its client."""

    def __init__(self, cluster: Cluster, client: Client) -> None:
        self.cluster, self.client = cluster, client
        self.notes: list[str] = []

    def check(self, info: ClusterInfo | None) -> None:
        self.notes += self.cluster.check(info)

    def await_both(self, unlike: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Until both workers serve; their names as peers."""
        info = await_workers(self.client, 2, check=self.check, unlike=unlike)
        return tuple(each.worker for each in info.workers)

    def ranks(self) -> dict[str, int]:
        """Every rank's process: decode-0/0, decode-0/1, ..."""
        pids = self.cluster.pids()
        first = {f"{name}/0": pids[name] for name in ROLES}
        return first | {f"{name}/1": children_of(pids[name])["follower"] for name in ROLES}


@pytest.fixture
def desk() -> Iterator[Desk]:
    with Cluster(OPTIONS) as cluster:
        desk = Desk(cluster, Client(cluster.address, down=cluster.down))
        desk.client.supervise = desk.check
        with closing(desk.client):
            yield desk


def test_a_rank_that_is_killed_takes_its_worker_along_and_the_answer_is_whole(desk: Desk) -> None:
    """Under one running request: the second rank of both workers, then the first of the decode worker."""
    workers = desk.await_both()
    talk, ranks = Talk(desk.client), desk.ranks()
    talk.ask("r", calm.PROMPTS[0], LENGTH, GREEDY)
    talk.listen(lambda: len(talk.tokens["r"]) > 5)
    all_ends = Ends(ranks)
    for name in ROLES:
        os.kill(ranks[f"{name}/1"], signal.SIGKILL)
    all_ends.wait(60.0)
    workers += desk.await_both(unlike=workers)
    assert not talk.ends, "the answer was over too soon to lose a worker"
    so_far = len(talk.tokens["r"])
    talk.listen(lambda: len(talk.tokens["r"]) > so_far)
    assert not talk.ends, "the answer was over too soon to lose a worker twice"
    ranks = desk.ranks()
    decode = Ends({name: pid for name, pid in ranks.items() if name.startswith("decode")})
    os.kill(ranks["decode-0/0"], signal.SIGKILL)
    decode.wait(60.0)
    talk.listen(talk.all_ended)
    (right,) = calm.answers(LENGTH, GREEDY)[:1]
    assert talk.texts["r"] == right.text
    why = "rank 1 of this tensor-parallel worker ended (SIGKILL), so the whole worker ends"
    for name in ROLES:
        assert any(note.startswith(f"{name} died (exit code 1: {why}") for note in desk.notes)
    desk.await_both(unlike=workers)
    left = Ends(desk.ranks())
    desk.cluster.stop()
    left.wait()
