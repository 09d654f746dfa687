"""Rendering: where chat templates run, so that a slow conversation blocks neither the server nor others.

    the model's own     trusted like its weights: in a few threads of the server. Loops and calls end in
                        time (templates.py); memory is not limited.
    --chat-template     in child processes with limited memory, started with the server. One that
                        takes too long is killed and replaced.

A child is `python -m baton.server.rendering PARENT`. It reads and writes JSON, one object a line:

    <- {"source": "...", "tokens": {"bos_token": "<s>", ...}, "patience_s": 5.0}     -> {"text": ""}
    <- {"messages": [...], "add_generation_prompt": true, "tools": null}
    -> {"text": "..."} or {"error": "..."}
"""

import asyncio
import json
import os
import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Protocol

from baton.errors import RequestError
from baton.host import die_with
from baton.package import ROOT
from baton.server.templates import PATIENCE_S, ChatTemplate, CompiledTemplate, Conversation

THREADS = 4
CHILDREN = 2
START_S = 30.0
LATE_S = 1.0
"""A child is killed this long after the sandbox in it should have reported the timeout itself."""
LONGEST_LINE = 64 << 20
MEMORY_BYTES = 2 << 30


class Renderer(Protocol):
    """Used within one event loop."""

    async def render(self, conversation: Conversation) -> str:
        """The text. Raises RequestError with the template's own words if it refuses."""

    async def close(self) -> None:
        """Renderings that are under way fail."""


class ThreadRenderer:
    """For the model's own template."""

    def __init__(self, template: ChatTemplate, *, patience_s: float = PATIENCE_S) -> None:
        self._template = CompiledTemplate(template, patience_s=patience_s)
        self._threads = ThreadPoolExecutor(THREADS, "chat-template")

    async def render(self, conversation: Conversation) -> str:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._template.render, conversation)

    async def close(self) -> None:
        self._template.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)


class ProcessRenderer:
    """For a template that the user names. Construct it inside the event loop: its children start then."""

    def __init__(self, template: ChatTemplate, *, patience_s: float = PATIENCE_S) -> None:
        self._children = [_Child(template, patience_s) for _ in range(CHILDREN)]
        self._idle: asyncio.Queue[_Child] = asyncio.Queue()
        for child in self._children:
            self._idle.put_nowait(child)

    async def render(self, conversation: Conversation) -> str:
        variables = {each.name: getattr(conversation, each.name) for each in fields(conversation)}
        line = json.dumps(variables).encode()
        child = await self._idle.get()
        try:
            answer = await child.ask(line)
        finally:
            self._idle.put_nowait(child)
        if "error" in answer:
            raise RequestError(answer["error"])
        return answer["text"]

    async def close(self) -> None:
        await asyncio.gather(*(child.close() for child in self._children))


class _Child:
    """A process that renders one conversation after another. It is replaced whenever it has ended."""

    def __init__(self, template: ChatTemplate, patience_s: float) -> None:
        self._patience_s = patience_s
        first = {
            "source": template.source,
            "tokens": dict(template.tokens),
            "patience_s": patience_s,
        }
        self._first = json.dumps(first).encode()
        self._starting = asyncio.create_task(self._start())

    async def ask(self, line: bytes) -> dict[str, str]:
        """Its answer. Raises RequestError if there is none in time."""
        process = await asyncio.shield(self._starting)
        if process.returncode is not None:  # it was killed from outside
            self._starting = asyncio.create_task(self._start())
            process = await asyncio.shield(self._starting)
        answer = b""
        try:
            async with asyncio.timeout(self._patience_s + LATE_S):
                answer = await _exchange(process, line)
        except TimeoutError:
            raise RequestError(
                f"the chat template took longer than {self._patience_s:g} s for these messages"
            ) from None
        finally:
            if not answer:  # also when cancelled: a late answer would be taken for that of the next
                process.kill()
                self._starting = asyncio.create_task(self._start())
                await process.wait()
        if not answer:
            raise RequestError("the chat template broke down over these messages; send others")
        found: dict[str, str] = json.loads(answer)
        return found

    async def close(self) -> None:
        """It ends."""
        process = await asyncio.shield(self._starting)
        if process.returncode is None:
            process.kill()
        await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        """A process that has compiled the template, or one that has ended."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "baton.server.rendering",
            str(os.getpid()),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE,
        )
        try:
            async with asyncio.timeout(START_S):
                started = await _exchange(process, self._first)
        except TimeoutError:
            started = b""
        if not started:
            process.kill()
            await process.wait()
        return process


async def _exchange(process: asyncio.subprocess.Process, line: bytes) -> bytes:
    """One line in, one line out; empty if the process ends instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(line + b"\n")
        await process.stdin.drain()
        answer = await process.stdout.readline()
    except ConnectionError:
        return b""
    return answer if answer.endswith(b"\n") else b""


def main(parent: int) -> None:
    """A child, until the server closes its input."""
    if not die_with(parent):
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal: the server still drains
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    first = json.loads(sys.stdin.readline())
    template = CompiledTemplate(
        ChatTemplate(first["source"], first["tokens"]), patience_s=first["patience_s"]
    )
    _write({"text": ""})
    for line in sys.stdin:
        try:
            _write({"text": template.render(Conversation(**json.loads(line)))})
        except RequestError as error:
            _write({"error": str(error)})


def _write(answer: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
