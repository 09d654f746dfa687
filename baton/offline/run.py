"""One run of `python main.py`: check everything, then start, then work, then write the file.

What can be recognised as wrong is reported before a process is started.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from baton.client.batch import Notice
from baton.machine import this_machine
from baton.model_files import resolve_model
from baton.offline.describe import describe_cluster
from baton.offline.interrupts import Interrupted
from baton.offline.job import Outcome, failed, run_job
from baton.offline.journal import Journal, fingerprint
from baton.offline.length_checks import check_length, check_prompts_fit, context_of
from baton.offline.link import Link, link_to
from baton.offline.outputs import checked_target, rendered, write_whole
from baton.offline.progress import Progress
from baton.offline.report import report, startup_line
from baton.offline.settings import JobSettings, OwnCluster, ResolvedSampling, resolve_sampling
from baton.offline.tracing import Tracing
from baton.params import NOT_STREAMED_S, GenerationParams
from baton.timing import Stages
from baton.topology import Topology
from baton.wire.messages import ClusterInfo
from sampler.params import SamplingParams

RESUME = "run the same command again to do the rest"


@dataclass(frozen=True, slots=True)
class JobContext:
    """The settings of the job, and what reports on it."""

    settings: JobSettings
    progress: Progress
    startup: Stages
    tracing: Tracing | None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model of the job: read from its files, or reported by the running cluster."""

    name: str
    fingerprint: str
    dtype: str
    context: int
    sampling: SamplingParams


def run_offline(settings: JobSettings, startup: Stages) -> None:
    """Raises a BatonError, or Interrupted, with the line to print."""
    target_file = checked_target(settings.output)
    tracing = Tracing(settings.trace) if settings.trace is not None else None
    with Progress(quiet=settings.quiet) as progress:
        context = JobContext(settings, progress, startup, tracing)
        if isinstance(settings.target, OwnCluster):
            model = _from_files(settings, settings.target)
            _resume_and_work(context, model, target_file, None)
            return
        with _link(context) as link:
            model = _from_cluster(_ready(context, link, started=None))
            _resume_and_work(context, model, target_file, link)


def _link(context: JobContext) -> AbstractContextManager[Link]:
    return link_to(
        context.settings.target,
        batch_size=context.settings.batch_size,
        startup=context.startup,
        observe=context.tracing.observe if context.tracing is not None else None,
    )


def _from_files(settings: JobSettings, target: OwnCluster) -> ServedModel:
    options = target.options
    files = resolve_model(options.model, download=target.download)
    context = context_of(files, options.max_model_len)
    length = settings.generation_length
    check_length(length, context=context, model=files.name)
    check_prompts_fit(settings.prompts, length, files=files, context=context)
    default = SamplingParams.from_generation_config(files.generation_config)
    return ServedModel(files.name, files.fingerprint, options.dtype, context, default)


def _from_cluster(info: ClusterInfo) -> ServedModel:
    return ServedModel(info.model, info.fingerprint, info.dtype, info.context, info.sampling)


def _resume_and_work(
    context: JobContext, model: ServedModel, target_file: Path, link: Link | None
) -> None:
    """`link` is None if the cluster has yet to be started, if there is work for it."""
    settings, progress = context.settings, context.progress
    check_length(settings.generation_length, context=model.context, model=model.name)
    sampling = resolve_sampling(settings.sampling, model.sampling)
    with _journal(settings, model, sampling, target_file) as journal:
        for notice in (*sampling.notices, journal.notice):
            if notice:
                progress.say(notice)
        context.startup.lap("checks")
        outcome = Outcome()
        if len(journal.answers) < len(settings.prompts):
            if link is not None:
                outcome = _work(context, model, sampling, journal, link)
            else:
                outcome = _start_and_work(context, model, sampling, journal)
        if outcome.failures:
            raise failed(outcome.failures, total=len(settings.prompts), saved=journal.saved)
        parts = rendered(
            settings.prompts, journal.answers, settings.format, timings=settings.timings
        )
        write_whole(target_file, parts, saved=journal.saved)
        journal.remove()
    progress.say(f"{len(settings.prompts):,} answers are in {settings.output}")


def _start_and_work(
    context: JobContext, model: ServedModel, sampling: ResolvedSampling, journal: Journal
) -> Outcome:
    target = context.settings.target
    assert isinstance(target, OwnCluster)
    context.progress.say(f"machine   {this_machine()}; starting {model.name}")
    with _link(context) as link:
        _ready(context, link, started=target.options.topology)
        return _work(context, model, sampling, journal, link)


def _work(
    context: JobContext,
    model: ServedModel,
    sampling: ResolvedSampling,
    journal: Journal,
    link: Link,
) -> Outcome:
    settings, progress, startup = context.settings, context.progress, context.startup
    options = GenerationParams(
        max_new_tokens=settings.generation_length,
        sampling=sampling.params,
        stop=settings.stop,
        ignore_eos=settings.ignore_eos,
        stream_interval_s=NOT_STREAMED_S,
    )
    load_s = startup.total_s("router answered") + startup.total_s("workers ready")
    try:
        outcome = run_job(
            link.batch,
            settings.prompts,
            options,
            journal=journal,
            progress=progress,
            startup=startup,
        )
    except BaseException:
        if not link.owns_cluster:
            link.batch.abort_all()
        raise
    progress.say("\n" + report(outcome.tally, load_s=load_s))
    if outcome.tally.requests:
        progress.say(startup_line(startup))
    if context.tracing is not None:
        context.tracing.write(link.client, model.name)
        where = f"{settings.trace}: open it at ui.perfetto.dev"
        progress.say(f"every request's stages are in {where}")
    return outcome


def _ready(context: JobContext, link: Link, *, started: Topology | None) -> ClusterInfo:
    """Wait until the cluster can work, and describe it."""
    progress, startup = context.progress, context.startup
    info: ClusterInfo | None = None
    for event in link.batch.await_ready():
        if isinstance(event, Notice):
            progress.say(event.text)
        elif isinstance(event, ClusterInfo):
            if info is None:
                startup.lap("router answered")
            info = event
    assert info is not None
    startup.lap("workers ready")
    if not link.owns_cluster:
        progress.say(f"client    {this_machine()}")
    for line in describe_cluster(info, started):
        progress.say(line)
    return info


@contextmanager
def _journal(
    settings: JobSettings, model: ServedModel, sampling: ResolvedSampling, target_file: Path
) -> Iterator[Journal]:
    facts = {
        "model": model.fingerprint,
        "dtype": model.dtype,
        "prompts": settings.prompts,
        "sampling": asdict(sampling.params),
        "length": settings.generation_length,
        "stop": settings.stop,
        "ignore_eos": settings.ignore_eos,
    }
    journal = Journal(
        target_file.with_name(f"{target_file.name}.part"),
        fingerprint=fingerprint(facts),
        prompts=len(settings.prompts),
    )
    try:
        yield journal
    except Interrupted as interrupt:
        raise Interrupted(f"{journal.saved}; {RESUME}") from interrupt
    finally:
        journal.close()
