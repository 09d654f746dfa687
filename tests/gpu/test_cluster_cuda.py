"""The whole job on GPUs: real processes, one GPU shared by CUDA IPC, or two with a copy between them.

Run where there is a GPU: `pytest tests/gpu -m gpu`, and with two `-m gpu2`.
"""

import time
from dataclasses import dataclass

import pytest
import torch

from baton.client.blocking import Client
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.params import GenerationParams
from baton.topology import Topology
from baton.wire.messages import ClusterInfo, Emitted, Failed, Finished, Submit
from prompts import PROMPTS
from sampler.params import SamplingParams
from tests.patience import PATIENCE_S

GREEDY = SamplingParams(temperature=0.0)

needs_one = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@dataclass(frozen=True, slots=True)
class Answers:
    """Greedy tokens of every sample prompt, and how they came about."""

    tokens: dict[str, list[int]]
    way: str
    moved: int
    preemptions: int
    how: str


def answers(topology: Topology, transport: str = "auto", memory: int | None = None) -> Answers:
    """`memory`: bytes of the KV pool, if it is to be small."""
    options = ClusterOptions(
        "demo", topology, 4, dtype="float32", kv_transport=transport, kv_cache_memory_bytes=memory
    )
    deadline = time.monotonic() + PATIENCE_S
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
    ended: list[Finished] = []
    with Cluster(options) as cluster:
        client = Client(cluster.address)
        info = client.info(timeout_s=PATIENCE_S)
        while not info.ready:
            assert time.monotonic() < deadline, info.waiting_for
            cluster.check(info)
            info = next((n for n in client.poll(0.1) if isinstance(n, ClusterInfo)), info)
        for index, prompt in enumerate(PROMPTS):
            client.submit(Submit(str(index), prompt, GenerationParams(60, GREEDY)))
        while len(ended) < len(PROMPTS):
            assert time.monotonic() < deadline, "not all requests ended"
            for news in client.poll(0.1):
                assert not isinstance(news, Failed), news
                if isinstance(news, Emitted):
                    tokens[news.request] += news.token_ids
                elif isinstance(news, Finished):
                    ended.append(news)
        client.close()
    ways = {way.split()[0] for worker in info.workers for way in worker.transports}
    return Answers(
        tokens,
        ",".join(sorted(ways)),
        sum(e.timings.moved_bytes for e in ended),
        sum(e.timings.preemptions for e in ended),
        " | ".join(worker.how for worker in info.workers),
    )


@pytest.mark.gpu
@needs_one
def test_on_one_gpu_the_pool_is_shared_and_nothing_is_copied() -> None:
    found = answers(Topology(("cuda:0",), ("cuda:0",)))
    assert (found.way, found.moved) == ("cuda_ipc", 0)
    assert "CUDA graphs" in found.how
    assert found.tokens == answers(Topology(("cpu",), ("cpu",))).tokens


@pytest.mark.gpu
@needs_one
def test_captured_steps_go_on_after_giving_way_in_a_full_pool() -> None:
    found = answers(Topology(("cuda:0",), ("cuda:0",)), memory=1_800_000)  # 13 blocks
    assert found.preemptions
    assert "CUDA graphs" in found.how
    assert found.tokens == answers(Topology((), ("cuda:0",), colocated=True)).tokens


@pytest.mark.gpu
@needs_one
@pytest.mark.parametrize("transport", ["pinned", "frames"])
def test_on_one_gpu_the_copying_ways_give_the_same(transport: str) -> None:
    found = answers(Topology(("cuda:0",), ("cuda:0",)), transport)
    assert found.way == transport
    assert found.moved > 0
    assert found.tokens == answers(Topology((), ("cuda:0",), colocated=True)).tokens


@pytest.mark.gpu2
@needs_two
@pytest.mark.parametrize("transport", ["cuda_ipc", "pinned", "frames"])
def test_between_two_gpus_every_way_gives_the_same(transport: str) -> None:
    found = answers(Topology(("cuda:0",), ("cuda:1",)), transport)
    assert found.way == transport
    assert found.moved > 0
    assert found.tokens == answers(Topology((), ("cuda:1",), colocated=True)).tokens


def test_the_look_at_a_cluster_works_where_there_is_no_gpu() -> None:
    """So that a slip in this file shows: on the CPU, in a pool that is too small."""
    if torch.cuda.device_count():
        pytest.skip("the tests above run")
    found = answers(Topology(("cpu",), ("cpu",)), memory=1_800_000)
    assert (found.way, found.moved) == ("shm", 0)
    assert found.preemptions
