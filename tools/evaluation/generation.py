"""Generation: greedy continuations compared with references, by BLEU and ROUGE.

BLEU is sacrebleu's corpus BLEU (Papineni et al. 2002, Post 2018). ROUGE is the mean of each pair's F1.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from sacrebleu.metrics.bleu import BLEU

from baton.errors import InputError
from baton.text import Tokenizer
from tools.evaluation.data import Pair
from tools.evaluation.rouge import Rouge, rouge
from tools.evaluation.subject import Continuation, Speed, Subject

Bar = Callable[[Iterator[Continuation], int], Iterable[Continuation]]


@dataclass(frozen=True, slots=True)
class Written:
    """The result. BLEU is 0 to 100, ROUGE 0 to 1, as is customary."""

    pairs: tuple[Pair, ...]
    texts: tuple[str, ...]
    ended: int  # continuations that ended with the model's end token
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
    """Continue every prompt and compare. Raises InputError for a prompt that does not fit the context."""
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
    """The score, and sacrebleu's signature of how it was computed."""
    most = max(map(len, references))  # missing references are empty strings
    streams = [[each[i] if i < len(each) else "" for each in references] for i in range(most)]
    metric = BLEU()
    score = metric.corpus_score(list(texts), streams).score
    return float(score), str(metric.get_signature())
