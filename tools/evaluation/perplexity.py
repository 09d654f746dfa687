"""Perplexity: how well a model foresees a text, every token but the first scored exactly once.

perplexity      exp of the mean of -ln p over all scored tokens of all texts
bits per token  its logarithm to base 2
bits per byte   all the bits over the UTF-8 bytes that the scored tokens stand for: compares models
                with different tokenizers, where perplexity does not
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from baton.errors import InputError
from baton.text import Tokenizer
from tools.evaluation.subject import Scored, Span, Speed, Subject
from tools.evaluation.windows import windows

WINDOW = 1024  # at most, where none is asked for
LARGEST = 709.0  # e to the power of more is no float

Bar = Callable[[Iterator[Scored], int], Iterable[Scored]]  # what runs, and how many will come


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What came of it. `bits` are those of all scored tokens together."""

    texts: int
    tokens: int  # scored ones
    text_bytes: int
    bits: float
    window: int
    stride: int
    spans: int
    speed: Speed

    @property
    def bits_per_token(self) -> float:
        return self.bits / self.tokens

    @property
    def perplexity(self) -> float:
        nats = self.bits_per_token * math.log(2)
        return math.exp(nats) if nats < LARGEST else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """None if the scored tokens have no text."""
        return self.bits / self.text_bytes if self.text_bytes else None


def foresee(
    subject: Subject,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    end: int | None = None,
    bar: Bar = lambda scored, total: scored,
) -> Foreseen:
    """The perplexity of these texts, each alone. `end`: a token that is scored after each."""
    most = subject.about.longest - 1  # the last token of a span is scored, not read
    window = min(WINDOW, subject.about.context - 2) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= window <= most:
        raise InputError(f"--window must be 1 to {most} for this model, got {window}")
    if not 1 <= stride <= window:
        raise InputError(f"--stride must be 1 to the window ({window}), got {stride}")
    spans: list[Span] = []
    scored_bytes = 0
    for text in texts:
        ids = tokenizer.encode(text)
        scored_bytes += len(text.encode()) - _first_bytes(tokenizer, ids, text)
        spans += spans_of([*ids, end] if end is not None else ids, window=window, stride=stride)
    if not spans:
        raise InputError("there is nothing to score: a text needs two tokens, the first is given")
    subject.meter.start()
    sums: list[float] = []
    for scored in bar(subject.score(spans), len(spans)):
        sums.append(-math.fsum(scored.logprobs))
    tokens = sum(len(span.token_ids) - span.start for span in spans)
    return Foreseen(
        texts=len(texts),
        tokens=tokens,
        text_bytes=scored_bytes,
        bits=math.fsum(sums) / math.log(2),
        window=window,
        stride=stride,
        spans=len(spans),
        speed=subject.meter.speed(tokens),
    )


def spans_of(ids: Sequence[int], *, window: int, stride: int) -> Iterator[Span]:
    """A text's windows, as they are asked."""
    for each in windows(len(ids), window=window, stride=stride):
        yield Span(tuple(ids[each.begin : each.end]), each.start - each.begin)


def _first_bytes(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> int:
    """Bytes of the text that the first token, which is given, stands for: none if it is a special
    token, or half a character."""
    alone = tokenizer.decode(ids[:1])
    return len(alone.encode()) if text.startswith(alone) else 0
