"""Answer: the message and the events of its stream, made of a chat's pieces. Pure.

    message_start, ping
    content_block_start, content_block_delta ..., content_block_stop     thinking, text, tool_use
    message_delta, message_stop                                          why it stopped; the usage

A message that is not streamed is made in the same way, of one piece of each kind. The deltas of a block,
joined, are its text, however the answer was cut. https://docs.claude.com/en/docs/build-with-claude/streaming
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from baton import finite
from baton.server.pieces import Call, Content, Piece, Reasoning

Event = dict[str, Any]
SIGNATURE = "unsigned"
"""Of thinking: clients want one, and nobody checks this one."""
UNREAD = "unread_arguments"
"""In the input of a call whose arguments are no JSON object, as when max_tokens cut them off."""
PING = {"type": "ping"}


class Blocks:
    """The content of one message."""

    def __init__(self) -> None:
        self._at: object = None  # of which kind the last block is; None: it has ended
        self._texts: list[str] = []  # of the last block
        self.content: list[dict[str, Any]] = []

    def take(self, pieces: Sequence[Piece]) -> Iterator[Event]:
        """The events that these pieces lead to."""
        for piece in pieces:
            if isinstance(piece, Content) and not piece.text:
                continue
            at = ("call", piece.index) if isinstance(piece, Call) else type(piece)
            if at != self._at:
                yield from self._close()
                yield from self._open(piece)
                self._at = at
            yield from self._grow(piece)

    def end(self) -> Iterator[Event]:
        """The answer has ended. One without any block is an empty text."""
        if not self.content:
            yield from self._open(Content(""))
            self._at = Content
        yield from self._close()

    def _open(self, piece: Piece) -> Iterator[Event]:
        self._texts = []
        block: dict[str, Any]
        match piece:
            case Reasoning():
                block = {"type": "thinking", "thinking": "", "signature": ""}
            case Content():
                block = {"type": "text", "text": "", "citations": None}
            case Call():
                block = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {},
                         "caller": {"type": "direct"}}  # fmt: skip
        self.content.append(block)
        yield self._about("content_block_start", content_block=dict(block))

    def _grow(self, piece: Piece) -> Iterator[Event]:
        match piece:
            case Reasoning(text):
                delta = {"type": "thinking_delta", "thinking": text}
            case Content(text):
                delta = {"type": "text_delta", "text": text}
            case Call(_, text):
                delta = {"type": "input_json_delta", "partial_json": text}
        if text:
            self._texts.append(text)
            yield self._about("content_block_delta", delta=delta)

    def _close(self) -> Iterator[Event]:
        if self._at is None:
            return
        block, text = self.content[-1], "".join(self._texts)
        match block["type"]:
            case "thinking":
                block |= {"thinking": text, "signature": SIGNATURE}
                delta = {"type": "signature_delta", "signature": SIGNATURE}
                yield self._about("content_block_delta", delta=delta)
            case "text":
                block["text"] = text
            case _:
                block["input"] = read_input(text)
        self._at = None
        yield self._about("content_block_stop")

    def _about(self, kind: str, **more: Any) -> Event:
        """An event of the last block."""
        return {"type": kind, "index": len(self.content) - 1} | more


def read_input(arguments: str) -> dict[str, Any]:
    """Of a call."""
    try:
        found = finite.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {UNREAD: arguments}


def usage_of(chat: Mapping[str, Any]) -> dict[str, Any]:
    """`chat`: the usage of a chat. Cached tokens of the prompt are counted apart."""
    cached = chat["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": chat["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": None,
        "server_tool_use": None,
    }


def stop_of(finish_reason: str | None, stop: str, *, cut: bool) -> dict[str, Any]:
    """Why it stopped. `stop`: the stop sequence that was found; `cut`: max_tokens was more than fits."""
    if stop:
        return _stopped("stop_sequence", stop)
    reasons = {"tool_calls": "tool_use", "length": "max_tokens"}
    if cut:
        reasons["length"] = "model_context_window_exceeded"
    return _stopped(reasons.get(finish_reason or "", "end_turn"))


def not_stopped() -> dict[str, Any]:
    """Of a message that begins."""
    return _stopped(None)


def _stopped(reason: str | None, stop: str | None = None) -> dict[str, Any]:
    about = {"stop_reason": reason, "stop_sequence": stop}
    return about | {"stop_details": None, "container": None}


def message_of(
    head: Mapping[str, Any],
    content: Sequence[Mapping[str, Any]],
    stopped: Mapping[str, Any],
    usage: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole message. `head`: its id and model."""
    found = {"type": "message", "role": "assistant", "content": list(content)}
    about = {"cache_creation": None, "inference_geo": None, "service_tier": None}
    return dict(head) | found | dict(stopped) | {"usage": dict(usage) | about}
