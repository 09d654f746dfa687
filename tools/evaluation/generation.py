"""Generation: greedy continuations beside what stands in the data, by BLEU and ROUGE.

    {"prompt": "...", "reference": "..."}        or {"prompt": "...", "references": ["...", "..."]}

BLEU is sacrebleu's corpus BLEU (Papineni et al. 2002, Post 2018), ROUGE the mean of each pair's F1.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sacrebleu.metrics.bleu import BLEU

from baton.errors import InputError
from baton.text import Tokenizer
from tools.evaluation.lines import read_lines
from tools.evaluation.rouge import Rouge, rouge
from tools.evaluation.subject import Continuation, Speed, Subject

Bar = Callable[[Iterator[Continuation], int], Iterable[Continuation]]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, and what might follow it."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """What came of it. BLEU is 0 to 100, ROUGE 0 to 1, as is the custom."""

    pairs: tuple[Pair, ...]
    texts: tuple[str, ...]
    ended: int  # continuations that the model ended by itself
    new_tokens: int
    bleu: float
    bleu_signature: str
    rouge: Rouge
    speed: Speed


def write(
    subject: Subject,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    *,
    new_tokens: int,
    bar: Bar = lambda written, total: written,
) -> Written:
    """Continue every prompt and compare."""
    prompts = [tuple(tokenizer.encode(pair.prompt)) for pair in pairs]
    room = subject.about.context - new_tokens
    for number, prompt in enumerate(prompts, start=1):
        if not 1 <= len(prompt) <= room:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens: it must have 1 to {room}, so that "
                f"{new_tokens} new ones fit the context of {subject.about.context}"
            )
    subject.meter.start()
    found = list(bar(subject.write(prompts, new_tokens), len(prompts)))
    speed = subject.meter.speed(sum(each.tokens for each in found))
    texts = tuple(each.text.strip() for each in found)
    score, signature = corpus_bleu(texts, [pair.references for pair in pairs])
    each_rouge = [rouge(text, p.references) for text, p in zip(texts, pairs, strict=True)]
    return Written(
        pairs=tuple(pairs),
        texts=texts,
        ended=sum(each.ended for each in found),
        new_tokens=new_tokens,
        bleu=score,
        bleu_signature=signature,
        rouge=Rouge(
            statistics.fmean(each.one for each in each_rouge),
            statistics.fmean(each.two for each in each_rouge),
            statistics.fmean(each.longest for each in each_rouge),
        ),
        speed=speed,
    )


def corpus_bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """The score, and the signature that says how it was computed."""
    most = max(map(len, references))  # of a pair that has fewer the others are empty: not there
    streams = [[each[i] if i < len(each) else "" for each in references] for i in range(most)]
    metric = BLEU()
    score = metric.corpus_score(list(texts), streams).score
    return float(score), str(metric.get_signature())


def read_pairs(file: Path) -> list[Pair]:
    """Of a JSON lines file. Raises InputError."""
    pairs = []
    for line in read_lines(file):
        if ("reference" in line.fields) == ("references" in line.fields):
            raise line.wrong("either 'reference' or 'references' is needed")
        if "reference" in line.fields:
            references: tuple[str, ...] = (line.text("reference"),)
        else:
            references = line.texts("references")
        if not all(each.strip() for each in references):
            raise line.wrong("a reference is empty")
        pairs.append(Pair(line.text("prompt"), references))
    if not pairs:
        raise InputError(f"{file} has no lines")
    return pairs
