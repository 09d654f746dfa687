"""One run of `python main.py`: check everything, then start, then work, then write the file.

What can be recognised as wrong is reported before a process is started. Prompts without an answer in
the journal go to the router, their answers to the journal.
"""

import secrets
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass

from baton.adapters.files import resolve_adapters
from baton.client.batch import Completion, Event, Failure, Streamed, complete
from baton.client.blocking import Client, Notice
from baton.dtypes import INT8
from baton.errors import BatonError, InputError
from baton.machine import this_machine
from baton.offline.describe import describe_cluster, worker_states
from baton.offline.interrupts import Interrupted
from baton.offline.journal import Journal, fingerprint
from baton.offline.length_checks import check_length, checked_model
from baton.offline.link import QUEUE_FACTOR, await_cluster, link_to, load_s
from baton.offline.outputs import checked_target, rendered, write_whole
from baton.offline.progress import Progress
from baton.offline.report import Tally, report, startup_line
from baton.offline.settings import JobSettings, OwnCluster, resolve_sampling
from baton.offline.tracing import Tracing
from baton.params import NOT_STREAMED_S, GenerationParams
from baton.timing import Stages
from baton.wire.messages import ClusterInfo, Submit
from sampler.params import SamplingParams

INPUT_ERRORS = frozenset({"invalid_request", "context_length_exceeded"})
EXPLAINED = 3  # failed requests that are listed with their reason; others are only counted
RESUME = "run the same command again to do the rest"


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
    with Progress(quiet=settings.quiet) as progress:
        OfflineJob(settings, progress, startup).run()


class OfflineJob:
    """The settings of the job, and what reports on it."""

    def __init__(self, settings: JobSettings, progress: Progress, startup: Stages) -> None:
        """Raises InputError if the output or the trace file cannot be written."""
        self._settings = settings
        self._progress = progress
        self._startup = startup
        self._target_file = checked_target(settings.output)
        self._adapter = ""  # digest
        self._tracing = Tracing(settings.trace) if settings.trace is not None else None

    def run(self) -> None:
        """Raises a BatonError, or Interrupted, with the line to print."""
        settings, target = self._settings, self._settings.target
        if isinstance(target, OwnCluster):
            length = settings.generation_length
            files, context = checked_model(target, settings.prompts, length)
            default = SamplingParams.from_generation_config(files.generation_config)
            dtype = _dtypes(target.options.dtype, target.options.kv_cache_dtype)
            for each in resolve_adapters(target.options.lora, target.options.model):
                self._adapter = each.adapter.digest  # there is one, or none
            self._run(ServedModel(files.name, files.fingerprint, dtype, context, default), None)
            return
        with self._connected() as (client, info):
            dtype = _dtypes(info.dtype, info.kv_dtype)
            model = ServedModel(info.model, info.fingerprint, dtype, info.context, info.sampling)
            check_length(settings.generation_length, context=model.context, model=model.name)
            self._run(model, client)

    @contextmanager
    def _connected(self) -> Iterator[tuple[Client, ClusterInfo]]:
        """A client of the cluster, which is ready and has been described to the user."""
        target = self._settings.target
        observe = self._tracing.observe if self._tracing is not None else None
        with link_to(target, startup=self._startup, observe=observe) as client:
            info = await_cluster(client, self._startup, self._progress.say)
            started = target.options.topology if isinstance(target, OwnCluster) else None
            if started is None:
                self._progress.say(f"client    {this_machine()}")
            for line in describe_cluster(info, started):
                self._progress.say(line)
            yield client, info

    def _run(self, model: ServedModel, client: Client | None) -> None:
        """`client` is None if the cluster has yet to be started, if there is work for it."""
        settings, progress = self._settings, self._progress
        sampling, notice = resolve_sampling(settings.sampling, model.sampling)
        params = GenerationParams(
            max_new_tokens=settings.generation_length,
            sampling=sampling,
            stop=settings.stop,
            ignore_eos=settings.ignore_eos,
            stream_interval_s=NOT_STREAMED_S,
            adapter=self._adapter,
        )
        with self._journal(model, sampling) as journal:
            for each in filter(None, (notice, journal.notice)):
                progress.say(each)
            self._startup.lap("checks")
            if len(journal.answers) < len(settings.prompts):
                if client is None:
                    progress.say(f"machine   {this_machine()}; starting {model.name}")
                connected = self._connected() if client is None else nullcontext((client, None))
                with connected as (link, _):
                    self._work(model, params, journal, link)
            parts = rendered(
                settings.prompts, journal.answers, settings.format, timings=settings.timings
            )
            write_whole(self._target_file, parts, saved=journal.saved)
            journal.remove()
        progress.say(f"{len(settings.prompts):,} answers are in {settings.output}")

    def _work(
        self, model: ServedModel, params: GenerationParams, journal: Journal, client: Client
    ) -> None:
        """Complete the prompts that the journal lacks, and report. Raises if a prompt has failed."""
        progress, startup = self._progress, self._startup
        tally, failures = Tally(), list[Failure]()
        progress.begin(total=len(self._settings.prompts), done=len(journal.answers))
        try:
            with closing(self._events(params, journal, client)) as events:
                for event in events:
                    match event:
                        case Completion():
                            journal.add(event)
                            tally.add(event)
                            progress.answer(retries=event.timings.retries)
                        case Failure():
                            failures.append(event)
                            progress.say(f"prompt {event.index + 1} failed: {event.message}")
                        case Streamed():
                            if not startup.total_s("first token"):
                                startup.lap("first token")
                            progress.tokens(event.tokens)
                        case Notice(text):
                            progress.say(text)
                        case ClusterInfo():
                            progress.workers(worker_states(event))
        finally:
            progress.end()
        progress.say("\n" + report(tally, load_s=load_s(startup)))
        if tally.requests:
            progress.say(startup_line(startup))
        if self._tracing is not None:
            self._tracing.write(client, model.name)
            where = f"{self._settings.trace}: open it at ui.perfetto.dev"
            progress.say(f"every request's stages are in {where}")
        if failures:
            raise failed(failures, total=len(self._settings.prompts), saved=journal.saved)

    def _events(
        self, params: GenerationParams, journal: Journal, client: Client
    ) -> Generator[Event, None, None]:
        settings, job = self._settings, secrets.token_hex(6)
        submits = {
            index: Submit(f"{job}-{index}", prompt, params)
            for index, prompt in enumerate(settings.prompts)
            if index not in journal.answers
        }
        factor = QUEUE_FACTOR if isinstance(settings.target, OwnCluster) else 1
        return complete(client, submits, limit=settings.batch_size * factor)

    @contextmanager
    def _journal(self, model: ServedModel, sampling: SamplingParams) -> Iterator[Journal]:
        settings, target = self._settings, self._target_file
        facts = {
            "model": model.fingerprint,
            "dtype": model.dtype,
            "prompts": settings.prompts,
            "sampling": asdict(sampling),
            "length": settings.generation_length,
            "stop": settings.stop,
            "ignore_eos": settings.ignore_eos,
        }
        facts |= {"adapter": self._adapter} if self._adapter else {}
        journal = Journal(
            target.with_name(f"{target.name}.part"),
            fingerprint=fingerprint(facts),
            prompts=len(settings.prompts),
        )
        try:
            yield journal
        except Interrupted as interrupt:
            raise Interrupted(f"{journal.saved}; {RESUME}") from interrupt
        finally:
            journal.close()


def _dtypes(dtype: str, kv_dtype: str) -> str:
    """What answers depend on: a job is not continued with others."""
    return f"{dtype}, KV {kv_dtype}" if kv_dtype == INT8 else dtype


def failed(failures: Sequence[Failure], *, total: int, saved: str) -> BatonError:
    """The error of a job with failed requests: which, why, what is saved, how to continue."""
    ranked = sorted(failures, key=lambda failure: failure.index)
    explained = [f"prompt {f.index + 1} ({f.code}: {f.message})" for f in ranked[:EXPLAINED]]
    rest = [str(f.index + 1) for f in ranked[EXPLAINED:]]
    also = f"; also {', '.join(rest)}"[:200] if rest else ""
    text = (
        f"{len(failures):,} of {total:,} requests failed, so no output was written: "
        f"{'; '.join(explained)}{also}. {saved}; run the same command again to try the rest"
    )
    only_input = all(failure.code in INPUT_ERRORS for failure in failures)
    return InputError(text) if only_input else BatonError(text)
