"""Answer: the response object and the events of its stream, made of a chat's pieces. Pure.

    created, in_progress                                     the response begins
    output_item.added                                        reasoning, message or function_call
      content_part.added, *.delta ..., *.done, content_part.done     (a call: *.delta ..., *.done)
    output_item.done                                         the item has ended
    completed | incomplete | failed                          the whole response again

A response that is not streamed is made in the same way, of one piece of each kind. The deltas of an item,
joined, are its text, however the answer was cut.
https://platform.openai.com/docs/api-reference/responses-streaming
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from baton.server.pieces import Call, Content, Piece, Reasoning
from baton.server.responses.items import Item, NewId
from baton.server.responses.namespaces import Named

Event = dict[str, Any]
SERVER_ERROR = "server_error"
STATUSES = {"length": "incomplete", "abort": "incomplete"}
"""By finish_reason; completed after others."""


class Output:
    """The items of one response."""

    def __init__(
        self, new_id: NewId, *, logprobs: bool = False, namespaces: Named | None = None
    ) -> None:
        """`logprobs`: show them. `namespaces`: of the functions that may be called."""
        self._new_id, self._shows, self._namespaces = new_id, logprobs, namespaces or {}
        self._at: object = None  # of which kind the last item is; None: it has ended
        self._texts: list[str] = []  # of the last item
        self._logprobs: list[Any] = []
        self._early: list[Any] = []  # of tokens whose text has not come yet
        self.items: list[Item] = []

    def take(self, pieces: Sequence[Piece]) -> Iterator[Event]:
        """The events that these pieces lead to."""
        for piece in pieces:
            if isinstance(piece, Content):
                self._early += piece.logprobs if self._shows else ()
                if not piece.text:
                    continue
            at = ("call", piece.index) if isinstance(piece, Call) else type(piece)
            if at != self._at:
                yield from self._close("completed")
                yield from self._open(piece)
                self._at = at
            yield from self._grow(piece)

    def end(self, status: str) -> Iterator[Event]:
        """The answer has ended: completed or incomplete. One without any item is an empty message."""
        if not self.items:
            yield from self._open(Content(""))
            self._at = Content
        self._logprobs += self._early
        yield from self._close(status)

    def _open(self, piece: Piece) -> Iterator[Event]:
        self._texts, self._logprobs = [], []
        item: Item
        match piece:
            case Reasoning():
                item = {"id": self._new_id("rs"), "type": "reasoning", "summary": [], "content": []}
            case Content():
                item = {
                    "id": self._new_id("msg"),
                    "type": "message",
                    "role": "assistant",
                    "content": [],
                }
            case Call():
                item = {"id": self._new_id("fc"), "type": "function_call", "call_id": piece.id,
                        "name": piece.name, "arguments": ""}  # fmt: skip
                if piece.name in self._namespaces:
                    item["namespace"], item["name"] = self._namespaces[piece.name]
        item["status"] = "in_progress"
        self.items.append(item)
        yield self._about("response.output_item.added", item=dict(item))
        if not isinstance(piece, Call):
            yield self._about("response.content_part.added", content_index=0, part=self._part())

    def _grow(self, piece: Piece) -> Iterator[Event]:
        match piece:
            case Reasoning(text):
                self._texts.append(text)
                yield self._about("response.reasoning_text.delta", content_index=0, delta=text)
            case Content(text):
                self._texts.append(text)
                scores, self._early = self._early, []
                self._logprobs += scores
                told = in_event(scores)
                yield self._about(
                    "response.output_text.delta", content_index=0, delta=text, logprobs=told
                )
            case Call(_, arguments) if arguments:
                self._texts.append(arguments)
                yield self._about("response.function_call_arguments.delta", delta=arguments)

    def _close(self, status: str) -> Iterator[Event]:
        if self._at is None:
            return
        item, text, part = self.items[-1], "".join(self._texts), self._part()
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._about(
                "response.function_call_arguments.done", name=item["name"], arguments=text
            )
        else:
            item["content"] = [part]
            whole = {"content_index": 0, "text": text}
            if item["type"] == "reasoning":
                yield self._about("response.reasoning_text.done", **whole)
            else:
                scores = in_event(self._logprobs)
                yield self._about("response.output_text.done", **whole, logprobs=scores)
            yield self._about("response.content_part.done", content_index=0, part=part)
        item["status"] = status
        self._at = None
        yield self._about("response.output_item.done", item=dict(item))

    def _part(self) -> Item:
        text = "".join(self._texts)
        if self.items[-1]["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        scores = list(self._logprobs)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}

    def _about(self, kind: str, **more: Any) -> Event:
        """An event of the last item."""
        place: Event = {"type": kind, "output_index": len(self.items) - 1}
        return place | ({} if "item" in more else {"item_id": self.items[-1]["id"]}) | more


def in_event(scores: Sequence[Mapping[str, Any]]) -> list[Item]:
    """Logprobs of a chat, as this API's events have them: without bytes."""
    return [
        {
            "token": each["token"],
            "logprob": each["logprob"],
            "top_logprobs": [
                {"token": top["token"], "logprob": top["logprob"]} for top in each["top_logprobs"]
            ],
        }
        for each in scores
    ]


def usage_of(chat: Mapping[str, Any], reasoning_tokens: int) -> dict[str, Any]:
    """`chat`: the usage of a chat. Tokens."""
    cached = chat["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": chat["total_tokens"],
    }


def status_of(finish_reason: str | None) -> str:
    """Of a response whose chat has ended so."""
    return STATUSES.get(finish_reason or "", "completed")


def response_of(
    head: Mapping[str, Any],
    status: str,
    output: Sequence[Item] = (),
    *,
    usage: Mapping[str, Any] | None = None,
    finish_reason: str | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """The response as an object. `head`: what the request says about it. `error`: why it failed."""
    reason = "max_output_tokens" if finish_reason == "length" else None
    return dict(head) | {
        "status": status,
        "error": None if error is None else {"code": SERVER_ERROR, "message": error},
        "incomplete_details": {"reason": reason} if status == "incomplete" else None,
        "output": list(output),
        "usage": usage,
    }


def thought(output: Sequence[Item]) -> str:
    """All reasoning in it."""
    parts = (part for item in output if item["type"] == "reasoning" for part in item["content"])
    return "".join(part["text"] for part in parts)
