"""Rules of a grammar that a client wrote: nothing gets past the checks by the way it is written."""

import contextlib
import re
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
    assert _rules_of(as_lark(rules)) == _rules_of(any_to_lark(rules))


CHAIN = "".join(f"a{i}::=a{i + 1}\n" for i in range(40)) + "a40::=[x]\n"
GBNF = {
    "terminals in a chain": f"root::=a0\n{CHAIN}",
    "backwards": "root::=a0\n" + "".join(reversed(CHAIN.splitlines(keepends=True))),
    "recursion": 'root::=a | "(" root ")"\na::=b+\nb::=c | a\nc::="x"',
    "itself": 'root::=a\na::=a "x" | b\nb::="y"*',
    "twice": 'root::=a a b\na::=b b\nb::="x"\nb::=root',
    "a start": "root::=a\nstart::=a\na::=[b]",
    "names": 'root::=fooBar-x A_b\nfooBar-x::=A_b{2,3}\nA_b::=("q" | [r]) | root',
    "comments": "# of all\nroot::=a # here\n# of a\n#\na::=.",
    "empty": 'root::="" | a\na::=',
    "nobody's": 'root::="a"\nlonely::=c\nc::="c"',
    "unknown": "root::=a",
    "no root": 'a::="b"',
}


@pytest.mark.parametrize("rules", GBNF.values(), ids=GBNF)
def test_gbnf_becomes_what_the_library_makes_of_it(rules: str) -> None:
    try:
        theirs = any_to_lark(rules)
    except Exception as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            as_lark(rules)
    else:
        assert _rules_of(as_lark(rules)) == _rules_of(theirs)


def _rules_of(lark: str) -> list[str]:
    """Its lines; the library also puts empty ones between rules."""
    return [line for line in lark.splitlines() if line]


def test_the_time_of_a_conversion_grows_with_the_length() -> None:
    """Each rule needs the next one. A search that begins again after each find takes half a minute."""
    rules = "root::=a0\n" + "".join(f'a{i}::=""a{i + 1}\n' for i in range(10_000))
    before = time.process_time()
    assert "A9999:" in as_lark(f"{rules}a10000::=[x]\n")
    assert time.process_time() - before < 10


def test_what_is_neither_is_refused() -> None:
    with pytest.raises(ValueError, match="from GBNF"):
        as_lark("nonsense")
