"""The whole job on GPUs: real processes, one GPU shared by CUDA IPC, or two with a copy between them.

Run where there is a GPU: `pytest tests/gpu -m gpu`, and with two `-m gpu2`.
"""

import time
from collections.abc import Sequence

import pytest
import torch

from baton.client import Client
from baton.cluster import Cluster, ClusterOptions
from baton.topology import Topology
from baton.wire.messages import ClusterInfo, Emitted, Failed, Finished, Submit
from prompts import PROMPTS
from sampler.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0).to_wire()
DEADLINE_S = 100.0

needs_one = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


def answers(topology: Topology, transport: str = "auto") -> tuple[dict[str, list[int]], str, int]:
    """Greedy tokens of every sample prompt, the transport taken, and the bytes that were moved."""
    options = ClusterOptions("demo", topology, 4, dtype="float32", kv_transport=transport)
    deadline = time.monotonic() + DEADLINE_S
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
    ended: list[Finished] = []
    with Cluster(options) as cluster:
        client = Client(cluster.address)
        info = client.info(timeout_s=10)
        while not info.ready:
            assert time.monotonic() < deadline, info.waiting_for
            cluster.check(info)
            info = next((n for n in client.poll(0.1) if isinstance(n, ClusterInfo)), info)
        for index, prompt in enumerate(PROMPTS):
            client.submit(Submit(str(index), prompt, None, 60, GREEDY))
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
    return tokens, ",".join(sorted(ways)), sum(e.timings.moved_bytes for e in ended)


def same_as_on_the_cpu(found: dict[str, Sequence[int]]) -> bool:
    cpu, _, _ = answers(Topology(("cpu",), ("cpu",)))
    return found == cpu


@pytest.mark.gpu
@needs_one
def test_on_one_gpu_the_pool_is_shared_and_nothing_is_copied() -> None:
    tokens, way, moved = answers(Topology(("cuda:0",), ("cuda:0",)))
    assert (way, moved) == ("cuda_ipc", 0)
    assert same_as_on_the_cpu(tokens)


@pytest.mark.gpu
@needs_one
@pytest.mark.parametrize("transport", ["pinned", "frames"])
def test_on_one_gpu_the_copying_ways_give_the_same(transport: str) -> None:
    tokens, way, moved = answers(Topology(("cuda:0",), ("cuda:0",)), transport)
    assert way == transport
    assert moved > 0
    assert tokens == answers(Topology((), ("cuda:0",), colocated=True))[0]


@pytest.mark.gpu2
@needs_two
@pytest.mark.parametrize("transport", ["cuda_ipc", "pinned", "frames"])
def test_between_two_gpus_every_way_gives_the_same(transport: str) -> None:
    tokens, way, moved = answers(Topology(("cuda:0",), ("cuda:1",)), transport)
    assert way == transport
    assert moved > 0
    assert tokens == answers(Topology((), ("cuda:1",), colocated=True))[0]
