"""The job: every prompt that is not in the journal goes to the router, every answer into the journal.

What is shown and what is measured hangs on here; what a request goes through is baton/client/batch.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from baton.client.batch import (
    Completion,
    Failure,
    Follower,
    Happening,
    Note,
    Streamed,
    Task,
)
from baton.errors import BatonError, InputError
from baton.offline.describe import worker_states
from baton.offline.journal import Journal
from baton.offline.outputs import Answer
from baton.offline.progress import Progress
from baton.offline.report import Tally
from baton.params import GenerationParams
from baton.timing import Stages
from baton.wire.messages import ClusterInfo

OUR_FAULT_NOT = frozenset({"invalid_request", "context_length_exceeded"})
NAMED = 3  # failed requests whose reason is told in full; of the others the number


@dataclass(slots=True)
class Outcome:
    """What a job came to."""

    tally: Tally = field(default_factory=Tally)
    failures: list[Failure] = field(default_factory=list)


def run_job(
    follower: Follower,
    prompts: Sequence[str],
    ask: GenerationParams,
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
        for happening in follower.run(todo, ask):
            if awaiting_first and isinstance(happening, Streamed):
                startup.lap("first token")
                awaiting_first = False
            _take(happening, outcome, journal, progress)
    finally:
        progress.end()
    return outcome


def _take(happening: Happening, outcome: Outcome, journal: Journal, progress: Progress) -> None:
    match happening:
        case Completion():
            journal.add(answer_of(happening))
            outcome.tally.add(happening)
            progress.answer(retries=happening.timings.retries)
        case Failure():
            outcome.failures.append(happening)
            progress.say(f"prompt {happening.task.index + 1} failed: {happening.message}")
        case Streamed():
            progress.tokens(happening.tokens)
        case Note(text):
            progress.say(text)
        case ClusterInfo():
            progress.workers(worker_states(happening))


def answer_of(done: Completion) -> Answer:
    """What of a completion is kept."""
    timings = {"prompt_tokens": done.prompt_tokens, "tokenize_s": done.tokenize_s}
    return Answer(
        index=done.task.index,
        text=done.text,
        token_ids=done.token_ids,
        finish_reason=done.finish_reason,
        timings=timings | asdict(done.timings),
    )


def failed(failures: Sequence[Failure], *, total: int, saved: str) -> BatonError:
    """The one line for a job with failed requests: which, why, what is safe, how to go on."""
    ranked = sorted(failures, key=lambda failure: failure.task.index)
    told = [f"prompt {f.task.index + 1} ({f.code}: {f.message})" for f in ranked[:NAMED]]
    rest = [str(f.task.index + 1) for f in ranked[NAMED:]]
    also = f"; also {', '.join(rest)}"[:200] if rest else ""
    text = (
        f"{len(failures):,} of {total:,} requests failed, so no output was written: "
        f"{'; '.join(told)}{also}. {saved}; run the same command again to try the rest"
    )
    theirs = all(failure.code in OUR_FAULT_NOT for failure in failures)
    return InputError(text) if theirs else BatonError(text)
