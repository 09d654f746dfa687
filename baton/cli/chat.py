"""`python main.py chat`: talk to a running server from the terminal."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from baton.client.http import HttpClient
from baton.errors import InputError

HELP = "Ctrl-D ends; /new begins a new conversation."


def run_chat(client: HttpClient, parameters: Mapping[str, Any], once: str | None) -> None:
    """Chat until the end of the input; with `once`, that message alone. Raises InputError."""
    model = client.get("/v1/models")["data"][0]
    chats = bool(model.get("chat", True))
    if once is None:
        kind = "" if chats else " (it has no chat template: it continues your text)"
        click.echo(f"{model['id']} at {client.url}{kind}. {HELP}", err=True)
    turns: list[dict[str, str]] = []
    for text in [once] if once is not None else _lines():
        if text.strip() == "/new":
            turns = []
        elif text.strip():
            turns = _turn(client, model["id"], text, turns if chats else None, parameters)


def _turn(
    client: HttpClient,
    model: str,
    message: str,
    turns: Sequence[dict[str, str]] | None,
    parameters: Mapping[str, Any],
) -> list[dict[str, str]]:
    """Send a message and print the answer as it is generated. Returns the conversation with both."""
    body: dict[str, Any] = {"model": model, "stream": True, **parameters}
    path = "/v1/completions"
    messages: list[dict[str, str]] = []
    if turns is None:
        body["prompt"] = message
        body.setdefault("max_tokens", 200)
    else:
        path = "/v1/chat/completions"
        messages = [*turns, {"role": "user", "content": message}]
        body["messages"] = messages
    text, thinking = "", False
    for chunk in client.stream(path, body):
        if "error" in chunk:
            raise InputError(chunk["error"]["message"])
        for choice in chunk["choices"]:
            said = choice.get("delta", {"content": choice.get("text")})
            thought, piece = said.get("reasoning_content") or "", said.get("content") or ""
            click.echo(click.style(thought, dim=True) if thought else "", nl=False)
            thinking = thinking or bool(thought)
            if piece and thinking:
                click.echo("\n")
                thinking = False
            text += piece
            click.echo(piece, nl=False)
    click.echo()
    return [*messages, {"role": "assistant", "content": text}] if turns is not None else []


def _lines() -> Iterator[str]:
    """The lines that the user types."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")
