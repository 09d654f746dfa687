"""Arms: clusters that differ in one thing, a check that nothing else differs, and the load driver."""

import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field

from baton.client.blocking import Client, Notice, Received
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.errors import BatonError, ProtocolError, WorkerLost
from baton.host import core_numbers
from baton.params import GenerationParams
from baton.topology import plan_topology
from baton.wire.messages import ClusterInfo, Emitted, Failed, Finished, Observed, Submit
from baton.wire.records import Timings
from sampler.params import SamplingParams
from tools.measure.slo import Trace
from tools.measure.workload import Load, Planned

PD, COLOCATED, CHUNKED, ADAPTIVE = "P/D", "colocated", "colocated, chunked", "adaptive"
WHOLE_PROMPTS = 1 << 14
"""Token budget of a step without chunking: several whole prompts fit. A larger number is no better: the
router allows a silence of several steps, and refuses a worker that promises a million tokens a step."""

SILENT_S = 120.0  # longer than any forward: an arm that is silent for longer is lost
Enough = Callable[
    [float, Sequence[Planned]], bool
]  # (seconds since the beginning, running requests)
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Split:
    """What arms may differ in. `max_num_batched_tokens` is the token budget of a step."""

    name: str
    colocated: bool
    max_num_batched_tokens: int
    role_policy: str = "split"  # --role-policy


def three_splits(prefill_tokens: int, *, chunk: int, context: int = 0) -> list[Split]:
    """P/D, colocated, and colocated with chunked prefill. `prefill_tokens` and `chunk` are the token
    budgets of a step in the first and the last. The second fits a prompt of `context` tokens."""
    return [
        Split(PD, False, prefill_tokens),
        Split(COLOCATED, True, max(WHOLE_PROMPTS, context)),
        Split(CHUNKED, True, chunk),
    ]


def adaptive_split(prefill_tokens: int) -> Split:
    """P/D's workers, and the router decides for each request who fills its prompt."""
    return Split(ADAPTIVE, False, prefill_tokens, "adaptive")


@dataclass(frozen=True, slots=True)
class Setting:
    """What arms must have in common, as the running cluster reports it."""

    model: str
    fingerprint: str
    dtype: str
    context: int
    computed: str
    cores: tuple[int, ...]
    batch_size: int
    sampling: str


def differences(settings: dict[str, Setting]) -> list[str]:
    """The differences in words, with both values; empty if all settings are equal."""
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
    """A running cluster with one client."""

    def __init__(self, split: Split, cluster: Cluster, client: Client, info: ClusterInfo) -> None:
        self.split = split
        self._cluster = cluster
        self._client = client
        self._info = info
        self.decided: dict[tuple[str, str], int] = {}  # prompts filled, by role and cause

    def observed(self, message: Observed) -> None:
        """What the router tells an observer."""
        if message.counts is not None:
            self.decided = {(d.role, d.cause): d.requests for d in message.counts.decided}

    def setting(self) -> Setting:
        """The settings that differences() compares."""
        info = self._info
        how = ", ".join(dict.fromkeys(worker.how for worker in info.workers))
        cores, size = core_numbers(), self._cluster.options.batch_size
        return Setting(
            *(info.model, info.fingerprint, info.dtype, info.context, how, cores, size, str(GREEDY))
        )

    @property
    def options(self) -> ClusterOptions:
        """Of its cluster."""
        return self._cluster.options

    def await_ready(self) -> None:
        """Wait until the cluster is ready again, after the death of a process spoiled a run."""
        self._info = self._client.await_ready()

    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return self._cluster.pids()

    def drive(self, load: Load, *, enough: Enough | None = None) -> list[Trace]:
        """Send every request at its time, in an open loop. When `enough` says so, abort the requests
        that still run. Raises BatonError if a request fails, and WorkerLost if a process dies: it
        restarts, but this run's figures are spoiled."""
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
            if running and time.monotonic() - heard > SILENT_S:
                raise WorkerLost(f"{self.split.name}: no message for {SILENT_S:g} s")
        return traces

    def _take(
        self, news: Received, at: float, running: dict[str, _Running], traces: list[Trace]
    ) -> None:
        if isinstance(news, Emitted | Finished | Failed) and news.request not in running:
            return  # belongs to an interrupted run
        match news:
            case Emitted(name, token_ids):
                running[name].times += [at] * len(token_ids)
                running[name].token_ids += token_ids
            case Finished(name, _, timings):
                traces.append(_trace(running.pop(name), timings))
            case Failed(name, code, why):
                raise BatonError(f"{self.split.name}: a request failed ({code}): {why}")
            case Notice(text):
                raise WorkerLost(f"{self.split.name}: {text}")

    def _abort(self, names: Collection[str]) -> None:
        for name in names:
            self._client.abort(name)


def options_for(
    split: Split,
    *,
    model: str,
    dtype: str,
    streams: int,
    slo: tuple[float | None, float | None] = (None, None),
) -> ClusterOptions:
    """The options of an arm's cluster. `streams`: most requests that run at once. `slo`: limits of TTFT
    and ITL in seconds that it is told, or None."""
    return ClusterOptions(
        model,
        plan_topology((), (), colocated=split.colocated, gpus=0),
        batch_size=streams,
        dtype=dtype,
        max_num_batched_tokens=split.max_num_batched_tokens,
        prefix_caching=False,  # a repeated load must cost the same
        role_policy=split.role_policy,
        slo_ttft=slo[0],
        slo_itl=slo[1],
    )


def started(
    split: Split,
    *,
    model: str,
    dtype: str,
    streams: int,
    slo: tuple[float | None, float | None] = (None, None),
) -> AbstractContextManager[RunningArm]:
    """The arm's cluster, ready, as a context manager."""
    return running(split, options_for(split, model=model, dtype=dtype, streams=streams, slo=slo))


@contextmanager
def running(split: Split, options: ClusterOptions) -> Iterator[RunningArm]:
    """A cluster with these options, ready; stopped when the block ends."""
    told: list[Callable[[Observed], None]] = []
    choosing = options.role_policy == "adaptive"
    observe = (lambda message: told[0](message) if told else None) if choosing else None
    with (
        Cluster(options) as cluster,
        closing(Client(cluster.address, supervise=cluster.check, observe=observe)) as client,
    ):
        arm = RunningArm(split, cluster, client, client.await_ready())
        told.append(arm.observed)
        yield arm


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
    """Pin this process and its future children to the first `count` of its cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:count]))
