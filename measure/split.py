"""The arms of `bench disagg`: clusters that differ in the split alone, and a check that they do."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from baton.client import Client
from baton.cluster import Cluster, ClusterOptions
from baton.errors import BatonError, InputError
from baton.host import core_numbers
from baton.topology import Topology, plan_topology
from baton.wire.messages import ClusterInfo, Emitted, Failed, Finished, Submit, Timings
from measure.slo import Trace
from measure.workload import Load, Planned
from sampler.params import SamplingParams

READY_S = 300.0
GREEDY = SamplingParams(temperature=0.0).to_wire()


@dataclass(frozen=True, slots=True)
class Split:
    """What arms may differ in."""

    name: str
    colocated: bool
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class Setting:
    """What they may not differ in, as the running cluster says it."""

    model: str
    fingerprint: str
    dtype: str
    context: int
    computed: str
    cores: tuple[int, ...]
    batch_size: int
    sampling: str


def differences(settings: dict[str, Setting]) -> list[str]:
    """In words, with both values named; empty if all are the same."""
    (first, reference), *others = settings.items()
    found = []
    for name, setting in others:
        for key, value in asdict(setting).items():
            wanted = asdict(reference)[key]
            if value != wanted:
                found.append(f"{key}: {wanted!r} in {first}, {value!r} in {name}")
    return found


@dataclass(slots=True)
class _Running:
    planned: Planned
    times: list[float] = field(default_factory=list)


class RunningArm:
    """A cluster of its own, and one client."""

    def __init__(self, split: Split, cluster: Cluster, client: Client, info: ClusterInfo) -> None:
        self.split = split
        self._cluster = cluster
        self._client = client
        self._info = info

    def setting(self) -> Setting:
        """For differences()."""
        info = self._info
        how = ", ".join(dict.fromkeys(worker.how for worker in info.workers))
        cores, size = core_numbers(), self._cluster.options.batch_size
        return Setting(
            *(info.model, info.fingerprint, info.dtype, info.context, how, cores, size, str(GREEDY))
        )

    def drive(self, load: Load) -> list[Trace]:
        """Send every request when it is due, whatever has become of the others."""
        waiting = list(load.requests)[::-1]
        running: dict[str, _Running] = {}
        traces: list[Trace] = []
        run = secrets.token_hex(3)
        begun = time.monotonic()
        while waiting or running:
            now = time.monotonic() - begun
            while waiting and waiting[-1].at <= now:
                planned = waiting.pop()
                name = f"{run}-{len(waiting)}"
                running[name] = _Running(planned)
                self._client.submit(
                    Submit(name, None, planned.prompt, planned.new_tokens, GREEDY, (), True)
                )
            pause = waiting[-1].at - now if waiting else 0.2
            for news in self._client.poll(min(0.2, max(0.0005, pause))):
                at = time.monotonic() - begun
                match news:
                    case Emitted(name, token_ids):
                        running[name].times += [at] * len(token_ids)
                    case Finished(name, _, timings):
                        traces.append(_trace(running.pop(name), timings))
                    case Failed(name, code, why):
                        raise BatonError(f"{self.split.name}: a request failed ({code}): {why}")
            self._cluster.check()
        return traces


@contextmanager
def started(
    split: Split, *, model: str, dtype: str, streams: int, topology: Topology | None = None
) -> Iterator[RunningArm]:
    """The arm's cluster, ready. `streams`: how many requests may run at once. `topology` is a pair
    of workers on the CPU if it is not given."""
    topology = topology or plan_topology((), (), colocated=split.colocated, gpus=0)
    options = ClusterOptions(
        model,
        topology,
        batch_size=streams,
        batch_window_ms=0.0,
        dtype=dtype,
        max_num_batched_tokens=split.max_num_batched_tokens,
        prefix_caching=False,  # a load that comes again must cost the same again
    )
    with Cluster(options) as cluster:
        client = Client(cluster.address)
        try:
            yield RunningArm(split, cluster, client, _ready(cluster, client))
        finally:
            client.close()


def _ready(cluster: Cluster, client: Client) -> ClusterInfo:
    deadline = time.monotonic() + READY_S
    info = client.info(timeout_s=READY_S)
    while not info.ready:
        cluster.check()
        if time.monotonic() > deadline:
            raise InputError(f"the cluster is not ready: it waits for {info.waiting_for}")
        for news in client.poll(0.2):
            info = news if isinstance(news, ClusterInfo) else info
    return info


def _trace(running: _Running, timings: Timings) -> Trace:
    planned = running.planned
    return Trace(planned.at, tuple(running.times), timings, planned.watched)


def use_cores(count: int) -> None:
    """This process and all it starts, on so many cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:count]))
