"""The texts of an example, and the tokens of its answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.evaluation.bundle import Example, LanguageModeling, MultipleChoice, Schema, Task
from tools.evaluation.questions import common_end, common_start, question, rendered, solved_before

CHOICE = MultipleChoice("What barks?", ("a dog", "a cat"), 0)
SCHEMA = Schema(("The dog ran because it", "The cat ran because it"), "was late", 1)
ENDING = LanguageModeling(" One two ", "three")
WORDS = st.lists(st.integers(0, 3), max_size=6)


def task(*examples: Example, shots: int = 0, delimiter: str = " ") -> Task:
    return Task("t", "any", shots, delimiter, 0.0, examples)


def test_choices_follow_the_query_and_the_delimiter() -> None:
    asked = rendered(task(CHOICE, delimiter="\nAnswer: "), 0)
    assert asked == ("What barks?\nAnswer: a dog", "What barks?\nAnswer: a cat")


def test_a_continuation_follows_each_context() -> None:
    assert rendered(task(SCHEMA), 0) == (
        "The dog ran because it was late",
        "The cat ran because it was late",
    )


def test_a_context_is_trimmed_and_the_text_without_continuation_ends_before_the_space() -> None:
    assert rendered(task(ENDING), 0) == ("One two", "One two three")


@pytest.mark.parametrize(
    ("solved", "shown"),
    [
        (CHOICE, "What barks? a dog"),
        (SCHEMA, "The cat ran because it was late"),
        (ENDING, "One two three"),
    ],
)
def test_a_solved_example_stands_before_with_its_answer_and_an_empty_line(
    solved: Example, shown: str
) -> None:
    for text in rendered(task(CHOICE, solved, shots=1), 0):
        assert text.startswith(f"{shown}\n\nWhat barks? a ")


@given(st.integers(0, 19), st.integers(1, 19))
def test_solved_examples_are_others_each_once_and_the_same_every_time(
    number: int, shots: int
) -> None:
    many = task(*(LanguageModeling(str(i), "x") for i in range(20)), shots=shots)
    drawn = solved_before(many, number)
    assert drawn == solved_before(many, number)
    assert len(set(drawn)) == shots
    assert many.examples[number] not in drawn


def test_the_draw_is_that_of_nanochat() -> None:
    """random.Random(1234 + number).sample of the others' numbers."""
    many = task(*(LanguageModeling(str(i), "x") for i in range(20)), shots=3)
    assert [each.context for each in solved_before(many, 5) if isinstance(each, LanguageModeling)] \
        == ["2", "9", "15"]  # fmt: skip


@given(WORDS, WORDS)
def test_what_two_texts_have_in_common(a: list[int], b: list[int]) -> None:
    start, end = common_start([a, b]), common_end([a, b])
    assert a[:start] == b[:start]
    assert a[len(a) - end :] == b[len(b) - end :]
    assert start == min(len(a), len(b)) or a[start] != b[start]
    assert end == min(len(a), len(b)) or a[-1 - end] != b[-1 - end]


def spans(example: Example, *texts: list[int], longest: int = 99) -> list[tuple[list[int], int]]:
    return [(list(s.token_ids), s.start) for s in question(example, texts, longest).spans]


def test_choices_are_scored_from_where_they_differ() -> None:
    assert spans(CHOICE, [0, 1, 2, 7], [0, 1, 3, 4, 7]) == [
        ([0, 1, 2, 7], 2),
        ([0, 1, 3, 4, 7], 2),
    ]


def test_of_contexts_the_common_end_is_scored() -> None:
    assert spans(SCHEMA, [0, 1, 7, 8], [0, 2, 3, 7, 8]) == [
        ([0, 1, 7, 8], 2),
        ([0, 2, 3, 7, 8], 3),
    ]


def test_of_a_continuation_what_the_text_without_it_lacks_is_scored() -> None:
    found = question(ENDING, [[0, 1, 2], [0, 1, 2, 3, 4]], 99)
    assert [(list(s.token_ids), s.start) for s in found.spans] == [([0, 1, 2, 3, 4], 3)]
    assert not found.moved


def test_a_token_across_the_boundary_is_scored_and_told() -> None:
    found = question(ENDING, [[0, 1, 2], [0, 1, 9, 4]], 99)
    assert [s.start for s in found.spans] == [2]
    assert found.moved


def test_a_choice_that_another_begins_with_still_has_a_token_to_score() -> None:
    found = question(CHOICE, [[0, 1, 2], [0, 1, 2, 3]], 99)
    assert [s.start for s in found.spans] == [2, 3]
    assert found.moved


def test_a_long_text_loses_its_beginning() -> None:
    found = question(CHOICE, [[0, 1, 2, 3], [0, 1, 2, 4, 5]], 3)
    assert [(list(s.token_ids), s.start) for s in found.spans] == [([1, 2, 3], 2), ([2, 4, 5], 1)]
    assert found.cropped


def test_an_answer_that_does_not_fit_is_not_asked() -> None:
    found = question(CHOICE, [[0, 1, 2], [0, 3, 4, 5, 6]], 3)
    assert found.spans == ()
    assert found.cropped


@given(WORDS, WORDS, WORDS, st.integers(2, 8))
def test_a_span_gives_one_token_at_least_and_keeps_every_answers_end(
    head: list[int], a: list[int], b: list[int], longest: int
) -> None:
    texts = [[9, *head, *a], [9, *head, *b]]
    for span, text in zip(question(CHOICE, texts, longest).spans, texts, strict=False):
        assert 1 <= span.start < len(span.token_ids) <= longest
        assert list(span.token_ids) == text[-len(span.token_ids) :]
