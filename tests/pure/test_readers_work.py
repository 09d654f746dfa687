"""Readers of answers look at each character a bounded number of times, however the text is cut."""

import json
from itertools import accumulate
from typing import Any

import pytest

from baton.server.speech import Speech
from baton.server.tools_marked import reader_of
from baton.server.tools_reader import CallReader, Nested
from baton.server.unquoted import Unquoted
from baton.tool_calls import FORMATS, CallFormat
from baton.tool_calls_marked import parameters_of

LENGTH = 300
MOST = 256
"""Characters that may be held back: the longest marks, and white space between them."""
SCHEMA: dict[str, Any] = {
    "type": "object", "additionalProperties": True,
    "properties": {
        "text": {"type": "string"}, "any": {}, "json": {"type": "object"},
        "null": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
}  # fmt: skip
NAMES = ("weather", "get_time")
ENDLESS = (" ", "a", '"', "{", "<")


def begun(form: CallFormat) -> list[str]:
    """Answers of this format, up to each place where something endless may follow."""
    opens = form.opens
    marks = form.marked
    if marks is None:
        head = f'{{"name": "weather", "{form.arguments}": '
        starts = [
            opens,
            f'{opens}{{"na',
            f"{opens}{head}",
            f'{opens}{head}{{"a": ',
            f"{opens}{head}{{}}",
        ]
        return ["", f"{opens}[", f"{opens}[{head}", *starts, f"{opens}{head}{{}}}}", "text"]
    named = "".join((*marks.begins, "weather", ":0" if marks.numbered else "", *marks.named))
    found = [
        "",
        opens,
        opens + "".join(marks.begins),
        f"{opens}{''.join(marks.begins)}weather",
        opens + named,
    ]
    if marks.parameter is None:
        return [*found, f'{opens}{named}{{"a": ', f"{opens}{named}{{}}", "text"]
    keys = [f"{opens}{named}{marks.parameter.opens}", f"{opens}{named}{marks.parameter.opens}te"]
    for key in ("text", "any", "json", "null", "other"):
        value = f"{opens}{named}{marks.parameter.opens}{key}{''.join(marks.parameter.keyed)}"
        keys += [value, f"{value}x", f'{value}"', f"{value}{marks.parameter.closes}"]
    return [*found, *keys]


@pytest.mark.parametrize("form", [each for each in FORMATS.values() if not each.channels])
def test_nothing_endless_is_looked_at_again_and_again(form: CallFormat) -> None:
    parameters = {each: parameters_of(each, SCHEMA) for each in NAMES}
    for start in begun(form):
        for endless in ENDLESS:
            reader = reader_of(form, NAMES, parameters)
            reader.take(start)
            most = max((reader.take(endless), reader.held)[1] for _ in range(LENGTH))
            assert most < MOST, (start, endless)


@pytest.mark.parametrize("start", ["", "<think>", "<think>a", "<think>a</think>"])
@pytest.mark.parametrize("endless", [" ", "\n", "<", "</think", "a "])
def test_reasoning_neither(start: str, endless: str) -> None:
    for open_ in (False, True):
        speech = Speech(begun=open_)
        speech.take(start)
        held = []
        for _ in range(LENGTH):
            speech.take(endless)
            held.append(speech.held)
        assert max(held) < MOST


def test_what_is_held_back_comes_in_the_end() -> None:
    form = FORMATS["hermes"]
    gap = " \n" * 500
    reader = CallReader(form, NAMES)
    found = [*map(reader.take, f"a{gap}b{gap}"), reader.end()]
    assert "".join(each.content for each in found) == f"a{gap}b{gap}"
    speech = Speech(begun=True)
    said = [*map(speech.take, f"{gap}a{gap}b{gap}"), speech.end()]
    assert "".join(each.reasoning for each in said) == f"a{gap}b"


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_json_is_gone_through_once(size: int) -> None:
    """However it is cut, what stands outside of quotes is found where a parser finds it."""
    value = {"a}": ['"', "\\", '\\"', "]", {"b": ["{", "é"]}], "c": [[], {}]}
    text = json.dumps(value, ensure_ascii=False)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    nested, read = Nested(), []
    for piece in [*pieces[:-1], f"{pieces[-1]} {{}}"]:
        read.append(nested.read(piece))
    assert sum(read) == len(text)
    assert not nested.open
    brackets = Unquoted(r"[{}\[\]]")
    begins = accumulate(map(len, pieces), initial=0)
    found = [
        at + each.start()
        for at, piece in zip(begins, pieces, strict=False)
        for each in brackets.found(piece)
    ]
    bare = json.dumps(json.loads(text), ensure_ascii=False)
    depth, quoted, places = 0, False, []
    for at, each in enumerate(bare):
        escaped = at > 0 and (len(bare[:at]) - len(bare[:at].rstrip("\\"))) % 2 == 1
        quoted = quoted != (each == '"' and not escaped)
        if not quoted and each in "{}[]":
            places.append(at)
            depth += 1 if each in "{[" else -1
    assert found == places
    assert depth == 0
