"""One run of `python main.py`: check everything, then start, then work, then write the file.

Everything that can be known to be wrong is said before a process is started.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from baton.client.batch import Note
from baton.machine import this_machine
from baton.model_files import resolve_model
from baton.offline.describe import describe_cluster
from baton.offline.fitness import check_length, check_prompts_fit, context_of
from baton.offline.interrupts import Interrupted
from baton.offline.job import Outcome, failed, run_job
from baton.offline.journal import Journal, fingerprint
from baton.offline.link import Link, Observe, link_to
from baton.offline.outputs import checked_target, rendered, write_whole
from baton.offline.progress import Progress
from baton.offline.report import report, startup_line
from baton.offline.settings import Drawing, JobSettings, choose_sampling
from baton.offline.tracing import Tracing
from baton.params import NOT_STREAMED_S, GenerationParams
from baton.timing import Stages
from baton.topology import Topology
from baton.wire.messages import ClusterInfo
from sampler.params import SamplingParams

AGAIN = "run the same command again to do the rest"


@dataclass(frozen=True, slots=True)
class Around:
    """What looks on while the job is done."""

    progress: Progress
    startup: Stages
    tracing: Tracing | None

    @property
    def observe(self) -> Observe | None:
        """For the link: who is told of every request."""
        return self.tracing.observe if self.tracing is not None else None


@dataclass(frozen=True, slots=True)
class Served:
    """The model as the job sees it: from its files, or from a running cluster's word."""

    name: str
    fingerprint: str
    dtype: str
    context: int
    sampling: SamplingParams


def run_offline(settings: JobSettings, startup: Stages) -> None:
    """Raises a BatonError, or Interrupted, with the one line to print."""
    target = checked_target(settings.output)
    tracing = Tracing(settings.trace) if settings.trace is not None else None
    with Progress(quiet=settings.quiet) as progress:
        around = Around(progress, startup, tracing)
        if settings.place.router is not None:
            with _link(settings, around) as link:
                served = _asked(_ready(link, progress, startup, started=None))
                _resume_and_work(settings, served, target, around, link)
            return
        served = _looked_up(settings)
        _resume_and_work(settings, served, target, around, None)


def _link(settings: JobSettings, around: Around) -> AbstractContextManager[Link]:
    size = settings.batch_size
    return link_to(settings.place, batch_size=size, startup=around.startup, observe=around.observe)


def _looked_up(settings: JobSettings) -> Served:
    """From the model's files: quick, and no process needed."""
    place = settings.place
    files = resolve_model(place.model, download=place.download)
    context = context_of(files, place.max_model_len)
    length = settings.generation_length
    check_length(length, context=context, model=files.name)
    check_prompts_fit(settings.prompts, length, files=files, context=context)
    default = SamplingParams.from_generation_config(files.generation_config)
    return Served(files.name, files.fingerprint, place.dtype, context, default)


def _asked(info: ClusterInfo) -> Served:
    default = info.sampling
    return Served(info.model, info.fingerprint, info.dtype, info.context, default)


def _resume_and_work(
    settings: JobSettings,
    served: Served,
    target: Path,
    around: Around,
    link: Link | None,
) -> None:
    check_length(settings.generation_length, context=served.context, model=served.name)
    drawing = choose_sampling(settings.wish, served.sampling)
    with _journal(settings, served, drawing, target) as journal:
        for note in (*drawing.notes, journal.note):
            if note:
                around.progress.say(note)
        around.startup.lap("checks")
        outcome = Outcome()
        if len(journal.answers) < len(settings.prompts):
            outcome = _linked(settings, served, drawing, journal, around, link)
        if outcome.failures:
            raise failed(outcome.failures, total=len(settings.prompts), saved=journal.saved)
        parts = rendered(
            settings.prompts, journal.answers, settings.format, timings=settings.timings
        )
        write_whole(target, parts, saved=journal.saved)
        journal.remove()
    around.progress.say(f"{len(settings.prompts):,} answers are in {settings.output}")


def _linked(
    settings: JobSettings,
    served: Served,
    drawing: Drawing,
    journal: Journal,
    around: Around,
    link: Link | None,
) -> Outcome:
    if link is not None:
        return _traced(settings, served, drawing, journal, around, link)
    around.progress.say(f"machine   {this_machine()}; starting {served.name}")
    with _link(settings, around) as own:
        _ready(own, around.progress, around.startup, started=settings.place.topology)
        return _traced(settings, served, drawing, journal, around, own)


def _traced(
    settings: JobSettings,
    served: Served,
    drawing: Drawing,
    journal: Journal,
    around: Around,
    link: Link,
) -> Outcome:
    outcome = _work(settings, drawing, journal, around, link)
    if around.tracing is not None:
        around.tracing.write(link.client, served.name)
        where = f"{settings.trace}: open it at ui.perfetto.dev"
        around.progress.say(f"every request's stages are in {where}")
    return outcome


def _work(
    settings: JobSettings,
    drawing: Drawing,
    journal: Journal,
    around: Around,
    link: Link,
) -> Outcome:
    ask = GenerationParams(
        max_new_tokens=settings.generation_length,
        sampling=drawing.params,
        stop=settings.stop,
        ignore_eos=settings.ignore_eos,
        stream_interval_s=NOT_STREAMED_S,
    )
    progress, startup = around.progress, around.startup
    load_s = startup.total_s("router answered") + startup.total_s("workers ready")
    try:
        outcome = run_job(
            link.follower,
            settings.prompts,
            ask,
            journal=journal,
            progress=progress,
            startup=startup,
        )
    except BaseException:
        if not link.ours:
            link.follower.abort_all()
        raise
    progress.say("\n" + report(outcome.tally, load_s=load_s))
    if outcome.tally.requests:
        progress.say(startup_line(startup))
    return outcome


def _ready(
    link: Link, progress: Progress, startup: Stages, *, started: Topology | None
) -> ClusterInfo:
    """Wait until the cluster can work, and describe it."""
    info: ClusterInfo | None = None
    for happening in link.follower.await_ready(ours=link.ours):
        if isinstance(happening, Note):
            progress.say(happening.text)
        elif isinstance(happening, ClusterInfo):
            if info is None:
                startup.lap("router answered")
            info = happening
    assert info is not None
    startup.lap("workers ready")
    if not link.ours:
        progress.say(f"client    {this_machine()}")
    for line in describe_cluster(info, started):
        progress.say(line)
    return info


@contextmanager
def _journal(
    settings: JobSettings, served: Served, drawing: Drawing, target: Path
) -> Iterator[Journal]:
    facts = {
        "model": served.fingerprint,
        "dtype": served.dtype,
        "prompts": settings.prompts,
        "sampling": asdict(drawing.params),
        "length": settings.generation_length,
        "stop": settings.stop,
        "ignore_eos": settings.ignore_eos,
    }
    journal = Journal(
        target.with_name(f"{target.name}.part"),
        fingerprint=fingerprint(facts),
        prompts=len(settings.prompts),
    )
    try:
        yield journal
    except Interrupted as interrupt:
        raise Interrupted(f"{journal.saved}; {AGAIN}") from interrupt
    finally:
        journal.close()
