"""Channels: answers in messages with headers (OpenAI's harmony format, gpt-oss), and their grammar. Pure.

    <|channel|>analysis<|message|> 2 + 2 ... <|end|>                       reasoning
    <|start|>assistant<|channel|>commentary<|message|> I look. <|end|>     content
    <|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{...}<|call|>
    <|start|>assistant<|channel|>final<|message|> It rains. <|return|>     content

The prompt ends with <|start|>assistant. A call may also be addressed before its channel, as the template
writes calls of earlier turns: ` to=functions.weather<|channel|>commentary json<|message|>`. The model
stops behind a call, so an answer has one at most. Nothing but such messages can come, and calls are of
the request's tools. https://github.com/openai/harmony; baton/server/tools_channels.py reads it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

CHANNEL, MESSAGE, END, START = "<|channel|>", "<|message|>", "<|end|>", "<|start|>"
CONSTRAIN, CALL, RETURN = "<|constrain|>", "<|call|>", "<|return|>"
MARKS = (CHANNEL, MESSAGE, END, START, CONSTRAIN, CALL, RETURN)
ENDS = (END, CALL, RETURN)
"""Behind a message."""
ADDRESS = "to=functions."


def channelled_in(template: str) -> bool:
    """Does the model of a chat template write such messages?"""
    return CHANNEL in template and MESSAGE in template


def message_text(name: str, arguments: str) -> str:
    """One call, as a whole answer."""
    return f"{CHANNEL}commentary {ADDRESS}{name} {CONSTRAIN}json{MESSAGE}{arguments}{CALL}"


class Special(Protocol):
    """A model's special tokens."""

    def named(self, text: str) -> str:
        """The one with this text, as a rule's part; empty if there is none."""

    def any_but(self, *texts: str) -> str:
        """Another one, as a rule's part; empty if there is none."""


class ChannelRules:
    """The rules of answers that may call `tools`: names, and the schemas of their arguments. `forced`:
    one must be called; `answer`: the schema of an answer that calls none, which is needed where there
    are no tools; `begun`: the answer goes on
    with the text of a message. `json_of`: a rule's part for JSON of a schema. GAP and TEXT are known."""

    def __init__(
        self,
        tools: Sequence[tuple[str, Mapping[str, Any]]],
        special: Special,
        json_of: Callable[[Any], str],
        *,
        forced: bool,
        answer: Mapping[str, Any] | None,
        begun: bool,
    ) -> None:
        self._tools, self._special, self._json = tools, special, json_of
        self._free = not forced and answer is None
        self._answer, self._begun = None if forced else answer, begun

    def lines(self) -> Iterator[str]:
        """All of them; the first is `start`."""
        other = self._special.any_but(*MARKS)
        ends = [f"TEXT {token}" for token in map(self._special.named, ENDS) if token]
        yield f"start: {'body' if self._begun else 'messages'}"
        yield r"text_end[lazy]: TEXT /<\|(end|call|return)\|>/"
        yield f"texts: {f'(TEXT {other})*' if other else ''} ({' | '.join(['text_end', *ends])})"
        yield f'next: {self._mark(START)} "assistant" messages'
        if self._free:
            yield f"body: texts next? | {f'(TEXT {other})* ' if other else ''}TEXT"
            head = (
                f'{self._mark(CHANNEL)} ("analysis" | "commentary" | "final") {self._mark(MESSAGE)}'
            )
            yield f"messages: {head} body | call"
        else:
            yield "body: texts next"
            thought = f'{self._mark(CHANNEL)} "analysis" {self._mark(MESSAGE)} body'
            call = " | call" if self._tools else ""
            final = "" if self._answer is None else " | final"
            yield f"messages: {thought}{call}{final}"
        if self._answer is not None:
            inside = f"{self._mark(MESSAGE)} GAP? {self._json(self._answer)}"
            yield f'final: {self._mark(CHANNEL)} "final" {inside} {self._over()}'
        if self._tools:
            yield from self._calls()

    def _calls(self) -> Iterator[str]:
        address, channel = json.dumps(ADDRESS), self._mark(CHANNEL)
        names = " | ".join(f"call_{index}" for index in range(len(self._tools)))
        kind = f'(" "? {self._mark(CONSTRAIN)}? "json")? {self._mark(MESSAGE)} GAP?'
        within = " | ".join(f"within_{index}" for index in range(len(self._tools)))
        spoken = f'{channel} ("commentary" | "analysis")'
        yield f'call: {spoken} " " {address} ({within}) | " " {address} ({names})'
        for index, (name, schema) in enumerate(self._tools):
            yield f"arguments_{index}: {self._json(schema)} {self._over()}"
            yield f"within_{index}: {json.dumps(name)} {kind} arguments_{index}"
            yield f"call_{index}: {json.dumps(name)} {spoken} {kind} arguments_{index}"

    def _over(self) -> str:
        """The end of the answer, where that is no token that ends every answer."""
        return f"({' | '.join(map(self._mark, (CALL, RETURN, END)))})?"

    def _mark(self, text: str) -> str:
        token = self._special.named(text)
        return f"({json.dumps(text)} | {token})" if token else json.dumps(text)
