"""A router whose loop is wedged while ZeroMQ still answers, and an HTTP server that is stopped while its
listening socket does. The other way round: row F5 of the fault battery."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from baton.client.batch import Completion, complete
from baton.client.blocking import Client
from baton.cluster import stuck
from baton.cluster.options import ClusterOptions
from baton.cluster.serving import ServingCluster, serving_cluster
from baton.cluster.supervisor import Cluster
from baton.failpoint import VARIABLE
from baton.params import GenerationParams
from baton.topology import Topology
from baton.wire.messages import ClusterInfo, Submit
from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.processes import await_workers
from tests.patience import until

LENGTH = 20
GREEDY = SamplingParams(temperature=0.0)
OPTIONS = ClusterOptions("demo", Topology(("cpu",), ("cpu",)), batch_size=4)
SHORT_S = 5.0  # still far more than a turn of either loop on a busy machine


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of failpoints, and short limits."""
    monkeypatch.setenv(VARIABLE, f"@{tmp_path}")
    for role in stuck.STUCK_S:
        monkeypatch.setitem(stuck.STUCK_S, role, SHORT_S)
    return tmp_path


def test_a_wedged_router_is_replaced_and_nothing_is_lost(points: Path) -> None:
    notes: list[str] = []
    with Cluster(OPTIONS, lasting=True) as cluster:

        def check(info: ClusterInfo | None) -> list[str]:
            notes.extend(said := cluster.check(info))
            return said

        with closing(Client(cluster.address, supervise=check, down=cluster.down)) as client:
            await_workers(client, 2)
            before = cluster.pids()
            (points / "received.Submit:wedge:2").touch()
            submits = {
                index: Submit(f"r{index}", prompt, GenerationParams(LENGTH, GREEDY))
                for index, prompt in enumerate(calm.PROMPTS)
            }
            done = [e for e in complete(client, submits, limit=4) if isinstance(e, Completion)]
            after = cluster.pids()
    texts = [each.text for each in sorted(done, key=lambda each: each.index)]
    assert texts == [each.text for each in calm.answers(LENGTH, GREEDY)]
    (note,) = notes
    assert note.startswith("router died (no sign of life for ")
    assert [name for name in before if after[name] != before[name]] == ["router"]


@pytest.fixture
def serving(points: Path) -> Iterator[tuple[ServingCluster, list[str]]]:
    notes: list[str] = []
    with serving_cluster(OPTIONS, limit=4, say=notes.append) as running:
        yield running, notes


def test_a_stopped_server_is_replaced_and_the_next_request_waits_for_it(
    serving: tuple[ServingCluster, list[str]],
) -> None:
    running, notes = serving
    before = running.cluster.pids()
    body = {"model": "demo", "prompt": calm.PROMPTS[0], "max_tokens": LENGTH, "temperature": 0}
    os.kill(before["server"], signal.SIGSTOP)  # who connects waits in the listening socket's queue
    with ThreadPoolExecutor(1) as asking:
        asked = asking.submit(running.http.ask, "/v1/completions", body)

        def over() -> bool:
            """Supervises meanwhile."""
            running.supervise()
            return asked.done()

        until(over, "an answer")
        answer = asked.result()
    assert answer.status == 200, answer
    assert answer.body["choices"][0]["text"] == calm.answers(LENGTH, GREEDY)[0].text
    (note,) = notes
    assert note.startswith("server died (no sign of life for ")
    after = running.cluster.pids()
    assert [name for name in before if after[name] != before[name]] == ["server"]
