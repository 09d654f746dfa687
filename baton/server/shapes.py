"""Shapes: the JSON of responses, in OpenAI's form.

    news -> Choice.update -> Delta -> Shape.piece (JSON) -> ChunkEncoder (bytes)

https://platform.openai.com/docs/api-reference (completions and chat), as vLLM serves them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from baton.client.tracker import News
from baton.server.sse import event, json_of
from baton.text import Tokenizer
from baton.wire.messages import Emitted, Failed, Finished, PromptScored
from baton.wire.records import Logprob, Timings

MARK = "\0"
NO_CHOICES = '"choices":[]'
"""As encoded. No text in JSON contains it: there, quotes follow a backslash."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LEAST = -9999.0
"""OpenAI's logprob of a token that cannot be drawn. JSON has no minus infinity."""


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
            case Finished(_, reason, timings):
                self.finish_reason, self.timings = reason, timings
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


# ---- JSON


class Shape(ABC):
    """A kind of response: the JSON of its choices and of the response around them."""

    whole_object = chunk_object = ""

    def __init__(
        self,
        head: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        logprobs: int = -1,
        prompt_logprobs: int = -1,
    ) -> None:
        """`head`: id, time and model. The rest is as in GenerationParams."""
        self._head = head
        self._tokenizer = tokenizer
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        self.plain = logprobs < 0  # the chunks of a choice differ in their text only
        self._listed: dict[int, tuple[int, int]] = {}  # tokens and characters so far, by choice

    @abstractmethod
    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk, if it holds no generated text."""

    @abstractmethod
    def piece(self, delta: Delta) -> dict[str, Any]:
        """A chunk of text."""

    @abstractmethod
    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk with the finish_reason."""

    @abstractmethod
    def _whole(self, choice: Choice) -> dict[str, Any]:
        """A choice of the whole response."""

    def ending(self, usage_: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._response(self.chunk_object, [], usage=usage_)

    def whole(self, choices: Sequence[Choice], usage_: dict[str, Any]) -> bytes:
        """The response as one JSON object. It may be long: each choice is encoded by itself, so that a
        thread which does this leaves others their turns."""
        around = json_of(self._response(self.whole_object, [], usage=usage_))
        before, after = around.split(NO_CHOICES)
        encoded = ",".join([json_of(self._whole(choice)) for choice in choices])
        return f'{before}"choices":[{encoded}]{after}'.encode()

    def _token(self, token_id: int) -> str:
        return self._tokenizer.token_text(token_id)

    def _chunk(self, *entry: Any) -> dict[str, Any]:
        return self._response(self.chunk_object, [_entry(*entry)])

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
    _ids = False

    def show_ids(self, wanted: bool) -> None:
        """Whether choices also show their token ids."""
        self._ids, self.plain = wanted, self.plain and not wanted

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The echoed prompt."""
        if not choice.echo:
            return None
        return self._chunk(choice, "text", choice.echo, self._of_prompt(choice))

    def piece(self, delta: Delta) -> dict[str, Any]:
        start = len(delta.choice.token_ids) - len(delta.token_ids)
        logprobs = self._generated(delta.choice, start, delta)
        if self._ids:
            entry = _entry(delta.choice, "text", delta.text, logprobs)
            return self._response(self.chunk_object, [entry | {"token_ids": list(delta.token_ids)}])
        return self._chunk(delta.choice, "text", delta.text, logprobs)

    def closing(self, choice: Choice) -> dict[str, Any]:
        return self._chunk(choice, "text", "", None, choice.finish_reason)

    def _whole(self, choice: Choice) -> dict[str, Any]:
        logprobs = _joined(self._of_prompt(choice), self._generated(choice, 0, choice))
        entry = _entry(choice, "text", choice.echo + choice.text, logprobs, choice.finish_reason)
        return entry | ({"token_ids": choice.token_ids} if self._ids else {})

    def _of_prompt(self, choice: Choice) -> dict[str, Any] | None:
        if self._prompt_logprobs < 0:
            return None
        first = self._tokenizer.decode(choice.prompt_ids[:1], special=True)  # no space before it
        tokens = [first, *map(self._token, choice.prompt_ids[1:])]
        return self.listed(tokens, [None, *choice.scores], top=self._prompt_logprobs)

    def _generated(self, choice: Choice, start: int, new: Choice | Delta) -> dict[str, Any] | None:
        """Logprobs of `new`, whose first token is the choice's token number `start`."""
        if self._logprobs < 0:
            return None
        listed, offset = self._listed.get(choice.index, (0, 0))
        if listed != start or not start:
            offset = len(choice.echo) + sum(len(self._token(i)) for i in choice.token_ids[:start])
        tokens = list(map(self._token, new.token_ids))
        found = self.listed(tokens, new.logprobs, offset=offset, top=self._logprobs)
        offset += sum(map(len, found["tokens"]))
        self._listed[choice.index] = start + len(new.token_ids), offset
        return found

    def listed(
        self,
        tokens: Sequence[str],
        logprobs: Sequence[Logprob | None],
        *,
        offset: int = 0,
        top: int = 0,
    ) -> dict[str, Any]:
        """Logprobs as lists. The first token of a prompt has none."""
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [
                None if each is None else max(each.value, LEAST) for each in logprobs
            ],
            "top_logprobs": [self._top(each) for each in logprobs] if top else None,
            "text_offset": offsets,
        }

    def _top(self, logprob: Logprob | None) -> dict[str, float] | None:
        if logprob is None:
            return None
        pairs = zip(logprob.top_ids, logprob.top_values, strict=True)
        best: dict[str, float] = {}
        for token_id, value in pairs:  # ids with equal text: the likeliest is kept
            best.setdefault(self._token(token_id), max(value, LEAST))
        return best


class ChatShape(Shape):
    """/v1/chat/completions."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The role."""
        return self._chunk(choice, "delta", {"role": "assistant", "content": ""})

    def piece(self, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text}
        return self._chunk(delta.choice, "delta", content, self._generated(delta))

    def closing(self, choice: Choice) -> dict[str, Any]:
        return self._chunk(choice, "delta", {}, None, choice.finish_reason)

    def _whole(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return _entry(choice, "message", message, self._generated(choice), choice.finish_reason)

    def _generated(self, new: Choice | Delta) -> dict[str, Any] | None:
        return self.listed(new.token_ids, new.logprobs) if self._logprobs >= 0 else None

    def listed(self, token_ids: Sequence[int], logprobs: Sequence[Logprob]) -> dict[str, Any]:
        """Logprobs as one object a token."""
        content = []
        for token_id, logprob in zip(token_ids, logprobs, strict=True):
            top = zip(logprob.top_ids, logprob.top_values, strict=True)
            content.append(
                self._scored(token_id, logprob.value)
                | {"top_logprobs": [self._scored(each, value) for each, value in top]}
            )
        return {"content": content, "refusal": None}

    def _scored(self, token_id: int, value: float) -> dict[str, Any]:
        text = self._token(token_id)
        half = REPLACEMENT in text
        found = self._tokenizer.token_bytes(token_id) if half else text.encode()
        return {
            "token": text,
            "logprob": max(value, LEAST),
            "bytes": list(found) if found is not None else None,
        }


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
        """The same bytes as event(shape.piece(delta))."""
        if not self._shape.plain:
            return event(self._shape.piece(delta))
        around = self._around.get(delta.choice.index)
        if around is None:
            marked = event(self._shape.piece(replace(delta, text=MARK))).decode()
            before, _, after = marked.rpartition(
                json_of(MARK)
            )  # from the right: the id comes before the text
            around = self._around[delta.choice.index] = before, after
        return f"{around[0]}{json_of(delta.text)}{around[1]}".encode()
