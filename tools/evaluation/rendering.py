"""Rendering: an example and the solved ones before it, as the texts a model is shown.

    solved example                  query delimiter choice, then an empty line
    ...
    the one that is asked           query delimiter choice          one text for each choice

Character for character what nanochat's templates give (nanochat/core_eval.py).
"""

import random

from tools.evaluation.bundle import Example, LanguageModeling, MultipleChoice, Schema, Task

SHOTS_SEED = 1234  # nanochat's: plus the example's number


def solved_before(task: Task, number: int) -> list[Example]:
    """The solved examples that stand before this one: others of the task, drawn anew for each."""
    if not task.shots:
        return []
    others = [i for i in range(len(task.examples)) if i != number]
    drawn = random.Random(SHOTS_SEED + number).sample(others, task.shots)
    return [task.examples[i] for i in drawn]


def rendered(task: Task, number: int) -> tuple[str, ...]:
    """The texts of an example: one for each choice or context; of a language_modeling example the
    text without its continuation, and with it."""
    delimiter = task.delimiter
    head = "".join(f"{_solved(each, delimiter)}\n\n" for each in solved_before(task, number))
    match task.examples[number]:
        case MultipleChoice(query, choices):
            return tuple(f"{head}{query}{delimiter}{choice}" for choice in choices)
        case Schema(options, continuation):
            return tuple(f"{head}{option}{delimiter}{continuation}" for option in options)
        case LanguageModeling(context, continuation):
            whole = f"{head}{context.strip()}{delimiter}"
            # The delimiter's space would be a token of its own, where with a continuation it is part
            # of the next word's.
            return whole.rstrip(), whole + continuation


def _solved(example: Example, delimiter: str) -> str:
    match example:
        case MultipleChoice(query, choices, gold):
            return f"{query}{delimiter}{choices[gold]}"
        case Schema(options, continuation, gold):
            return f"{options[gold]}{delimiter}{continuation}"
        case LanguageModeling(context, continuation):
            return f"{context.strip()}{delimiter}{continuation}"
