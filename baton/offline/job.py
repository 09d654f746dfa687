"""The job: prompts without an answer in the journal go to the router, their answers to the journal."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.client.batch import (
    BatchClient,
    Completion,
    Event,
    Failure,
    Notice,
    Streamed,
    Task,
)
from baton.errors import BatonError, InputError
from baton.offline.describe import worker_states
from baton.offline.journal import Journal
from baton.offline.progress import Progress
from baton.offline.report import Tally
from baton.params import GenerationParams
from baton.timing import Stages
from baton.wire.messages import ClusterInfo

INPUT_ERRORS = frozenset({"invalid_request", "context_length_exceeded"})
EXPLAINED = 3  # failed requests that are listed with their reason; of the others only the number


@dataclass(slots=True)
class Outcome:
    """The result of a job: measurements, and the prompts that failed."""

    tally: Tally = field(default_factory=Tally)
    failures: list[Failure] = field(default_factory=list)


def run_job(
    batch: BatchClient,
    prompts: Sequence[str],
    options: GenerationParams,
    *,
    journal: Journal,
    progress: Progress,
    startup: Stages,
) -> Outcome:
    """Complete what the journal lacks. Returns when every prompt has an answer or a failure."""
    todo = [Task(i, text) for i, text in enumerate(prompts) if i not in journal.answers]
    outcome = Outcome()
    progress.begin(total=len(prompts), done=len(journal.answers))
    awaiting_first = True
    try:
        for event in batch.run(todo, options):
            if awaiting_first and isinstance(event, Streamed):
                startup.lap("first token")
                awaiting_first = False
            _take(event, outcome, journal, progress)
    finally:
        progress.end()
    return outcome


def _take(event: Event, outcome: Outcome, journal: Journal, progress: Progress) -> None:
    match event:
        case Completion():
            journal.add(event)
            outcome.tally.add(event)
            progress.answer(retries=event.timings.retries)
        case Failure():
            outcome.failures.append(event)
            progress.say(f"prompt {event.index + 1} failed: {event.message}")
        case Streamed():
            progress.tokens(event.tokens)
        case Notice(text):
            progress.say(text)
        case ClusterInfo():
            progress.workers(worker_states(event))


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
