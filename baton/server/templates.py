"""Chat templates: from messages to the text the model was trained on.

The template comes with the model, or from whoever starts the server, never from a request. It is rendered
in a child process (render.py) that is killed if it takes too long.
"""

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import ModelError, RequestError
from baton.package import ROOT

PATIENCE_S = 5.0
LONGEST_TEXT = 4 << 20
LONGEST_LINE = 64 << 20
FIRST_S = 30.0
"""The child's first answer may take this much longer: it has to start."""
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja template, and the special tokens it may name."""

    source: str
    tokens: Mapping[str, str]


def read_template(folder: Path | None, override: Path | None = None) -> ChatTemplate | None:
    """The model's own template, or the one in the file `override`; None if there is neither. Raises
    ModelError for what cannot be read."""
    config = _json(folder / "tokenizer_config.json") if folder else {}
    source: Any = config.get("chat_template")
    beside = folder / "chat_template.jinja" if folder else None
    if beside is not None and beside.is_file():
        source = _text(beside)
    if override is not None:
        source = _text(override)
    if isinstance(source, list):  # several, by name
        named = {str(each.get("name")): each.get("template") for each in source}
        source = named.get(DEFAULT, next(iter(named.values()), None))
    if not isinstance(source, str) or not source:
        return None
    special = _json(folder / "special_tokens_map.json") if folder else {}
    known = {**special, **config}
    tokens = {name: _token(known[name]) for name in known if name.endswith("_token")}
    return ChatTemplate(source, {name: text for name, text in tokens.items() if text is not None})


class Renderer:
    """Renders, one conversation at a time. Use it within one event loop."""

    def __init__(self, template: ChatTemplate, *, patience_s: float = PATIENCE_S) -> None:
        self._template = template
        self._patience_s = patience_s
        self._lock = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The text. Raises RequestError with the template's own words if it refuses."""
        asked = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
        }
        async with self._lock:
            answer = await self._ask(json.dumps(asked))
        if "ok" not in answer:
            raise RequestError(f"the chat template refuses these messages: {answer['error']}")
        if len(answer["ok"]) > LONGEST_TEXT:
            raise RequestError(
                f"the chat template makes {len(answer['ok']):,} characters of these messages, and "
                f"{LONGEST_TEXT:,} are the limit; send less"
            )
        return str(answer["ok"])

    async def close(self) -> None:
        """The child ends."""
        child, self._child = self._child, None
        if child is not None:
            if child.returncode is None:
                child.kill()
            await child.wait()

    async def _ask(self, line: str) -> dict[str, str]:
        fresh = self._child is None or self._child.returncode is not None
        child = await self._start() if fresh else self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        patience = self._patience_s + (FIRST_S if fresh else 0.0)
        try:
            async with asyncio.timeout(patience):
                child.stdin.write(line.encode() + b"\n")
                await child.stdin.drain()
                answer = await child.stdout.readline()
        except TimeoutError:
            await self.close()
            raise RequestError(
                f"the chat template took longer than {self._patience_s:g} s for these messages"
            ) from None
        except ConnectionError:
            answer = b""
        except asyncio.CancelledError:
            await self.close()  # its answer would be taken for that of the next
            raise
        if not answer.endswith(b"\n"):
            await self.close()
            raise RequestError("the chat template broke down over these messages; send others")
        found: dict[str, str] = json.loads(answer)
        return found

    async def _start(self) -> asyncio.subprocess.Process:
        self._child = child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "baton.server.render",
            str(os.getpid()),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE,
        )
        assert child.stdin is not None
        first = {"template": self._template.source, "tokens": dict(self._template.tokens)}
        child.stdin.write(json.dumps(first).encode() + b"\n")
        return child


def _token(value: Any) -> str | None:
    """Special tokens stand as text, or as an object that holds it."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read the chat template {file}: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(_text(file))
    except ValueError as error:
        raise ModelError(f"{file} is no JSON: {error}") from error
    return found if isinstance(found, dict) else {}
