"""Spans: which tokens of an example's texts are its answer.

    multiple_choice     [BOS  q  q  q  q | a  a ]        from where the texts first differ
                        [BOS  q  q  q  q | b  b  b ]
    schema              [BOS  a  a | c  c  c ]           the tokens that all of them end with
                        [BOS  b  b  b | c  c  c ]
    language_modeling   [BOS  c  c | x  x ]              what the text without it does not have

Tokens decide, not characters, as in nanochat. A text longer than the model's context loses its
beginning; if its answer itself does not fit, the example cannot be asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tools.evaluation.bundle import Example, LanguageModeling, Schema
from tools.evaluation.subject import Span

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Question:
    """An example as spans: one for each option, of a language_modeling example one. Without any it
    does not fit the context."""

    spans: tuple[Span, ...]
    cropped: bool  # a text lost its beginning
    moved: bool  # a boundary between tokens is not where the rule wants it


def question(example: Example, texts: Sequence[Ids], longest: int) -> Question:
    """`texts`: token ids of what rendering gives; `longest`: tokens of a span at most."""
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
    """Tokens that all begin with."""
    shortest = min(map(len, texts))
    first = texts[0]
    for at in range(shortest):
        if any(ids[at] != first[at] for ids in texts):
            return at
    return shortest


def common_end(texts: Sequence[Ids]) -> int:
    """Tokens that all end with."""
    return common_start([ids[::-1] for ids in texts])
