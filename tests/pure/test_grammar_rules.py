"""Rules of a grammar that a client wrote: nothing gets past the checks by the way it is written."""

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance.gbnf_to_lark import any_to_lark, is_lark_syntax

from baton import grammar_rules
from baton.errors import RequestError
from baton.grammar import written
from baton.grammar_rules import DEEPEST_GROUP, as_lark, check_rules

STRING = '%json {"type":"string"}'
DEEP = "(" * 1000 + '"a"' + ")" * 1000


@pytest.mark.parametrize(
    "rules",
    [
        f"start: {STRING}",
        f"start: [ {STRING} ]",
        f'start: /"/ {STRING} /"/',
        f'start: /a\n"/ {STRING} /"b/',
        f"start: <\"> {STRING} <\">",
        f"start: /#/ {STRING}",
        f'start: "#" {STRING}',
        f'start: "//" {STRING}',
        f'start: "a" // "\n  | {STRING} // "',
        f'start: "\\"" {STRING}',
        "start: %jsontrue",
        'start: %regex {"substring_words": "a b"}',
        '%llguidance {}\nstart: "a"',
    ],
)  # fmt: skip
def test_a_directive_is_seen_wherever_it_stands(rules: str) -> None:
    with pytest.raises(RequestError, match="is not supported") as caught:
        check_rules(rules)
    assert caught.value.code == "invalid_grammar"


@pytest.mark.parametrize(
    "rules",
    [
        'start: "%json {}" | /%json {}/',
        "start: /[%]json/ // %json",
        '# %json\nstart: "a"',
        'start: "' + "(" * 200 + '"',
        "start: /" + r"\(" * 200 + "/",
        'start: "a"\n// ' + "(" * 200,
        "root ::= [" + "(" * 200 + "]",
        'root ::= "' + "(" * 200 + '"',
        r"root ::= [^\]%json]+",
        'root ::= "a"  # %json ' + "(" * 200,
        'start: "/" | "a" "/"',
        "start: " + "(" * DEEPEST_GROUP + '"a"' + ")" * DEEPEST_GROUP,
    ],
)
def test_what_is_quoted_is_text(rules: str) -> None:
    written(rules)


@pytest.mark.parametrize(
    "rules",
    [
        "start: [" + "(" * 16_000 + "]",
        "start: " + "[" * 65 + "A" + "]" * 65,
        f'start: /"/ {DEEP} /"/',
        f"start: A\nA: {DEEP}",
        "start: " + ")" * 1000 + DEEP,
        "start: " + "a{" * 1000,
        f"root ::= {DEEP}",
        f'root ::= "a" | [b] {DEEP} [c]',
    ],
    ids=lambda rules: rules[:40],
)
def test_brackets_are_counted_wherever_they_stand(rules: str) -> None:
    with pytest.raises(RequestError, match="nests more than 64 brackets"):
        check_rules(rules)


@pytest.mark.parametrize(
    ("rules", "what"),
    [
        ('start: "a', "string"), ('start: "a\n"', "string"), ("start: /a", "regex"),
        ('root ::= "a', "string"), ("root ::= [a", "class of characters"),
        ("[" * 16_384, "class of characters"),
    ],
)  # fmt: skip
def test_what_does_not_end_is_named(rules: str, what: str) -> None:
    with pytest.raises(RequestError, match=f"a {what} that does not end"):
        check_rules(rules)


@pytest.mark.parametrize("head", ["start: ", ""])
@pytest.mark.parametrize(
    "piece",
    ["[", '"', '\\"', '"\\', "/", "\\/", "/\\", "<", "<a", "%", "% ", "\n", "\nstart", "\nstart ", "#"],
)  # fmt: skip
def test_the_time_grows_with_the_length(head: str, piece: str) -> None:
    """The square of the time would be minutes."""
    rules = head + piece * (200_000 // len(piece))
    before = time.process_time()
    with contextlib.suppress(RequestError):
        check_rules(rules)
    assert time.process_time() - before < 5


PIECES = st.sampled_from(["start", ":", " ", "\n", "\r", "%llguidance", "_", "\x0b", "\x85", "a"])


@given(st.lists(PIECES, max_size=8).map("".join))
def test_the_notation_is_what_the_library_takes_it_for(rules: str) -> None:
    assert grammar_rules._is_lark(rules) is is_lark_syntax(rules)


@pytest.mark.parametrize("rules", ['root ::= "a" | [b-d]+', 'start: "a"'])
def test_both_notations_become_larks(rules: str) -> None:
    assert as_lark(rules) == any_to_lark(rules)


def test_what_is_neither_is_refused() -> None:
    with pytest.raises(ValueError, match="from GBNF"):
        as_lark("nonsense")
