"""Perplexity: how well a model predicts a text. Every token but the first is scored exactly once.

perplexity      exp of the mean of -ln p over all scored tokens of all texts
bits per token  its logarithm to base 2
bits per byte   all bits over the UTF-8 bytes of the scored tokens: comparable between models with
                different tokenizers, which perplexity is not

A text longer than the context is read in windows:

    window 4, stride 2     t0 t1 t2 t3 t4 t5 t6 t7
    first window           r  rs rs rs  s                  r: the model reads it
    second                        r  r  r  rs  s           s: this window scores it
    third                                r  r  r  s

A window reads `window` tokens and scores those after its first that no earlier window has scored; it
scores its last token without reading it. So the first window scores up to `window` tokens and every other
one `stride`, with at least window - stride + 1 tokens before each. With stride = window each token is
read once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from baton.errors import InputError
from baton.text import Tokenizer
from tools.evaluation.subject import Scored, Span, Speed, Subject

WINDOW = 1024  # at most, where none is asked for
LARGEST = 709.0  # e to the power of more overflows a float

Bar = Callable[[Iterator[Scored], int], Iterable[Scored]]  # (results, their number): a progress bar


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The result. `bits` is the sum over all scored tokens."""

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
        """None if the scored tokens are empty text."""
        return self.bits / self.text_bytes if self.text_bytes else None


def score_texts(
    subject: Subject,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    end: int | None = None,
    bar: Bar = lambda scored, total: scored,
) -> Perplexity:
    """The perplexity of these texts, each scored alone. `end`: a token appended to each text and scored.
    Raises InputError for a window or a stride out of range, and for texts without a token to score."""
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
        raise InputError("nothing to score: a text needs two tokens, as the first is given")
    subject.meter.start()
    sums: list[float] = []
    for scored in bar(subject.score(spans), len(spans)):
        sums.append(-math.fsum(scored.logprobs))
    tokens = sum(len(span.token_ids) - span.start for span in spans)
    return Perplexity(
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
    """The windows of a text as spans to score."""
    for each in windows(len(ids), window=window, stride=stride):
        yield Span(tuple(ids[each.begin : each.end]), each.start - each.begin)


def _first_bytes(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> int:
    """UTF-8 bytes of the first token, which is given: 0 for a special token or half a character."""
    alone = tokenizer.decode(ids[:1])
    return len(alone.encode()) if text.startswith(alone) else 0


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `begin` to `end` - 2 are read, `start` to `end` - 1 are scored."""

    begin: int
    start: int
    end: int


def windows(tokens: int, *, window: int, stride: int) -> Iterator[Window]:
    """The windows of a text of `tokens` tokens. Token 0 is given, not scored: one token has no window."""
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be 1 to the window ({window}), got {stride}")
    begin, start = 0, 1
    while start < tokens:
        end = min(tokens, begin + window + 1)
        yield Window(begin, start, end)
        begin, start = begin + stride, end
