"""`python main.py chat`: talk to a running server from the terminal."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from baton.client.http import Site
from baton.errors import InputError

HELP = "Ctrl-D ends; /new begins a new conversation."


def run_chat(site: Site, wanted: Mapping[str, Any], once: str | None) -> None:
    """Until the input ends; with `once`, one message alone. Raises InputError."""
    model = site.get("/v1/models")["data"][0]
    chats = bool(model.get("chat", True))
    if once is None:
        kind = "" if chats else " (it has no chat template: it continues your text)"
        click.echo(f"{model['id']} at {site.url}{kind}. {HELP}", err=True)
    turns: list[dict[str, str]] = []
    for said in [once] if once is not None else _lines():
        if said.strip() == "/new":
            turns = []
        elif said.strip():
            turns = _turn(site, model["id"], said, turns if chats else None, wanted)


def _turn(
    site: Site,
    model: str,
    said: str,
    turns: Sequence[dict[str, str]] | None,
    wanted: Mapping[str, Any],
) -> list[dict[str, str]]:
    """One message and its answer, printed as it comes; the conversation after it."""
    body: dict[str, Any] = {"model": model, "stream": True, **wanted}
    path = "/v1/completions"
    messages: list[dict[str, str]] = []
    if turns is None:
        body["prompt"] = said
        body.setdefault("max_tokens", 200)
    else:
        path = "/v1/chat/completions"
        messages = [*turns, {"role": "user", "content": said}]
        body["messages"] = messages
    text = ""
    for chunk in site.stream(path, body):
        if "error" in chunk:
            raise InputError(chunk["error"]["message"])
        for choice in chunk["choices"]:
            piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
            text += piece or ""
            click.echo(piece or "", nl=False)
    click.echo()
    return [*messages, {"role": "assistant", "content": text}] if turns is not None else []


def _lines() -> Iterator[str]:
    """What is typed, line by line."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")
