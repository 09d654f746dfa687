"""CORE-style tasks: does a model rate the right answer as the likeliest, more often than by guessing?

    multiple_choice, schema   the model chooses the option with the lowest mean loss per token
    language_modeling         right if every token of the continuation is the likeliest one
    centered                  (accuracy - baseline) / (1 - baseline): 0 for guessing, 1 for all right
    CORE                      mean of the tasks' centered accuracies

Li et al. 2024, "DataComp-LM", https://arxiv.org/abs/2406.11794; as nanochat computes it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from baton.text import Tokenizer
from tools.evaluation.bundle import LanguageModeling, Task
from tools.evaluation.questions import Question, question, rendered
from tools.evaluation.subject import Scored, Speed, Subject

AT_ONCE = 64  # examples in memory

Bar = Callable[[Iterator["Verdict"], int], Iterable["Verdict"]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one example. `losses`: mean of -ln p over the answer's tokens, for each option."""

    right: bool
    chosen: int | None  # None: language_modeling, or it does not fit
    losses: tuple[float, ...]
    tokens: int  # of all its texts, given and scored
    fits: bool
    cropped: bool
    moved: bool


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The result of a task. An example that does not fit the context counts as wrong."""

    task: Task
    verdicts: tuple[Verdict, ...]
    speed: Speed

    @property
    def right(self) -> int:
        return sum(each.right for each in self.verdicts)

    @property
    def accuracy(self) -> float:
        return self.right / len(self.verdicts)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, for examples drawn at random from many."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.verdicts))

    @property
    def centered(self) -> float:
        return centered(self.accuracy, self.task.baseline)


def centered(accuracy: float, baseline: float) -> float:
    """0 for guessing, 1 for all right."""
    return (accuracy - baseline) / (1 - baseline)


def core(results: Sequence[TaskResult]) -> float:
    """The CORE score: the mean of the centered accuracies."""
    return math.fsum(each.centered for each in results) / len(results)


def first_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a text. Those it puts after one are left out, as the
    texts here break off in the middle."""
    bare, dressed = tokenizer.encode("a", special=False), tokenizer.encode("a")
    for at in range(len(dressed) - len(bare) + 1):
        if dressed[at : at + len(bare)] == bare:
            return dressed[:at]
    return []


def run_task(
    subject: Subject,
    tokenizer: Tokenizer,
    task: Task,
    *,
    begin: Sequence[int],
    bar: Bar = lambda verdicts, total: verdicts,
) -> TaskResult:
    """Score every example. `begin`: tokens put before every text."""
    subject.meter.start()
    verdicts = tuple(bar(_verdicts(subject, tokenizer, task, begin), len(task.examples)))
    tokens = sum(each.tokens for each in verdicts)
    return TaskResult(task, verdicts, subject.meter.speed(tokens))


def _verdicts(
    subject: Subject, tokenizer: Tokenizer, task: Task, begin: Sequence[int]
) -> Iterator[Verdict]:
    for group in range(0, len(task.examples), AT_ONCE):
        questions = []
        for number in range(group, min(group + AT_ONCE, len(task.examples))):
            texts = rendered(task, number)
            ids = [[*begin, *tokenizer.encode(text, special=False)] for text in texts]
            questions.append((number, question(task.examples[number], ids, subject.about.longest)))
        answers = subject.score(span for _, asked in questions for span in asked.spans)
        for number, asked in questions:
            scored = [next(answers) for _ in asked.spans]
            yield _verdict(task, number, asked, scored)


def _verdict(task: Task, number: int, asked: Question, scored: Sequence[Scored]) -> Verdict:
    example = task.examples[number]
    losses = tuple(-math.fsum(each.logprobs) / len(each.logprobs) for each in scored)
    if not asked.spans:
        chosen, right = None, False
    elif isinstance(example, LanguageModeling):
        chosen, right = None, all(scored[0].likeliest)
    else:
        chosen = losses.index(min(losses))
        right = chosen == example.gold
    tokens = sum(len(span.token_ids) for span in asked.spans)
    return Verdict(right, chosen, losses, tokens, bool(asked.spans), asked.cropped, asked.moved)
