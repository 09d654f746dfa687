"""ROUGE-1, ROUGE-2 and ROUGE-L as the rouge-score package computes them, without its stemmer.

Lin 2004, https://aclanthology.org/W04-1013. The current version of
rouge-score has no wheel, and it needs nltk for a stemmer that is off by default. Its numbers are in
tests/pure/test_eval_scores.py.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

WORD = re.compile("[a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Rouge:
    """F1 of each kind, 0 to 1."""

    one: float
    two: float
    longest: float


def rouge(prediction: str, references: Sequence[str]) -> Rouge:
    """With several references, each kind takes its best."""
    ours = words(prediction)
    theirs = [words(each) for each in references]
    kinds = (partial(_ngrams, 1), partial(_ngrams, 2), _subsequence)
    return Rouge(*(max(kind(ours, each) for each in theirs) for kind in kinds))


def words(text: str) -> list[str]:
    """Runs of a to z and 0 to 9, in lower case. Everything else separates words."""
    return WORD.findall(text.lower())


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, with one bit for each word of the first: Hyyrö 2004,
    "Bit-parallel LCS-length computation revisited"."""
    places: defaultdict[str, int] = defaultdict(int)
    for at, word in enumerate(first):
        places[word] |= 1 << at
    whole = (1 << len(first)) - 1
    row = whole
    for word in second:
        hits = row & places[word]
        row = ((row + hits) | (row - hits)) & whole
    return len(first) - row.bit_count()


def _ngrams(n: int, ours: list[str], theirs: list[str]) -> float:
    mine, wanted = (
        Counter(tuple(each[i : i + n]) for i in range(len(each) - n + 1)) for each in (ours, theirs)
    )
    return _f1((mine & wanted).total(), mine.total(), wanted.total())


def _subsequence(ours: list[str], theirs: list[str]) -> float:
    return _f1(common_subsequence(ours, theirs), len(ours), len(theirs))


def _f1(hits: int, ours: int, theirs: int) -> float:
    """F1 of precision hits / ours and recall hits / theirs."""
    return 2 * hits / (ours + theirs) if hits else 0.0
