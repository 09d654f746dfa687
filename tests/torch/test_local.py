"""LocalCluster: the real nodes and the real model in one process, one message or one forward a step."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.local import Delivered, LocalCluster, LocalOptions, Worked
from baton.params import GenerationParams
from baton.wire.messages import Emitted, Failed, Finished, Message, Submit
from baton.wire.node import Effect, Node
from decode_worker.worker import DecodeWorker
from sampler.params import SamplingParams
from tests.cluster import calm
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "In the future, artificial intelligence will"
LONG = " ".join([PROMPT] * 12)


def greedy(length: int, **options: Any) -> GenerationParams:
    return GenerationParams(length, SamplingParams(temperature=0), **options)


class HandClock:
    """A clock that stands still but for what a test adds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Sluggish:
    """A node whose every step takes 100 seconds."""

    def __init__(self, inner: Node, clock: HandClock) -> None:
        self.inner, self.clock = inner, clock
        self.handle, self.due = inner.handle, inner.due

    def step(self, now: float) -> list[Effect]:
        self.clock.now += 100.0
        return self.inner.step(now)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    cluster = LocalCluster(LocalOptions("demo", max_num_seqs=8, max_num_batched_tokens=64))
    yield cluster
    cluster.close()


def drained(cluster: LocalCluster) -> list[Message]:
    """Everything for the client until all requests have ended and all nodes are at rest."""
    received: list[Message] = []
    while len(cluster.router.ledger) or cluster.step() is not None:
        received += cluster.poll(0.01)
    return received + cluster.poll(0.0)


def tokens(received: list[Message], request: str) -> list[int]:
    assert not any(isinstance(each, Failed) for each in received), received
    emitted = [each for each in received if isinstance(each, Emitted) and each.request == request]
    return [token for each in emitted for token in each.token_ids]


def ended(received: list[Message]) -> dict[str, Finished]:
    return {each.request: each for each in received if isinstance(each, Finished)}


def idle(cluster: LocalCluster) -> bool:
    """Every block is free or kept as a prefix."""
    decodes = [node for node in cluster.nodes.values() if isinstance(node, DecodeWorker)]
    return all(node.table.idle for node in decodes)


def asked(cluster: LocalCluster, *prompts: str, length: int = 12) -> list[list[int]]:
    cluster.submit(*(Submit(f"q{i}", each, greedy(length)) for i, each in enumerate(prompts)))
    received = drained(cluster)
    assert idle(cluster)
    return [tokens(received, f"q{i}") for i in range(len(prompts))]


def test_tokens_are_those_of_transformers(cluster: LocalCluster) -> None:
    model = calm.demo()
    prompts = model.clear_prompts([2, 17, 100], 16)  # in chunks of 64 tokens, too
    cluster.submit(
        *(Submit(f"q{i}", tuple(ids), greedy(16, ignore_eos=True)) for i, ids in enumerate(prompts))
    )
    received = drained(cluster)
    for i, ids in enumerate(prompts):
        assert tokens(received, f"q{i}") == model.generate(ids, 16).tokens


def test_prefill_writes_into_the_pool_of_decode(cluster: LocalCluster) -> None:
    cluster.submit(Submit("q", LONG, greedy(2, cache_salt="in place")))
    timings = ended(drained(cluster))["q"].timings
    assert timings.prefill_s > 0
    assert timings.kv_bytes > 0
    assert timings.moved_bytes == 0


def test_a_step_moves_one_message_or_lets_one_node_work(cluster: LocalCluster) -> None:
    cluster.submit(Submit("q", PROMPT, greedy(1, cache_salt="step")))
    seen = []
    while (done := cluster.step()) is not None:
        assert isinstance(done, Delivered | Worked)
        seen.append(str(done))
    cluster.poll(0.0)
    messages = [
        "client -> router: Submit",
        "router -> decode-0: Reserve",
        "decode-0 -> router: Reserved",
        "router -> prefill-0: Fill",
        "prefill-0 -> router: Filled",
        "router -> decode-0: Start",
        "decode-0 -> router: Decoded",
        "router -> client: Emitted",
        "router -> client: Finished",
    ]
    assert [each for each in seen if each in messages] == messages
    forward = seen.index("prefill-0 works", seen.index("router -> prefill-0: Fill"))
    assert forward < seen.index("prefill-0 -> router: Filled")


@pytest.mark.parametrize(
    ("prefills", "decodes"), [(0, 1), (2, 2)], ids=["colocated", "two of each"]
)
def test_other_numbers_of_workers_give_the_same_tokens(
    cluster: LocalCluster, prefills: int, decodes: int
) -> None:
    prompts = [PROMPT, LONG, "Once upon a time", "The"]
    options = LocalOptions("demo", prefills=prefills, decodes=decodes, max_num_seqs=4)
    other = LocalCluster(options)
    try:
        assert asked(other, *prompts) == asked(cluster, *prompts)
    finally:
        other.close()


def test_pauses_between_steps_change_nothing(cluster: LocalCluster) -> None:
    """As in a debugger, or days without a request: longer than any patience."""
    clock = HandClock()
    paused = LocalCluster(LocalOptions("demo", max_num_seqs=2), clock=clock)
    try:
        paused.submit(Submit("q", PROMPT, greedy(6)))
        while paused.step() is not None:
            clock.now += 100_000.0
        received = paused.poll(0.0)
        assert tokens(received, "q") == asked(cluster, PROMPT, length=6)[0]
        assert ended(received)["q"].timings.retries == 0
    finally:
        paused.close()


@pytest.mark.parametrize("role", ["prefill-0", "decode-0"])
def test_a_pause_within_a_step_changes_nothing(cluster: LocalCluster, role: str) -> None:
    clock = HandClock()
    paused = LocalCluster(LocalOptions("demo", max_num_seqs=2), clock=clock)
    paused.nodes[role] = Sluggish(paused.nodes[role], clock)
    try:
        paused.submit(Submit("q", PROMPT, greedy(6)))
        received: list[Message] = []
        while "q" not in ended(received):
            if paused.step() is None:
                paused._spent_s += 0.01
            received += paused.poll(0.0) if paused._inbox else []
        assert tokens(received, "q") == asked(cluster, PROMPT, length=6)[0]
        assert ended(received)["q"].timings.retries == 0
    finally:
        paused.close()


def test_deadlines_end_requests_in_the_time_of_the_cluster() -> None:
    """The calls are those of a router elsewhere. Time between steps does not count."""
    clock = HandClock()
    small = LocalCluster(LocalOptions("demo", max_num_seqs=1), clock=clock)
    try:
        small.submit(
            Submit("runs", PROMPT, greedy(20, ignore_eos=True), "a", timeout_s=50.0),
            Submit("waits", PROMPT, greedy(20), "b", queue_timeout_s=5.0),
        )
        for _ in range(20):
            small.step()
            clock.now += 100.0
        assert len(small.router.ledger) == 2
        for left in (1, 0):
            small._spent_s += 5.0 if left else 45.0
            while len(small.router.ledger) > left:
                assert small.step() is not None
        while small.step() is not None:
            pass
        failed = [each for each in small.poll(0.0) if isinstance(each, Failed)]
        assert [(each.request, each.code) for each in failed] == [
            ("waits", "queue_timeout"), ("runs", "deadline_exceeded"),
        ]  # fmt: skip
        assert idle(small)
        assert (small.info().ready, small.info().degraded) == (True, "")
    finally:
        small.close()


def test_an_aborted_request_gives_its_blocks_back(cluster: LocalCluster) -> None:
    for steps in range(0, 40, 3):
        cluster.submit(Submit("q", LONG, greedy(500, ignore_eos=True)))
        for _ in range(steps):
            cluster.step()
        cluster.abort("q")
        assert ended(drained(cluster))["q"].reason == "abort"
        assert idle(cluster)


def test_what_a_node_raises_is_raised_at_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = LocalCluster(LocalOptions("demo", max_num_seqs=1))
    try:
        model = broken.nodes["prefill-0"]._model  # type: ignore[attr-defined]

        def fail(*_: object) -> None:
            raise ZeroDivisionError("in the forward")

        monkeypatch.setattr(model, "fill", fail)
        broken.submit(Submit("q", PROMPT, greedy(4)))
        with pytest.raises(ZeroDivisionError, match="in the forward"):
            drained(broken)
    finally:
        broken.close()


def test_the_example_of_the_reading_room_runs() -> None:
    document = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    example = document.partition("```python\n")[2].partition("```")[0]
    named = re.findall(r"`([\w-]+ (?:-> [\w-]+: \w+|works))`", document.partition("It prints")[2])
    ran = subprocess.run(
        [sys.executable, "-c", example],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    lines = iter(ran.stdout.splitlines())
    assert len(named) > 5
    assert all(each in lines for each in named)  # in this order
    assert "Finished(request='r1', reason='length'" in ran.stdout
