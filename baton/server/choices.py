"""Choices: from the router's messages to the JSON that OpenAI's clients read, whole or in chunks.

Shapes: https://platform.openai.com/docs/api-reference (completions and chat), as vLLM serves them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.client.tracker import News
from baton.text import Tokenizer
from baton.wire.messages import Emitted, Failed, Finished, PromptScored
from baton.wire.records import Logprob, Timings

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LEAST = -9999.0
"""OpenAI's logprob of a token that cannot be drawn. JSON has no minus infinity."""


@dataclass(slots=True)
class Choice:
    """One answer, as far as it has been generated."""

    index: int
    prompt_ids: tuple[int, ...]
    echo: str = ""  # the prompt, where the answer begins with it
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    scores: tuple[Logprob, ...] = ()
    finish_reason: str | None = None
    failed: Failed | None = None
    timings: Timings | None = None

    def update(self, news: News) -> "Delta | None":
        """Takes one message in. Returns the text and tokens in it, if any."""
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
    """Counts of tokens. Each prompt counts once, however many choices it has."""
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    completion_tokens = sum(len(choice.token_ids) for choice in choices)
    cached = sum(choice.timings.cached_tokens for choice in choices if choice.timings)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt_tokens)},
    }


class Tokens:
    """The text of single tokens, and logprobs in OpenAI's two forms."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """The token by itself: half a character is U+FFFD."""
        return self._tokenizer.decode([token_id], special=True)

    def legacy(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[Logprob | None],
        *,
        offset: int = 0,
        top: int = 0,
    ) -> dict[str, Any]:
        """Logprobs of a completion. The first token of a prompt has none."""
        tokens = [self.text(each) for each in token_ids]
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
            best.setdefault(self.text(token_id), max(value, LEAST))
        return best

    def chat(self, token_ids: Sequence[int], logprobs: Sequence[Logprob]) -> dict[str, Any]:
        """Logprobs of a chat message."""
        content = []
        for token_id, logprob in zip(token_ids, logprobs, strict=True):
            top = zip(logprob.top_ids, logprob.top_values, strict=True)
            content.append(
                self._entry(token_id, logprob.value)
                | {"top_logprobs": [self._entry(each, value) for each, value in top]}
            )
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, value: float) -> dict[str, Any]:
        text = self.text(token_id)
        whole = REPLACEMENT not in text
        return {
            "token": text,
            "logprob": max(value, LEAST),
            "bytes": list(text.encode()) if whole else None,
        }


class CompletionShape:
    """/v1/completions."""

    def __init__(
        self, head: dict[str, Any], tokens: Tokens, *, logprobs: int, prompt_logprobs: int
    ) -> None:
        self._head = head | {"object": "text_completion"}
        self._tokens = tokens
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        self.plain = logprobs < 0  # the chunks of a choice differ in their text only

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk: the echoed prompt."""
        if not choice.echo:
            return None
        return self._chunk(choice, choice.echo, self._prompt_part(choice))

    def piece(self, delta: Delta) -> dict[str, Any]:
        """A chunk of text."""
        choice = delta.choice
        logprobs = None
        if self._logprobs >= 0:
            before = choice.token_ids[: len(choice.token_ids) - len(delta.token_ids)]
            offset = len(choice.echo) + sum(len(self._tokens.text(each)) for each in before)
            logprobs = self._tokens.legacy(
                delta.token_ids, delta.logprobs, offset=offset, top=self._logprobs
            )
        return self._chunk(choice, delta.text, logprobs)

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk with the finish_reason."""
        return self._chunk(choice, "", None, choice.finish_reason)

    def ending(self, usage_: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._head | {"choices": [], "usage": usage_}

    def whole(self, choices: Sequence[Choice], usage_: dict[str, Any]) -> dict[str, Any]:
        """The response as one object."""
        return self._head | {"choices": [self._choice(each) for each in choices], "usage": usage_}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        parts = [self._prompt_part(choice)]
        if self._logprobs >= 0:
            offset = len(choice.echo)
            parts.append(
                self._tokens.legacy(
                    choice.token_ids, choice.logprobs, offset=offset, top=self._logprobs
                )
            )
        return {
            "index": choice.index,
            "text": choice.echo + choice.text,
            "logprobs": _joined([part for part in parts if part is not None]),
            "finish_reason": choice.finish_reason,
        }

    def _prompt_part(self, choice: Choice) -> dict[str, Any] | None:
        if self._prompt_logprobs < 0:
            return None
        return self._tokens.legacy(
            choice.prompt_ids, [None, *choice.scores], top=self._prompt_logprobs
        )

    def _chunk(
        self,
        choice: Choice,
        text: str,
        logprobs: dict[str, Any] | None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        one = {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return self._head | {"choices": [one]}


class ChatShape:
    """/v1/chat/completions."""

    def __init__(self, head: dict[str, Any], tokens: Tokens, *, logprobs: int) -> None:
        self._head = head
        self._tokens = tokens
        self._logprobs = logprobs
        self.plain = logprobs < 0

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk: the role."""
        return self._chunk(choice, {"role": "assistant", "content": ""}, None)

    def piece(self, delta: Delta) -> dict[str, Any]:
        """A chunk of text."""
        logprobs = None
        if self._logprobs >= 0:
            logprobs = self._tokens.chat(delta.token_ids, delta.logprobs)
        return self._chunk(delta.choice, {"content": delta.text}, logprobs)

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk with the finish_reason."""
        return self._chunk(choice, {}, None, choice.finish_reason)

    def ending(self, usage_: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the usage."""
        chunk = {"object": "chat.completion.chunk", "choices": [], "usage": usage_}
        return self._head | chunk

    def whole(self, choices: Sequence[Choice], usage_: dict[str, Any]) -> dict[str, Any]:
        """The response as one object."""
        listed = [
            {
                "index": each.index,
                "message": {"role": "assistant", "content": each.text, "refusal": None},
                "logprobs": self._tokens.chat(each.token_ids, each.logprobs)
                if self._logprobs >= 0
                else None,
                "finish_reason": each.finish_reason,
            }
            for each in choices
        ]
        return self._head | {"object": "chat.completion", "choices": listed, "usage": usage_}

    def _chunk(
        self,
        choice: Choice,
        message: dict[str, Any],
        logprobs: dict[str, Any] | None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        one = {
            "index": choice.index,
            "delta": message,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return self._head | {"object": "chat.completion.chunk", "choices": [one]}


Shape = CompletionShape | ChatShape


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The prompt's logprobs followed by the answer's."""
    if not parts:
        return None
    joined: dict[str, Any] = {}
    for name in parts[0]:
        lists = [part[name] for part in parts]
        joined[name] = None if None in lists else [each for one in lists for each in one]
    return joined
