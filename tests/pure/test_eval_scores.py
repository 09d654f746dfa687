"""Known scores from a scripted model, windows, BLEU and ROUGE of given texts."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InputError
from baton.package import ROOT
from baton.text import Tokenizer
from tools.evaluation.bundle import LanguageModeling, MultipleChoice, Schema, Task
from tools.evaluation.core import TaskResult, centered, core, first_tokens, run_task
from tools.evaluation.data import Pair, read_pairs
from tools.evaluation.generation import corpus_bleu, write
from tools.evaluation.perplexity import score_texts, spans_of, windows
from tools.evaluation.report import core_table
from tools.evaluation.rouge import Rouge, common_subsequence, rouge, words
from tools.evaluation.subject import About, Continuation, Meter, Scored, Span

VOCABULARY = 2048
UNIFORM = -math.log(VOCABULARY)


class Scripted:
    """A scripted model: some tokens are likely and all others equally unlikely."""

    def __init__(self, *likely: int, longest: int = 64, says: str = "") -> None:
        self.about = About("scripted", "f", "in process", "nowhere", "forward", longest, longest)
        self.meter = Meter()
        self.asked: list[Span] = []
        self._likely, self._says = set(likely), says

    def score(self, spans: Iterable[Span]) -> Iterator[Scored]:
        for span in spans:
            self.asked.append(span)
            hits = [each in self._likely for each in span.token_ids[span.start :]]
            yield Scored(tuple(-0.5 if hit else UNIFORM for hit in hits), tuple(hits))

    def write(self, prompts: Iterable[tuple[int, ...]], new_tokens: int) -> Iterator[Continuation]:
        for _ in prompts:
            yield Continuation(f" {self._says}", new_tokens, ended=False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(ROOT / "baton" / "models" / "demo" / "tokenizer.json")


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(tokenizer: Tokenizer) -> None:
    found = score_texts(Scripted(), tokenizer, ["In the future " * 60], window=20, stride=7)
    assert found.perplexity == pytest.approx(VOCABULARY)
    assert found.bits_per_token == pytest.approx(11)
    assert found.tokens == len(tokenizer.encode("In the future " * 60)) - 1


def test_bits_per_byte_are_over_what_the_scored_tokens_stand_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Größe")
    first = tokenizer.decode(ids[:1])
    found = score_texts(Scripted(), tokenizer, ["Größe"])
    assert found.text_bytes == len("Größe".encode()) - len(first.encode())
    assert found.bits_per_byte == pytest.approx(11 * (len(ids) - 1) / found.text_bytes)


def test_a_first_token_that_is_half_a_character_takes_no_bytes(tokenizer: Tokenizer) -> None:
    assert score_texts(Scripted(), tokenizer, ["日本"]).text_bytes == 6


def test_a_perplexity_beyond_all_numbers_is_infinite(tokenizer: Tokenizer) -> None:
    found = score_texts(Scripted(), tokenizer, ["one two"])
    assert replace(found, bits=found.tokens * 2000.0).perplexity == math.inf


def test_texts_are_read_apart_and_each_ends(tokenizer: Tokenizer) -> None:
    subject = Scripted()
    found = score_texts(subject, tokenizer, ["one", "two three"], end=0)
    ids = [(*tokenizer.encode(text), 0) for text in ("one", "two three")]
    assert [span.token_ids for span in subject.asked] == ids
    assert {span.start for span in subject.asked} == {1}
    assert found.tokens == sum(map(len, ids)) - 2


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        ({"window": 64}, "--window must be 1 to 63"),
        ({"window": 8, "stride": 9}, "--stride must be 1 to the window"),
    ],
)
def test_a_window_beyond_the_context_is_refused(
    tokenizer: Tokenizer, options: dict[str, int], words_: str
) -> None:
    with pytest.raises(InputError, match=words_):
        score_texts(Scripted(), tokenizer, ["one two"], **options)


def test_a_text_of_one_token_is_nothing_to_score(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="nothing to score"):
        score_texts(Scripted(), tokenizer, ["I"])


@pytest.mark.parametrize(
    ("accuracy", "baseline", "expected"),
    [(0.25, 0.25, 0.0), (1.0, 0.25, 1.0), (0.0, 0.0, 0.0), (0.25, 0.5, -0.5), (0.625, 0.25, 0.5)],
)
def test_guessing_is_nought_and_all_right_is_one(
    accuracy: float, baseline: float, expected: float
) -> None:
    assert centered(accuracy, baseline) == pytest.approx(expected)


def asked(
    subject: Scripted, tokenizer: Tokenizer, *examples: object, baseline: float = 0.0
) -> TaskResult:
    task = Task("t", "any", 0, " ", baseline, examples)  # type: ignore[arg-type]
    return run_task(subject, tokenizer, task, begin=[0])


def test_the_option_with_the_lowest_mean_loss_is_chosen(tokenizer: Tokenizer) -> None:
    water = tokenizer.encode(" water")
    choice = MultipleChoice("Fish live in", ("houses and trees", "water"), 1)
    found = asked(Scripted(*water), tokenizer, choice, MultipleChoice("x", ("water", "fire"), 1))
    assert [(v.right, v.chosen) for v in found.verdicts] == [(True, 1), (False, 0)]
    assert found.verdicts[0].losses[1] == pytest.approx(0.5)
    assert found.accuracy == 0.5


def test_a_schema_is_judged_by_its_end_alone(tokenizer: Tokenizer) -> None:
    subject = Scripted()
    found = asked(subject, tokenizer, Schema(("The cat", "The dog"), "was late", 1))
    late = len(tokenizer.encode(" was late"))
    assert {len(span.token_ids) - span.start for span in subject.asked} == {late}
    assert found.verdicts[0].chosen == 0  # of equals the first


def test_a_continuation_is_right_if_every_token_is_the_likeliest(tokenizer: Tokenizer) -> None:
    words_ = tokenizer.encode(" was late")
    example = LanguageModeling("The cat", "was late")
    assert asked(Scripted(*words_), tokenizer, example).accuracy == 1
    assert asked(Scripted(*words_[:-1]), tokenizer, example).accuracy == 0


def test_what_does_not_fit_is_wrong_and_told(tokenizer: Tokenizer) -> None:
    short = LanguageModeling("In the future, artificial intelligence will", "learn")
    long = LanguageModeling("One", "of the greatest inventions in human history")
    found = asked(Scripted(*range(VOCABULARY), longest=4), tokenizer, short, long)
    assert [each.fits for each in found.verdicts] == [True, False]
    assert found.accuracy == 0.5
    shown = core_table([found], "forward")
    assert "t: 1 examples longer than the context: cropped from the left" in shown
    assert "1 examples do not fit the context: counted as wrong" in shown


def test_core_is_the_mean_of_the_centered_accuracies(tokenizer: Tokenizer) -> None:
    right, wrong = LanguageModeling("A", "was"), LanguageModeling("A", "were")
    subject = Scripted(*tokenizer.encode(" was"))
    half = asked(subject, tokenizer, right, wrong, baseline=0.25)
    assert core([half, asked(subject, tokenizer, right)]) == pytest.approx((1 / 3 + 1) / 2)


def test_what_a_tokenizer_puts_before_a_text_is_found(tokenizer: Tokenizer) -> None:
    class Dressed:
        def encode(self, text: str, *, special: bool = True) -> list[int]:
            return [1, 5, 6, 2] if special else [5, 6]

    assert first_tokens(tokenizer) == []
    assert first_tokens(Dressed()) == [1]  # type: ignore[arg-type]


# by rouge-score 0.1.2, RougeScorer(["rouge1", "rouge2", "rougeL"]).score(target, prediction)
BY_ROUGE_SCORE = [
    ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log.",
     0.7058823529411765, 0.26666666666666666, 0.5882352941176471),
    ("testing one two", "testing", 0.5, 0.0, 0.5),
    ("testing one two three four five six seven eight", "three two one testing four eight",
     0.8, 0.0, 0.4),
    ("It's 3.5 degrees in Ærøskøbing; naïve, isn't it?", "It is 35 degrees in Aeroskobing. Naive!",
     0.2857142857142857, 0.10526315789473684, 0.2857142857142857),
    ("a b a b a b", "b a b a", 0.8, 0.75, 0.8),
    ("nothing in common", "xyz", 0.0, 0.0, 0.0),
    ("", "words", 0.0, 0.0, 0.0),
    ("words", "", 0.0, 0.0, 0.0),
    ("a", "a", 1.0, 0.0, 1.0),
    ("snake_case and UPPER", "Snake case AND upper", 1.0, 1.0, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("target", "prediction", "one", "two", "longest"), BY_ROUGE_SCORE)
def test_rouge_is_that_of_rouge_score(
    target: str, prediction: str, one: float, two: float, longest: float
) -> None:
    found = rouge(prediction, [target])
    assert (found.one, found.two, found.longest) == pytest.approx((one, two, longest))


def test_of_several_references_the_best_counts() -> None:
    """rouge-score's score_multi."""
    found = rouge("the dog sat in the sun", ["the cat sat on the mat", "a dog lay in the sun"])
    assert (found.one, found.two, found.longest) == pytest.approx((2 / 3, 0.4, 2 / 3))


@given(st.text("abc ", max_size=20), st.text("abc ", max_size=20))
def test_the_longest_common_subsequence_is_that_of_the_table(a: str, b: str) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    assert common_subsequence(a, b) == table[-1][-1]


def test_words_are_letters_and_digits_in_lower_case() -> None:
    assert words("Don't stop, R2-D2!") == ["don", "t", "stop", "r2", "d2"]


def test_bleu_is_sacrebleus_and_says_how_it_was_computed() -> None:
    """Numbers by `sacrebleu` itself."""
    score, signature = corpus_bleu(
        ["the cat sat on the mat today", "a b c d"],
        [["the cat sat on a mat today", "x y z q"], ["a b c d e"]],
    )
    assert score == pytest.approx(57.89, abs=0.005)
    assert "tok:13a" in signature


def test_continuations_are_compared_with_their_references(tokenizer: Tokenizer) -> None:
    pairs = [Pair("In the", ("future all is well",)), Pair("At", ("once", "future all is well"))]
    found = write(Scripted(says="future all is well"), tokenizer, pairs, new_tokens=8)
    assert found.bleu == pytest.approx(100)
    assert found.rouge == Rouge(1, 1, 1)
    assert (found.ended, found.speed.tokens) == (0, 16)


@pytest.mark.parametrize("prompt", ["", "word " * 60])
def test_a_prompt_that_cannot_be_continued_is_named(tokenizer: Tokenizer, prompt: str) -> None:
    with pytest.raises(InputError, match=r"prompt 2 has \d+ tokens: it must have 1 to 56"):
        write(Scripted(), tokenizer, [Pair("a", ("b",)), Pair(prompt, ("b",))], new_tokens=8)


@pytest.mark.parametrize(
    ("line", "words_"),
    [
        ('{"prompt": "a"}', "either 'reference' or 'references' is needed"),
        ('{"prompt": "a", "reference": "b", "references": ["c"]}', "either"),
        ('{"prompt": "a", "reference": " "}', "a reference is empty"),
        ('{"prompt": "a", "references": []}', "references must be a list of 1 or more texts"),
        ('{"reference": "a"}', "missing field 'prompt'"),
    ],
)
def test_a_wrong_pair_is_named(tmp_path: Path, line: str, words_: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(f'{{"prompt": "x", "reference": "y"}}\n{line}\n')
    with pytest.raises(InputError, match=r"pairs\.jsonl:2: ") as error:
        read_pairs(file)
    assert words_ in str(error.value)


# ---- windows

SIZES = st.integers(1, 12).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w)))


@given(st.integers(0, 80), SIZES)
def test_every_token_but_the_first_is_scored_exactly_once(
    tokens: int, sizes: tuple[int, int]
) -> None:
    window, stride = sizes
    cut = list(windows(tokens, window=window, stride=stride))
    assert [i for w in cut for i in range(w.start, w.end)] == list(range(1, tokens))


@given(st.integers(2, 80), SIZES)
def test_a_token_has_enough_before_it_and_a_window_is_never_exceeded(
    tokens: int, sizes: tuple[int, int]
) -> None:
    window, stride = sizes
    for at, each in enumerate(windows(tokens, window=window, stride=stride)):
        assert each.end - each.begin - 1 <= window
        assert each.start - each.begin >= (1 if at == 0 else window - stride + 1)


@given(st.integers(2, 80), st.integers(1, 12))
def test_windows_whose_stride_is_their_length_read_no_token_twice(tokens: int, window: int) -> None:
    cut = list(windows(tokens, window=window, stride=window))
    read = [i for w in cut for i in range(w.begin, w.end - 1)]
    assert read == list(range(tokens - 1))


def test_the_picture_of_the_docstring() -> None:
    cut = [(w.begin, w.start, w.end) for w in windows(8, window=4, stride=2)]
    assert cut == [(0, 1, 5), (2, 5, 7), (4, 7, 8)]


def test_a_span_is_the_window_of_the_ids() -> None:
    spans = list(spans_of([10, 11, 12, 13], window=2, stride=1))
    assert [(span.token_ids, span.start) for span in spans] == [
        ((10, 11, 12), 1),
        ((11, 12, 13), 2),
    ]


@pytest.mark.parametrize("stride", [0, 5])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="stride must be 1 to the window"):
        list(windows(9, window=4, stride=stride))
