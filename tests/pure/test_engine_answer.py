"""One run at another server: where its request begins, which tokens are new, how it ends."""

import pytest

from baton import grammar
from baton.params import GenerationParams
from baton.wire.messages import Start
from decode_worker.upstream.answer import Answer, Diverged, Faulty, Gap, Hopeless
from decode_worker.upstream.dialects import BATON, LLAMA, TEXT, VLLM, Dialect, Piece
from decode_worker.upstream.texts import Texts
from sampler.params import SamplingParams
from tests.pure.test_text_kinds import made

GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.8, seed=5)
PROMPT = (1, 2, 3)


def answer(
    *known: int,
    sampling: SamplingParams = GREEDY,
    dialect: Dialect = VLLM,
    most: int = 6,
    stops: tuple[int, ...] = (0,),
    **params: object,
) -> Answer:
    given = GenerationParams(most, sampling, stop_token_ids=stops, **params)  # type: ignore[arg-type]
    return Answer.of(Start("r#0", (*PROMPT, *known), len(PROMPT), given), dialect, 100)


def asked(each: Answer) -> tuple[tuple[int, ...], int, int]:
    request = each.asked("m")
    return tuple(request.token_ids), request.max_tokens, request.min_tokens


CONTINUED = [
    (GREEDY, VLLM), (GREEDY, LLAMA), (SEEDED, BATON),
    (SamplingParams(temperature=0.0, repetition_penalty=1.3), VLLM),
]  # fmt: skip
REPEATED = [
    (SEEDED, VLLM), (SEEDED, LLAMA),
    (SamplingParams(temperature=0.0, presence_penalty=0.5), VLLM),
    (SamplingParams(temperature=0.8, seed=5, frequency_penalty=0.5), BATON),
]  # fmt: skip


@pytest.mark.parametrize(("sampling", "dialect"), CONTINUED)
def test_it_continues_where_the_next_token_does_not_depend_on_who_made_the_last(
    sampling: SamplingParams, dialect: Dialect
) -> None:
    run = answer(10, 11, sampling=sampling, dialect=dialect, min_tokens=5)
    assert asked(run) == ((*PROMPT, 10, 11), 4, 3)
    assert list(run.take(Piece([12]))) == [(12, None)]
    assert run.token_ids == [*PROMPT, 10, 11, 12]


@pytest.mark.parametrize(("sampling", "dialect"), REPEATED)
def test_elsewhere_it_begins_again_and_drops_what_is_known(
    sampling: SamplingParams, dialect: Dialect
) -> None:
    run = answer(10, 11, sampling=sampling, dialect=dialect, min_tokens=5)
    assert asked(run) == (PROMPT, 6, 5)
    assert list(run.take(Piece([10]))) == []
    assert list(run.take(Piece([11, 12]))) == [(12, None)]
    assert list(run.take(Piece([13]))) == [(13, None)]
    assert run.token_ids == [*PROMPT, 10, 11, 12, 13]


def test_a_grammar_begins_again() -> None:
    assert asked(answer(10, grammar=grammar.json_object()))[0] == PROMPT


def test_a_fresh_run_begins_with_its_prompt() -> None:
    assert asked(answer(sampling=SEEDED)) == (PROMPT, 6, 0)


def test_other_tokens_than_before_go_on_from_those_that_were_sent() -> None:
    run = answer(10, 11, sampling=SEEDED)
    with pytest.raises(Diverged):
        list(run.take(Piece([10, 99])))
    run.go_on()
    assert asked(run) == ((*PROMPT, 10, 11), 4, 0)
    assert run.asked("m").sampling.choice != SEEDED.choice  # numbers that were not used yet
    assert list(run.take(Piece([12]))) == [(12, None)]


def test_an_answer_that_ends_before_what_is_known_is_another_one() -> None:
    run = answer(10, 11, sampling=SEEDED)
    assert list(run.take(Piece([10]))) == []
    with pytest.raises(Diverged):
        list(run.take(Piece([], "stop")))


def test_a_grammar_cannot_go_on_from_its_middle() -> None:
    with pytest.raises(Hopeless, match="grammar"):
        answer(10, grammar=grammar.json_object()).go_on()


def test_it_ends_with_its_length_and_takes_no_more() -> None:
    run = answer(most=2)
    assert list(run.take(Piece([7, 8, 9], "length"))) == [(7, None), (8, "length")]
    assert run.ended


def test_it_ends_with_an_end_token_that_the_server_shows() -> None:
    run = answer()
    assert list(run.take(Piece([7, 0, 9]))) == [(7, None), (0, "stop")]


@pytest.mark.parametrize(("end", "token"), [(None, 4), (9, 9), (77, 4)])
def test_it_ends_with_an_end_token_that_the_server_keeps(end: int | None, token: int) -> None:
    """The one that it names, else the model's first."""
    run = answer(stops=(4, 9))
    assert list(run.take(Piece([7], "stop", end))) == [(7, None), (token, "stop")]
    assert run.token_ids[-1] == token


def test_no_end_token_ends_it_before_min_tokens() -> None:
    run = answer(min_tokens=2)
    assert list(run.take(Piece([0, 7, 0]))) == [(0, None), (7, None), (0, "stop")]


WRONG = [
    (Piece(None), Hopeless, "without token ids"),
    (Piece([100]), Hopeless, "vocabulary"),
    (Piece([7], "length"), Hopeless, "max-model-len"),
    (Piece([7], "abort"), Faulty, "abort"),
    (Piece([7], "content_filter"), Faulty, "content_filter"),
    (Piece(error="the engine died"), Faulty, "the engine died"),
]


@pytest.mark.parametrize(("piece", "kind", "words"), WRONG)
def test_what_may_be_wrong_with_a_reply(piece: Piece, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        list(answer().take(piece))


def test_an_end_that_no_token_makes() -> None:
    with pytest.raises(Hopeless, match="ignore_eos"):
        list(answer(stops=()).take(Piece([7], "stop")))


def test_ids_that_a_stream_leaves_out_are_asked_for_as_one_reply() -> None:
    """llama.cpp sends no ids in the middle of a character, but counts them. Nothing of such a piece is
    taken: the missing ids come before it."""
    run = answer(dialect=LLAMA)
    assert list(run.take(Piece([7], total=1))) == [(7, None)]
    with pytest.raises(Gap):
        list(run.take(Piece([9], total=3)))
    run.ask_whole()
    assert asked(run) == ((*PROMPT, 7), 5, 0)
    assert not run.asked("m").streamed
    assert list(run.take(Piece([8, 9, 0], "stop", total=3))) == [(8, None), (9, None), (0, "stop")]


def test_a_gap_at_the_end_of_a_stream() -> None:
    run = answer(dialect=LLAMA)
    assert list(run.take(Piece([7], total=1))) == [(7, None)]
    with pytest.raises(Gap):
        list(run.take(Piece([], "length", total=6)))


def test_a_drawn_answer_with_a_gap_begins_again() -> None:
    run = answer(sampling=SEEDED, dialect=LLAMA)
    assert list(run.take(Piece([7], total=1))) == [(7, None)]
    with pytest.raises(Gap):
        list(run.take(Piece([9], total=3)))
    run.ask_whole()
    assert asked(run) == (PROMPT, 6, 0)
    assert list(run.take(Piece([7, 8, 9], total=3))) == [(8, None), (9, None)]


# ---- answers that come as text

TEXTS = Texts(made("byte level"))
ASKED = TEXTS.tokenizer.encode("The quick")
END = 999


def text_answer(known: str = "", *, most: int = 40, sampling: SamplingParams = GREEDY) -> Answer:
    ids = [token for word in known.split("|") if word for token in TEXTS.ids(word)]
    given = GenerationParams(most, sampling, stop_token_ids=(END,))
    return Answer.of(Start("r#0", (*ASKED, *ids), len(ASKED), given), TEXT, 1000, TEXTS)


def told(run: Answer, *pieces: Piece) -> tuple[str, str | None]:
    """The text of the new tokens, and the end."""
    run.asked("m")
    new = [each for piece in pieces for each in run.take(piece)]
    assert [finish for _, finish in new[:-1]] == [None] * (len(new) - 1)
    ids = [token for token, _ in new if token != END]
    return TEXTS.tokenizer.decode(ids, special=True), new[-1][1] if new else None


def says(text: str, finish: str | None = None) -> Piece:
    return Piece(None, finish, text=text)


def test_a_text_becomes_tokens_that_end_as_it_does() -> None:
    run = text_answer()
    asked = run.asked("m")
    assert (asked.text, asked.max_tokens) == ("The quick", 40)
    assert told(run, says(" br"), says("own fox jum"), says("ps", "stop")) == (
        " brown fox jumps",
        "stop",
    )
    assert run.token_ids[-1] == END


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
def test_a_text_is_resumed_from_its_prompt_whatever_its_parts_are(sampling: SamplingParams) -> None:
    run = text_answer(" brown| fox", sampling=sampling)
    assert run.asked("m").text == "The quick"
    assert told(run, says(" brown f"), says("ox"), says(" jumps over", "length")) == (
        " jumps over",
        "length",
    )


def test_another_text_than_before_goes_on_from_what_was_sent() -> None:
    run = text_answer(" brown| fox")
    run.asked("m")
    with pytest.raises(Diverged):
        list(run.take(says(" brown dog ")))
    run.go_on()
    assert run.asked("m").text == "The quick brown fox"
    assert told(run, says(" jumps"), says("", "stop")) == (" jumps", "stop")


def test_a_text_that_ends_before_what_is_known_is_another_one() -> None:
    for finish in ("stop", "length"):
        run = text_answer(" brown| fox")
        run.asked("m")
        with pytest.raises(Diverged):
            list(run.take(says(" brown", finish)))


def test_a_text_with_more_tokens_here_than_there_ends_with_the_limit() -> None:
    run = text_answer(most=3)
    assert told(run, says(" a b c d e f", "length"))[1] == "length"
    assert run.generated == 3


def test_a_text_without_a_token_is_an_answer_too() -> None:
    assert told(text_answer(), says("", "stop")) == ("", "stop")


def test_an_error_within_a_text() -> None:
    run = text_answer()
    run.asked("m")
    with pytest.raises(Faulty, match="no memory"):
        list(run.take(Piece(error="no memory")))
