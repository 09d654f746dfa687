"""Tools answer: an answer in all its parts, while it comes: reasoning, content, calls of tools. Pure.

    reader = AnswerReader(thinking, tools)      one for each answer
    reader.take(text), reader.end() -> Parts    for each new piece of text, and after the last
    reader.finish_reason("stop")                tool_calls, if the answer is complete and calls some

entries() and whole_calls() write calls as OpenAI's chats have them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from baton.server.speech import Said, Speech
from baton.server.tools_channels import ChannelReader
from baton.server.tools_marked import reader_of
from baton.server.tools_reader import Call, CallPiece, CallReader, Heard, joined
from baton.tool_calls import CallFormat
from baton.tool_calls_marked import Parameters

AT_ONCE = 4096
"""Characters that a reader takes of a whole answer: it copies what is left of them with every call."""


@dataclass(frozen=True, slots=True)
class ToolReading:
    """How the calls in a request's answers are read: as reader_of() has it."""

    form: CallFormat
    names: tuple[str, ...]
    forced: bool = False
    parameters: Mapping[str, Parameters] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Parts:
    """New text of each kind."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallPiece, ...] = ()


class AnswerReader:
    """One answer. `thinking`: it begins within reasoning, may begin with it (False), or has none that is
    told apart (None). `tools`: None if it calls none. Where a format has channels, reasoning is one of
    them, and `thinking` says whether the answer goes on with a message's content."""

    def __init__(self, thinking: bool | None, tools: ToolReading | None) -> None:
        self._speech: Speech | None = None
        self._calls: CallReader | ChannelReader | None = None
        if tools is not None and tools.form.channels:
            self._calls = ChannelReader(
                tools.names, begun=thinking is True, reasons=thinking is not None
            )
            return
        if thinking is not None:
            self._speech = Speech(begun=thinking)
        if tools is not None:
            self._calls = reader_of(tools.form, tools.names, tools.parameters, forced=tools.forced)

    def take(self, text: str) -> Parts:
        """New text. What it completes."""
        said = Said(content=text) if self._speech is None else self._speech.take(text)
        return self._parts(said)

    def end(self) -> Parts:
        """The answer has ended. What was held back."""
        last = self._parts(Said() if self._speech is None else self._speech.end())
        heard = Heard() if self._calls is None else self._calls.end()
        reasoning, content = last.reasoning + heard.reasoning, last.content + heard.content
        return Parts(reasoning, content, (*last.calls, *heard.calls))

    def finish_reason(self, reason: str | None) -> str | None:
        """An answer that ends with calls says so, unless the last one is cut off."""
        called = self._calls is not None and self._calls.calls and self._calls.complete
        return "tool_calls" if reason == "stop" and called else reason

    def _parts(self, said: Said) -> Parts:
        if self._calls is None:
            return Parts(said.reasoning, said.content)
        heard = self._calls.take(said.content)
        return Parts(said.reasoning + heard.reasoning, heard.content, heard.calls)


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """All of it. `finish_reason`: as OpenAI has it."""

    reasoning: str
    content: str
    calls: tuple[Call, ...]
    finish_reason: str | None


def whole_answer(
    text: str, reason: str | None, thinking: bool | None, tools: ToolReading | None
) -> WholeAnswer:
    """The parts of a whole answer, which ended for this reason."""
    reader = AnswerReader(thinking, tools)
    cuts = range(0, len(text), AT_ONCE)
    parts = [*(reader.take(text[at : at + AT_ONCE]) for at in cuts), reader.end()]
    calls = joined([piece for part in parts for piece in part.calls])
    return WholeAnswer(
        "".join(each.reasoning for each in parts),
        "".join(each.content for each in parts),
        calls,
        reader.finish_reason(reason),
    )


# ---- JSON


def call_id(answer: str, choice: int, index: int, form: CallFormat) -> str:
    """Of call `index` of choice `choice` of the answer with this id. Mistral's templates take letters and
    digits only, nine of them."""
    found = blake2b(f"{answer}\0{choice}\0{index}".encode()).hexdigest()[: form.id_length]
    return found if form.id_length < 10 else f"call_{found}"


def entries(calls: Sequence[CallPiece], id_of: Callable[[int], str]) -> Iterator[dict[str, Any]]:
    """Entries of `tool_calls` in deltas, each for a delta of its own, because clients join them by index.
    `id_of`: of a call by its index; asked for once, where it begins."""
    for each in calls:
        function: dict[str, Any] = {"arguments": each.arguments}
        if not each.name:
            yield {"index": each.index, "function": function}
            continue
        about = {"id": id_of(each.index), "type": "function"}
        yield {"index": each.index} | about | {"function": {"name": each.name} | function}


def whole_calls(calls: Sequence[Call], id_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """`tool_calls` of a message."""
    return [
        {"id": id_of(i), "type": "function", "function": {"name": e.name, "arguments": e.arguments}}
        for i, e in enumerate(calls)
    ]
