"""Two prefill and two decode workers in processes of their own; they are killed, stopped, replaced."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from baton.client.batch import Completion, Event, Streamed, complete
from baton.client.blocking import Client, Notice
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.params import GenerationParams
from baton.topology import Topology
from baton.wire import messages as msg
from baton.wire.messages import Submit
from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.points import Points, failpoints
from tests.cluster.processes import ROOT, Ends, await_workers, shared_memory, short_folder
from tests.patience import until

LENGTH = 40
SAMPLING = SamplingParams(temperature=0.9, top_k=60, top_p=0.95, repetition_penalty=1.1, seed=5)
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
OPTIONS = ClusterOptions(
    "demo", Topology(("cpu", "cpu"), ("cpu", "cpu")), batch_size=8, max_num_batched_tokens=16
)


class ImpatientCluster(Cluster):
    """Its workers are given up sooner; everything else is the real thing."""

    def commands(self) -> list[tuple[str, list[str]]]:
        return [
            (name, command if name == "router" else ["tests.cluster.impatient", *command])
            for name, command in super().commands()
        ]


@dataclass
class Desk:
    """A cluster, a client, and whoever looks after both."""

    cluster: Cluster
    client: Client
    shared_before: set[str]  # what lay in /dev/shm
    points: Points
    jobs: int = 0
    notes: list[str] = field(default_factory=list)

    def await_all(self, unlike: tuple[str, ...] = ()) -> dict[str, str]:
        """Until all four are at work. Their names as peers, which are new with each process."""
        info = await_workers(self.client, 4, check=self.cluster.check, unlike=unlike)
        self.cluster.check(info)
        return {each.worker.rpartition(".")[0]: each.worker for each in info.workers}

    def run(
        self, ask: GenerationParams, at: Callable[[int, Event], None] = lambda n, event: None
    ) -> list[Completion]:
        """Every task's completion. `at` sees each event, with the tokens that have come."""
        self.jobs += 1
        self.notes = []
        self.client.await_ready()
        submits = {
            i: Submit(f"job{self.jobs}-{i}", prompt, ask) for i, prompt in enumerate(calm.PROMPTS)
        }
        done: dict[int, Completion] = {}
        tokens = 0
        for event in complete(self.client, submits, limit=len(submits)):
            if isinstance(event, Streamed):
                tokens += event.tokens
            if isinstance(event, Notice):
                self.notes.append(event.text)
            if isinstance(event, Completion):
                done[event.index] = event
            at(tokens, event)
        return [done[i] for i in submits]

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.cluster.pids()[name], number)


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    shared = shared_memory()
    with failpoints() as points, pytest.MonkeyPatch.context() as patch:
        for name, value in points.environment.items():
            patch.setenv(name, value)
        with ImpatientCluster(OPTIONS) as cluster:
            client = Client(cluster.address, supervise=cluster.check)
            try:
                yield Desk(cluster, client, shared, points)
            finally:
                client.close()


def once(condition: Callable[[int, Event], bool], act: Callable[[], None]) -> Callable[..., None]:
    """Act the first time the condition holds."""
    done: list[bool] = []

    def at(tokens: int, event: Event) -> None:
        if not done and condition(tokens, event):
            done.append(True)
            act()

    return at


def check_calm(completions: list[Completion], length: int, sampling: SamplingParams) -> None:
    """What came is what an undisturbed run says: ids, text and reason."""
    expected = calm.answers(length, sampling)
    for completion, calmly in zip(completions, expected, strict=True):
        assert completion.token_ids == calmly.tokens
        assert completion.text == calmly.text
        assert completion.finish_reason == calmly.reason


SAMPLED = GenerationParams(LENGTH, SAMPLING)


def test_greedy_and_sampled_are_those_of_one_process(desk: Desk) -> None:
    desk.await_all()
    greedy = SamplingParams(temperature=0)
    check_calm(desk.run(GenerationParams(LENGTH, greedy)), LENGTH, greedy)
    completions = desk.run(SAMPLED)
    check_calm(completions, LENGTH, SAMPLING)
    assert {each.timings.retries for each in completions} == {0}
    assert {each.timings.moved_bytes for each in completions} == {0}  # shared memory
    assert desk.notes == []


def test_prefill_killed_with_work_on_it(desk: Desk) -> None:
    """It is stopped first, so that what it has been given is surely still on it when it dies."""
    before, pid = desk.await_all(), desk.cluster.pids()["prefill-0"]
    desk.signal("prefill-0", signal.SIGSTOP)
    kill = once(lambda tokens, _: tokens >= 1, lambda: desk.signal("prefill-0", signal.SIGKILL))
    completions = desk.run(SAMPLED, kill)
    check_calm(completions, LENGTH, SAMPLING)
    assert max(each.timings.retries for each in completions) >= 1
    assert desk.await_all(unlike=(before["prefill-0"],))["prefill-0"] != before["prefill-0"]
    assert desk.cluster.pids()["prefill-0"] != pid


def test_both_decode_workers_killed_at_different_moments(desk: Desk) -> None:
    before, pids = desk.await_all(), desk.cluster.pids()
    desk.points.arm(
        "decode.step:kill:10", "decode.step:kill:20"
    )  # one each: the first is dead then
    completions = desk.run(SAMPLED)
    check_calm(completions, LENGTH, SAMPLING)
    assert max(each.timings.retries for each in completions) >= 1
    killed = desk.points.taken(2)
    victims = [name for name in WORKERS if pids[name] in killed]
    assert victims == ["decode-0", "decode-1"], "and not one of them twice"
    for name in victims:
        news = f"{name} died (signal 9) and is started again"
        assert any(note.startswith(news) for note in desk.notes), desk.notes
    desk.await_all(unlike=tuple(before[name] for name in victims))
    after = desk.cluster.pids()
    assert not {after[name] for name in WORKERS} & set(killed)


def test_workers_that_stop_answering_are_given_up_killed_and_replaced(desk: Desk) -> None:
    before = desk.await_all()
    pids = desk.cluster.pids()
    ends = {name: Ends({name: pids[name]}) for name in WORKERS}
    desk.points.arm("decode.step:stop:5", "prefill.chunk:stop:2")
    completions = desk.run(SAMPLED)
    check_calm(completions, LENGTH, SAMPLING)
    stopped = desk.points.taken(2)
    victims = [name for name in WORKERS if pids[name] in stopped]
    assert sorted(name.partition("-")[0] for name in victims) == ["decode", "prefill"]
    desk.await_all(unlike=tuple(before[name] for name in victims))
    for name in victims:
        ends[name].wait()
    assert max(each.timings.retries for each in completions) >= 1


def test_the_router_killed_in_the_middle(desk: Desk) -> None:
    desk.await_all()
    pids = desk.cluster.pids()
    desk.points.arm("received.Decoded:kill:20")
    completions = desk.run(SAMPLED)
    check_calm(completions, LENGTH, SAMPLING)
    assert desk.points.taken(1) == [pids["router"]]
    assert any("begin again" in note for note in desk.notes)
    desk.await_all()
    after = desk.cluster.pids()
    assert {name for name in pids if pids[name] != after[name]} == {"router"}


def test_stopping_in_the_middle_leaves_nothing(desk: Desk) -> None:
    """Not even of a worker that cannot hear, with requests running. (The last of this cluster.)"""
    desk.await_all()
    folder, ends = desk.cluster.run_dir, Ends(desk.cluster.pids())
    assert (folder / "router.sock").exists()
    for index, prompt in enumerate(calm.PROMPTS):
        desk.client.submit(Submit(f"last-{index}", prompt, GenerationParams(LENGTH)))
    until(lambda: [e for e in desk.client.poll(0.1) if isinstance(e, msg.Emitted)], "tokens")
    desk.signal("decode-0", signal.SIGSTOP)
    desk.cluster.stop()
    ends.wait()
    assert desk.cluster.pids() == {}
    assert not folder.exists()
    assert shared_memory() <= desk.shared_before


PARENT = """
import sys
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.topology import Topology
cluster = Cluster(ClusterOptions("demo", Topology(("cpu",), ("cpu",)), batch_size=4))
cluster.start()
print(*(f"{name}={pid}" for name, pid in cluster.pids().items()), flush=True)
sys.stdin.read()
"""


def test_when_the_parent_is_killed_no_child_is_left() -> None:
    """At once after their start, when they have hardly begun: the worst moment."""
    with short_folder() as folder:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(folder)},
            text=True,
        )
        with parent:
            assert parent.stdout is not None
            started = dict(word.split("=") for word in parent.stdout.readline().split())
            assert list(started) == ["router", "prefill-0", "decode-0"]
            ends = Ends({name: int(pid) for name, pid in started.items()})
            parent.kill()
        ends.wait()
