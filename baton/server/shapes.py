"""Shapes: the JSON of responses, in OpenAI's form.

    news -> Choice.update -> Delta -> Shape.piece (JSON) -> ChunkEncoder (bytes)

https://platform.openai.com/docs/api-reference (completions and chat), as vLLM serves them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from baton.client.tracker import News
from baton.server.logprobs import Places, Vocabulary, lists, objects, of_answer, of_prompt
from baton.server.sse import event, json_of
from baton.server.tools_answer import (
    AnswerReader,
    Parts,
    ToolReading,
    call_id,
    entries,
    whole_answer,
    whole_calls,
)
from baton.text import Tokenizer
from baton.wire.messages import Emitted, Failed, Finished, PromptScored
from baton.wire.records import Logprob, Timings

MARK = "\0"
NO_CONTENT: dict[str, Any] = {"content": ""}
NO_CHOICES = '"choices":[]'
"""As encoded. No text in JSON contains it: there, quotes follow a backslash."""


@dataclass(slots=True)
class Choice:
    """One answer, generated so far."""

    index: int
    prompt_ids: tuple[int, ...]
    echo: str = ""  # the prompt's text, if the answer begins with it
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    scores: tuple[Logprob, ...] = ()
    finish_reason: str | None = None
    stop: str = ""  # the stop string that was found
    embedding: bytes = b""  # float32
    failed: Failed | None = None
    timings: Timings | None = None

    def update(self, news: News) -> "Delta | None":
        """Apply a message. Returns its text and tokens, if any."""
        match news:
            case PromptScored(_, scores):
                self.scores = scores
            case Emitted(_, token_ids, text, logprobs):
                self.text += text
                self.token_ids += token_ids
                self.logprobs += logprobs
                return Delta(self, text, token_ids, logprobs)
            case Finished(_, reason, timings, stop, embedding):
                self.finish_reason, self.timings = reason, timings
                self.stop, self.embedding = stop, embedding
            case Failed():
                self.failed = news
        return None


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of a choice."""

    choice: Choice
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[Logprob]


def usage(choices: Sequence[Choice], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Counts of tokens. A prompt counts once, however many choices it has."""
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    completion_tokens = sum(len(choice.token_ids) for choice in choices)
    cached = sum(choice.timings.cached_tokens for choice in choices if choice.timings)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt_tokens)},
    }


def billed(choices: Sequence[Choice], n: int) -> int:
    """Tokens that a tenant is charged for. A prompt counts once for its `n` choices, and only if one of
    them has come to something: what was refused, or never sent, costs nothing."""
    prompts = {
        choice.index // n: len(choice.prompt_ids)
        for choice in choices
        if choice.token_ids or choice.scores or choice.finish_reason not in (None, "abort")
    }
    return sum(prompts.values()) + sum(len(choice.token_ids) for choice in choices)


# ---- JSON


@dataclass(frozen=True, slots=True)
class Extras:
    """What a request asks for beside the text. `logprobs` and `prompt_logprobs` are as in
    GenerationParams, `silent` and `tokens_as_ids` as in Vocabulary."""

    logprobs: int = -1
    prompt_logprobs: int = -1
    silent: frozenset[int] = frozenset()
    tokens_as_ids: bool = False
    token_ids: bool = False
    later_usage: bool = False  # in the last chunk, which the others announce by a null
    continuous_usage: bool = False  # in every chunk, that of its choice
    thinking: bool | None = None  # does the answer begin within reasoning? None: it has none
    shows_reasoning: bool = True
    tools: ToolReading | None = None  # that the answer may call

    @property
    def none(self) -> bool:
        """The chunks of a choice differ in their text only."""
        return self.silent_chunks and self.thinking is None and self.tools is None

    @property
    def silent_chunks(self) -> bool:
        """A chunk without text says nothing."""
        return self.logprobs < 0 and not self.token_ids and not self.continuous_usage


class Shape(ABC):
    """A kind of response: the JSON of its choices and of the response around them."""

    whole_object = chunk_object = ""

    def __init__(
        self, head: dict[str, Any], tokenizer: Tokenizer, extras: Extras | None = None
    ) -> None:
        """`head`: id, time and model."""
        self._head = head
        self._extras = extras = extras or Extras()
        self._vocabulary = Vocabulary(tokenizer, extras.silent, extras.tokens_as_ids)
        self.plain = extras.none

    @abstractmethod
    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk, if it holds no generated text."""

    @abstractmethod
    def piece(self, delta: Delta) -> dict[str, Any]:
        """A chunk of text."""

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """All chunks of a delta."""
        return [self.piece(delta)]

    @abstractmethod
    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk with the finish_reason."""

    @abstractmethod
    def _whole(self, choice: Choice) -> dict[str, Any]:
        """A choice of the whole response."""

    def around(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """More fields of the whole response."""
        return {}

    def ending(self, usage_: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._response(self.chunk_object, [], usage=usage_)

    def whole(self, choices: Sequence[Choice], usage_: dict[str, Any]) -> bytes:
        """The response as one JSON object. It may be long: each choice is encoded by itself, so that a
        thread which does this leaves others their turns."""
        more = self.around(choices)
        around = json_of(self._response(self.whole_object, [], usage=usage_, **more))
        before, after = around.split(NO_CHOICES)
        encoded = ",".join([json_of(self._whole(choice)) for choice in choices])
        return f'{before}"choices":[{encoded}]{after}'.encode()

    def _chunk(
        self, choice: Choice, *entry: Any, token_ids: Sequence[int] = (), **more: Any
    ) -> dict[str, Any]:
        found = _entry(choice, *entry)
        if self._extras.token_ids:
            found["token_ids"] = list(token_ids)
        if self._extras.continuous_usage:
            more["usage"] = usage([choice], [choice.prompt_ids])
        elif self._extras.later_usage:
            more["usage"] = None
        return self._response(self.chunk_object, [found], **more)

    def _response(self, kind: str, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
        return self._head | {"object": kind, "choices": choices} | more


def _entry(
    choice: Choice,
    name: str,
    content: Any,
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {
        "index": choice.index,
        name: content,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }


class CompletionShape(Shape):
    """/v1/completions."""

    whole_object = chunk_object = "text_completion"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._listed: dict[int, tuple[int, Places]] = {}  # tokens so far, by choice

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The echoed prompt."""
        if not choice.echo and not self._extras.token_ids:
            return None
        chunk = self._chunk(choice, "text", choice.echo, self._of_prompt(choice))
        chunk["choices"][0] |= self._prompt_ids(choice)
        return chunk

    def piece(self, delta: Delta) -> dict[str, Any]:
        start = len(delta.choice.token_ids) - len(delta.token_ids)
        logprobs = self._generated(delta.choice, start, delta)
        return self._chunk(delta.choice, "text", delta.text, logprobs, token_ids=delta.token_ids)

    def closing(self, choice: Choice) -> dict[str, Any]:
        return self._chunk(choice, "text", "", None, choice.finish_reason)

    def _whole(self, choice: Choice) -> dict[str, Any]:
        logprobs = _joined(self._of_prompt(choice), self._generated(choice, 0, choice))
        found = _entry(choice, "text", choice.echo + choice.text, logprobs, choice.finish_reason)
        if self._extras.token_ids:
            found |= {"token_ids": choice.token_ids} | self._prompt_ids(choice)
        return found

    def _prompt_ids(self, choice: Choice) -> dict[str, Any]:
        return {"prompt_token_ids": choice.prompt_ids} if self._extras.token_ids else {}

    def _of_prompt(self, choice: Choice) -> dict[str, Any] | None:
        top = self._extras.prompt_logprobs
        if top < 0:
            return None
        offsets = of_prompt(self._vocabulary, choice.prompt_ids, choice.echo)
        scores = [None, *choice.scores]
        return lists(self._vocabulary, choice.prompt_ids, scores, offsets, top=top)

    def _generated(self, choice: Choice, start: int, new: Choice | Delta) -> dict[str, Any] | None:
        """Logprobs of `new`, whose first token is the choice's token number `start`."""
        if self._extras.logprobs < 0:
            return None
        shown = self._vocabulary.bytes
        listed, places = self._listed.get(choice.index, (0, None))
        if places is None or listed != start or not start:
            places = of_answer(self._vocabulary, choice.prompt_ids, len(choice.echo))
            for each in choice.token_ids[:start]:
                places.add(shown(each))
        offsets = [places.add(shown(each)) for each in new.token_ids]
        self._listed[choice.index] = start + len(new.token_ids), places
        top = self._extras.logprobs
        return lists(self._vocabulary, new.token_ids, new.logprobs, offsets, top=top)


class ChatShape(Shape):
    """/v1/chat/completions."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._readers: dict[int, AnswerReader] = {}  # by choice

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The role."""
        more = {"prompt_token_ids": choice.prompt_ids} if self._extras.token_ids else {}
        return self._chunk(choice, "delta", {"role": "assistant", "content": ""}, **more)

    def piece(self, delta: Delta) -> dict[str, Any]:
        """The first of pieces(), where tools are not called the only one."""
        return self._pieces(delta)[0]

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """One chunk for text, one for each part of a call: clients join these by their index. What
        belongs to the tokens stands in the first."""
        found = self._pieces(delta)
        calls = self._extras.tools is not None and self._extras.silent_chunks
        empty = calls and found[0]["choices"][0]["delta"] == NO_CONTENT
        return found[1:] if empty else found

    def _pieces(self, delta: Delta) -> list[dict[str, Any]]:
        reader = self._reader(delta.choice)
        told = [{"content": delta.text}]
        if reader is not None:
            told = self._told(delta.choice, reader.take(delta.text)) or [NO_CONTENT]
        logprobs = self._generated(delta)
        chunk = self._chunk(delta.choice, "delta", told[0], logprobs, token_ids=delta.token_ids)
        return [chunk, *(self._chunk(delta.choice, "delta", each) for each in told[1:])]

    def closing(self, choice: Choice) -> dict[str, Any]:
        reader, last, reason = self._reader(choice), dict[str, Any](), choice.finish_reason
        if reader is not None:
            for each in self._told(choice, reader.end()):  # text only: calls are never held back
                last |= each
            reason = reader.finish_reason(reason)
        return self._chunk(choice, "delta", last, None, reason)

    def _reader(self, choice: Choice) -> AnswerReader | None:
        """Of an answer that is streamed; None if its text is all content."""
        thinking, tools = self._extras.thinking, self._extras.tools
        if thinking is None and tools is None:
            return None
        if choice.index not in self._readers:
            self._readers[choice.index] = AnswerReader(thinking, tools)
        return self._readers[choice.index]

    def _told(self, choice: Choice, parts: Parts) -> list[dict[str, Any]]:
        """As deltas."""
        reasoning = parts.reasoning if self._extras.shows_reasoning else ""
        texts = {"reasoning_content": reasoning, "content": parts.content}
        told: dict[str, Any] = {name: text for name, text in texts.items() if text}
        calls = entries(parts.calls, partial(self._call_id, choice))
        return [*([told] if told else []), *({"tool_calls": [each]} for each in calls)]

    def _call_id(self, choice: Choice, index: int) -> str:
        tools = self._extras.tools
        assert tools is not None  # only then are there calls
        return call_id(str(self._head.get("id")), choice.index, index, tools.form)

    def around(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {"prompt_token_ids": choices[0].prompt_ids} if self._extras.token_ids else {}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        extras = self._extras
        found = whole_answer(choice.text, choice.finish_reason, extras.thinking, extras.tools)
        silent = bool(found.reasoning or found.calls)
        content = found.content or (None if silent else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if extras.thinking is not None and extras.shows_reasoning:
            message["reasoning_content"] = found.reasoning or None
        if found.calls:
            message["tool_calls"] = whole_calls(found.calls, partial(self._call_id, choice))
        logprobs = self._generated(choice)
        entry = _entry(choice, "message", message, logprobs, found.finish_reason)
        return entry | ({"token_ids": choice.token_ids} if extras.token_ids else {})

    def _generated(self, new: Choice | Delta) -> dict[str, Any] | None:
        if self._extras.logprobs < 0:
            return None
        return objects(self._vocabulary, new.token_ids, new.logprobs)


def _joined(*parts: dict[str, Any] | None) -> dict[str, Any] | None:
    """The prompt's logprobs followed by the answer's."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    joined: dict[str, Any] = {}
    for name in given[0]:
        lists = [part[name] for part in given]
        joined[name] = None if None in lists else [each for one in lists for each in one]
    return joined


class ChunkEncoder:
    """Encodes deltas as events. The chunks of a choice differ in their text only, so the bytes around it
    are encoded once."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._around: dict[int, tuple[str, str]] = {}  # by choice

    def event(self, delta: Delta) -> bytes:
        """The same bytes as those of event() for each of shape.pieces(delta)."""
        if not self._shape.plain:
            return b"".join(map(event, self._shape.pieces(delta)))
        around = self._around.get(delta.choice.index)
        if around is None:
            marked = event(self._shape.piece(replace(delta, text=MARK))).decode()
            before, _, after = marked.rpartition(
                json_of(MARK)
            )  # from the right: the id comes before the text
            around = self._around[delta.choice.index] = before, after
        return f"{around[0]}{json_of(delta.text)}{around[1]}".encode()
