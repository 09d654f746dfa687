"""Arms: clusters that differ in one thing alone, a check that they do, and loads driven through them."""

import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field

from baton.client.batch import BatchClient
from baton.client.blocking import Client, Received
from baton.clock import monotonic
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.errors import BatonError, ProtocolError, WorkerLost
from baton.host import core_numbers
from baton.params import GenerationParams
from baton.topology import plan_topology
from baton.wire.messages import ClusterInfo, Emitted, Failed, Finished, Submit
from baton.wire.records import Timings
from sampler.params import SamplingParams
from tools.measure.slo import Trace
from tools.measure.workload import Load, Planned

SILENT_S = 120.0  # no forward takes so long: whoever says nothing for longer will not answer
Enough = Callable[[float, Sequence[Planned]], bool]  # seconds since the beginning, what still runs
GREEDY = SamplingParams(temperature=0.0)


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
    token_ids: list[int] = field(default_factory=list)


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

    def await_ready(self) -> None:
        """Until it works again: after a run that was spoiled by a process that died."""
        self._info = _ready(self._cluster, self._client)

    def pids(self) -> dict[str, int]:
        """The cluster's processes."""
        return self._cluster.pids()

    def drive(self, load: Load, *, enough: Enough | None = None) -> list[Trace]:
        """Send every request when it is due, whatever has become of the others, and take back what
        still runs as soon as that is `enough`. Raises BatonError if a request fails, and if a process
        dies meanwhile: it is started again, but the figures of this run are spoiled."""
        running: dict[str, _Running] = {}
        try:
            return self._drive(load, running, enough)
        except BaseException:
            with suppress(ProtocolError):
                self._abort(running)
            raise

    def _drive(
        self, load: Load, running: dict[str, _Running], enough: Enough | None
    ) -> list[Trace]:
        waiting = list(load.requests)[::-1]
        traces: list[Trace] = []
        run = secrets.token_hex(3)
        begun = heard = time.monotonic()
        while waiting or running:
            now = time.monotonic() - begun
            if enough is not None and enough(now, [each.planned for each in running.values()]):
                waiting, enough = [], None
                self._abort(running)
            while waiting and waiting[-1].at <= now:
                planned = waiting.pop()
                name = f"{run}-{len(waiting)}"
                running[name] = _Running(planned)
                self._client.submit(
                    Submit(
                        name,
                        planned.prompt,
                        GenerationParams(planned.new_tokens, GREEDY, ignore_eos=True),
                    )
                )
            pause = waiting[-1].at - now if waiting else 0.2
            for news in self._client.poll(min(0.2, max(0.0005, pause))):
                heard = time.monotonic()
                self._take(news, heard - begun, running, traces)
            if notes := self._cluster.check():
                raise WorkerLost(f"{self.split.name}: {'; '.join(notes)}")
            if running and time.monotonic() - heard > SILENT_S:
                raise WorkerLost(f"{self.split.name}: nothing was heard for {SILENT_S:g} s")
        return traces

    def _take(
        self, news: Received, at: float, running: dict[str, _Running], traces: list[Trace]
    ) -> None:
        if isinstance(news, Emitted | Finished | Failed) and news.request not in running:
            return  # of a run that was broken off
        match news:
            case Emitted(name, token_ids):
                running[name].times += [at] * len(token_ids)
                running[name].token_ids += token_ids
            case Finished(name, _, timings):
                traces.append(_trace(running.pop(name), timings))
            case Failed(name, code, why):
                raise BatonError(f"{self.split.name}: a request failed ({code}): {why}")

    def _abort(self, names: Collection[str]) -> None:
        for name in names:
            self._client.abort(name)


def options_for(split: Split, *, model: str, dtype: str, streams: int) -> ClusterOptions:
    """What the arm's cluster is started with. `streams`: how many requests may run at once."""
    return ClusterOptions(
        model,
        plan_topology((), (), colocated=split.colocated, gpus=0),
        batch_size=streams,
        dtype=dtype,
        max_num_batched_tokens=split.max_num_batched_tokens,
        prefix_caching=False,  # a load that comes again must cost the same again
    )


def started(
    split: Split, *, model: str, dtype: str, streams: int
) -> AbstractContextManager[RunningArm]:
    """The arm's cluster, ready."""
    return running(split, options_for(split, model=model, dtype=dtype, streams=streams))


@contextmanager
def running(split: Split, options: ClusterOptions) -> Iterator[RunningArm]:
    """A cluster with these options, ready; gone when the block is left."""
    with Cluster(options) as cluster:
        client = Client(cluster.address)
        try:
            yield RunningArm(split, cluster, client, _ready(cluster, client))
        finally:
            client.close()


def _ready(cluster: Cluster, client: Client) -> ClusterInfo:
    batch = BatchClient(client, cluster, job="ready", limit=1, clock=monotonic)
    *_, info = (each for each in batch.await_ready() if isinstance(each, ClusterInfo))
    return info


def _trace(running: _Running, timings: Timings) -> Trace:
    planned = running.planned
    return Trace(
        planned.at,
        tuple(running.times),
        timings,
        planned.watched,
        prompt_tokens=len(planned.prompt),
        token_ids=tuple(running.token_ids),
    )


def use_cores(count: int) -> None:
    """This process and all it starts, on so many cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:count]))
