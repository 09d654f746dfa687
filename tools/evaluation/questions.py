"""Questions: an example of a task as texts, and the tokens of these texts that are scored.

    solved example                  query delimiter choice, then an empty line
    ...
    the example itself              query delimiter choice          one text for each choice

    multiple_choice     [BOS  q  q  q  q | a  a ]        from where the texts first differ
                        [BOS  q  q  q  q | b  b  b ]
    schema              [BOS  a  a | c  c  c ]           the tokens that all texts end with
                        [BOS  b  b  b | c  c  c ]
    language_modeling   [BOS  c  c | x  x ]              the tokens that the continuation adds

The texts are those of nanochat's templates, character for character (nanochat/core_eval.py). As there,
answers are located by token, not by character. A text longer than the model's context loses its
beginning. If the answer itself does not fit, the example has no spans.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tools.evaluation.bundle import Example, LanguageModeling, MultipleChoice, Schema, Task
from tools.evaluation.subject import Span

SHOTS_SEED = 1234  # nanochat's: plus the example's number


def solved_before(task: Task, number: int) -> list[Example]:
    """The solved examples shown before this one: others of the task, drawn for each example."""
    if not task.shots:
        return []
    others = [i for i in range(len(task.examples)) if i != number]
    drawn = random.Random(SHOTS_SEED + number).sample(others, task.shots)
    return [task.examples[i] for i in drawn]


def rendered(task: Task, number: int) -> tuple[str, ...]:
    """The texts of an example: one for each choice or context. A language_modeling example has two,
    without its continuation and with it."""
    delimiter = task.delimiter
    head = "".join(f"{_solved(each, delimiter)}\n\n" for each in solved_before(task, number))
    match task.examples[number]:
        case MultipleChoice(query, choices):
            return tuple(f"{head}{query}{delimiter}{choice}" for choice in choices)
        case Schema(options, continuation):
            return tuple(f"{head}{option}{delimiter}{continuation}" for option in options)
        case LanguageModeling(context, continuation):
            whole = f"{head}{context.strip()}{delimiter}"
            # With a continuation the delimiter's space belongs to the next word's token. Without one
            # it would be a token of its own.
            return whole.rstrip(), whole + continuation


def _solved(example: Example, delimiter: str) -> str:
    match example:
        case MultipleChoice(query, choices, gold):
            return f"{query}{delimiter}{choices[gold]}"
        case Schema(options, continuation, gold):
            return f"{options[gold]}{delimiter}{continuation}"
        case LanguageModeling(context, continuation):
            return f"{context.strip()}{delimiter}{continuation}"


Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Question:
    """An example as spans: one for each option, or one for language_modeling. Empty if the answer does
    not fit the context."""

    spans: tuple[Span, ...]
    cropped: bool  # a text lost its beginning to fit the context
    moved: bool  # a token crosses the beginning of the answer


def question(example: Example, texts: Sequence[Ids], longest: int) -> Question:
    """`texts`: token ids of the rendered texts. `longest`: most tokens of a span."""
    if isinstance(example, LanguageModeling):
        without, whole = texts
        shared = common_start(texts)
        starts, texts, moved = [shared], [whole], shared < len(without)
    elif isinstance(example, Schema):
        shared = common_end(texts)
        starts, moved = [len(ids) - shared for ids in texts], False
    else:
        starts, moved = [common_start(texts)] * len(texts), False
    spans = []
    for ids, wanted in zip(texts, starts, strict=True):
        start = max(1, min(wanted, len(ids) - 1))  # at least one token given, and one scored
        moved = moved or start != wanted
        cut = max(0, len(ids) - longest)
        if start - cut < 1 or len(ids) < 2:
            return Question((), cropped=True, moved=moved)
        spans.append(Span(tuple(ids[cut:]), start - cut))
    return Question(tuple(spans), any(len(ids) > longest for ids in texts), moved)


def common_start(texts: Sequence[Ids]) -> int:
    """Number of tokens that all texts begin with."""
    shortest = min(map(len, texts))
    first = texts[0]
    for at in range(shortest):
        if any(ids[at] != first[at] for ids in texts):
            return at
    return shortest


def common_end(texts: Sequence[Ids]) -> int:
    """Number of tokens that all texts end with."""
    return common_start([ids[::-1] for ids in texts])
