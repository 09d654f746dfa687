"""Workers of two ranks in a real cluster: a rank that is killed ends its worker, and no rank is left."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing

import pytest

from baton.client.batch import Completion, Streamed, complete
from baton.client.blocking import Client, Notice
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.params import GenerationParams
from baton.topology import Topology
from baton.wire.messages import Submit
from sampler.params import SamplingParams
from tests.cluster.points import SLOWLY, Points, failpoints
from tests.cluster.processes import Ends, await_workers, children_of

PROMPT, LENGTH = "In the future, artificial intelligence will", 150
OPTIONS = ClusterOptions(
    "demo", Topology(("cpu",), ("cpu",)), batch_size=4, dtype="float32", tensor_parallel_size=2
)
ROLES = ("prefill-0", "decode-0")
GREEDY = GenerationParams(LENGTH, SamplingParams(temperature=0.0), ignore_eos=True)


@pytest.fixture
def points() -> Iterator[Points]:
    with failpoints() as made:
        yield made


def undisturbed(client: Client) -> tuple[int, ...]:
    """The tokens of an answer under which nobody is killed."""
    events = complete(client, {0: Submit("calm", PROMPT, GREEDY)}, limit=1)
    (done,) = [each for each in events if isinstance(each, Completion)]
    return done.token_ids


def ranks_of(cluster: Cluster, name: str) -> dict[str, int]:
    """The processes of a worker."""
    first = cluster.pids()[name]
    return {f"{name}/0": first, f"{name}/1": children_of(first)["follower"]}


def kill(victims: list[int], ends: dict[str, int]) -> None:
    """All of `ends` end with the victims."""
    waiting = Ends(ends)
    for each in victims:
        os.kill(each, signal.SIGKILL)
    waiting.wait()


def test_a_rank_that_is_killed_takes_its_worker_along_and_the_answer_is_whole(
    points: Points, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under one running request: the second rank of both workers. Then the first of the decode worker."""
    notes: list[str] = []
    streamed = 0
    for name, value in points.environment.items():
        monkeypatch.setenv(name, value)
    with (
        Cluster(OPTIONS) as cluster,
        closing(Client(cluster.address, supervise=cluster.check, down=cluster.down)) as client,
    ):
        info = await_workers(client, 2, check=cluster.check)
        assert all("2 ranks" in worker.how for worker in info.workers)
        right = undisturbed(client)
        assert len(right) == LENGTH
        points.arm(SLOWLY)
        for event in complete(client, {0: Submit("r", PROMPT, GREEDY)}, limit=1):
            streamed += isinstance(event, Streamed)
            if isinstance(event, Notice):
                notes.append(event.text)
            elif isinstance(event, Streamed) and streamed == 2:
                prefill, decode = (ranks_of(cluster, name) for name in ROLES)
                kill([prefill["prefill-0/1"], decode["decode-0/1"]], prefill | decode)
                points.disarm(SLOWLY)
            elif isinstance(event, Completion):
                assert event.token_ids == right
                assert event.timings.retries >= 1, "the answer was over too soon"
        why = "rank 1 of this tensor-parallel worker ended (SIGKILL), so the whole worker ends"
        for name in ROLES:
            assert any(note.startswith(f"{name} died (exit code 1: {why}") for note in notes), notes
        await_workers(client, 2, check=cluster.check)
        decode = ranks_of(cluster, "decode-0")
        left = Ends(ranks_of(cluster, "prefill-0") | decode)
        kill([decode["decode-0/0"]], decode)
        assert any(note.startswith("decode-0 died (signal 9") for note in cluster.check())
        cluster.stop()
        left.wait()
