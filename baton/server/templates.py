"""Chat templates: from messages to the text the model was trained on.

A template is a Jinja program that comes with the model or with --chat-template, never from a request.
It is compiled once and runs in Jinja's sandbox with a time limit, where a slow conversation blocks
neither the server nor others:

    the model's own     trusted like its weights: in a few threads of the server. Loops and calls end in
                        time; memory is not limited.
    --chat-template     in child processes with limited memory, started with the server. One that
                        takes too long is killed and replaced.

A child is `python -m baton.server.templates PARENT`. It reads and writes JSON, one object a line:

    <- {"source": "...", "tokens": {"bos_token": "<s>", ...}, "patience_s": 5.0}     -> {"text": ""}
       (or "source": {"default": "...", "tool_use": "...", ...}, where there are several)
    <- {"messages": [...], "add_generation_prompt": true, "tools": null, ...}      a Conversation
    -> {"text": "..."} or {"error": "..."}
"""

import asyncio
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import jinja2

from baton.checkpoints.added_tokens import tokens_beside
from baton.checkpoints.jsonfile import optional_object
from baton.errors import ModelError, RequestError
from baton.host import die_with
from baton.package import ROOT
from baton.server.speech import END
from baton.server.templates_sandbox import LONGEST_TEXT, Sandbox
from baton.server.threads import FairThreads
from baton.server.turns import (
    SYSTEM,
    ContentForm,
    Conversation,
    arrangements,
    content_form,
    knows_developer,
    marked,
    one_call_each,
    told_in,
    up_to_mark,
    variants,
    with_one_text,
)
from baton.tool_calls import CallFormat, format_of
from baton.tool_calls_channels import channelled_in

PATIENCE_S = 5.0
LONGEST_REASON = 500
DEFAULT, TOOL_USE = "default", "tool_use"
"""Of several templates: the usual one, and the one for messages with tools."""
ONE_CALL = "single tool-calls"
"""In the refusal of templates that take one call a turn: "This model only supports ... at once!"."""
REFUSES = "the chat template refuses these messages"
THREADS = 4
CHILDREN = 2
START_S = 30.0
LATE_S = 1.0
"""A child is killed this long after the sandbox in it should have reported the timeout itself."""
LONGEST_LINE = 64 << 20
MEMORY_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja template, or several by name, and the special tokens they may name."""

    source: str | Mapping[str, str]
    tokens: Mapping[str, str]


# ---- reading


def read_template(folder: Path | None, override: Path | None = None) -> ChatTemplate | None:
    """The model's own template, or the one in the file `override`; None if there is neither. Raises
    ModelError for a file that cannot be read."""
    source = _own(folder) if folder is not None and override is None else None
    if override is not None:
        source = _text(override)
    if not source:
        return None
    return ChatTemplate(source, tokens_beside(folder).texts if folder is not None else {})


def _own(folder: Path) -> str | Mapping[str, str] | None:
    """What the files *.jinja hold; without any, what tokenizer_config.json does."""
    beside = folder / "chat_template.jinja"
    named = {DEFAULT: _text(beside)} if beside.is_file() else {}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[file.name.removesuffix(".jinja")] = _text(file)
    if not named:
        about = optional_object(folder / "tokenizer_config.json", f"{folder} is incomplete")
        given = about.get("chat_template")
        if isinstance(given, list):
            given = {e.get("name"): e.get("template") for e in given if isinstance(e, dict)}
        if not isinstance(given, dict):
            return given if isinstance(given, str) else None
        named = {str(name): text for name, text in given.items() if isinstance(text, str)}
    return named[DEFAULT] if named.keys() == {DEFAULT} else named


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read the chat template {file}: {error}") from error


def knows_reasoning(template: ChatTemplate) -> bool:
    """Does it name the tags?"""
    source = template.source
    return any(END in each for each in ([source] if isinstance(source, str) else source.values()))


def call_format(template: ChatTemplate) -> CallFormat:
    """How its model calls tools."""
    return format_of(_with_tools(template))


def knows_tools(template: ChatTemplate) -> bool:
    """Does it name them, or calls of them?"""
    return re.search(r"\btool(s|_calls)\b", _with_tools(template)) is not None


def takes_one_call(template: ChatTemplate) -> bool:
    """Does it refuse turns with several calls, as those of Llama 3 do, or show the first alone, as that
    of gpt-oss does?"""
    return ONE_CALL in _with_tools(template) or call_format(template).channels


def _with_tools(template: ChatTemplate) -> str:
    """The one that is used with tools."""
    source = template.source
    return source if isinstance(source, str) else source.get(TOOL_USE, source.get(DEFAULT, ""))


# ---- rendering


class CompiledTemplate:
    """A template, compiled once. Several threads may render at the same time. The texts are those of
    transformers' apply_chat_template."""

    def __init__(self, template: ChatTemplate, *, patience_s: float = PATIENCE_S) -> None:
        source = template.source
        self._sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        self._tokens = dict(template.tokens)
        self._sandbox = Sandbox(patience_s)
        self._compiled = {
            name: self._compile(self._sources[name])
            for name in (DEFAULT, TOOL_USE)
            if name in self._sources
        }
        self._wants = {name: self._wanted(name) for name in self._compiled}

    def render(self, conversation: Conversation) -> str:
        """Raises RequestError if the template refuses, and if time or text exceed their limits."""
        name = self._chosen(offers_tools=bool(conversation.tools))
        template = self._compiled[name]
        if isinstance(template, str):
            raise RequestError(f"{REFUSES}: {template}")
        self._sandbox.begin()
        try:
            source = self._sources[name]
            single = ONE_CALL in source or channelled_in(source)
            if channelled_in(source):
                conversation = replace(conversation, messages=with_one_text(conversation.messages))
            if single:
                given = one_call_each(conversation.messages)
                conversation = replace(conversation, messages=given)
            return self._arranged_text(template, self._wants[name], conversation)
        except jinja2.TemplateError as error:
            raise RequestError(f"{REFUSES}: {error}"[:LONGEST_REASON]) from error
        except (OverflowError, RecursionError, MemoryError) as error:
            why = f"it is too large ({type(error).__name__})"
            raise RequestError(f"{REFUSES}: {why}") from error
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RuntimeError,
        ) as error:
            why = f"{type(error).__name__}: {error}"
            raise RequestError(f"{REFUSES}: {why}"[:LONGEST_REASON]) from error

    def _compile(self, source: str) -> jinja2.Template | str:
        """Or what is wrong with it."""
        try:
            return self._sandbox.from_string(source)
        except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError) as error:
            return str(error)[:LONGEST_REASON]

    def _wanted(self, name: str) -> "_Wants":
        if isinstance(self._compiled[name], str):
            return _Wants(ContentForm.TEXT, developer=False)
        tree = self._sandbox.parse(self._sources[name])
        return _Wants(content_form(tree), developer=knows_developer(tree))

    def _chosen(self, *, offers_tools: bool) -> str:
        """As transformers chooses."""
        name = TOOL_USE if offers_tools and TOOL_USE in self._compiled else DEFAULT
        if name not in self._compiled:
            names = ", ".join(sorted(self._sources))
            raise RequestError(
                f"this model has several chat templates ({names}) and none is its default: "
                + ("offer tools, or " if TOOL_USE in self._compiled else "")
                + "choose one with --chat-template FILE"
            )
        return name

    def _arranged_text(
        self, template: jinja2.Template, wants: "_Wants", conversation: Conversation
    ) -> str:
        """Of the first arrangement of instructions that the template takes, and shows; else of the first
        that it takes. Raises the first one's error."""
        given = conversation.messages
        found = list(arrangements(given, developer=wants.developer))
        if conversation.continue_final_message and given[-1].get("role") in SYSTEM:
            del found[1:]  # it has to stay the last
        taken: str | None = None
        refusal: jinja2.TemplateError | TypeError | None = None
        for messages in found:
            try:
                text = self._first_text(
                    template, wants.form, replace(conversation, messages=messages)
                )
            except (jinja2.TemplateError, TypeError) as error:
                refusal = refusal or error
                continue
            if told_in(text, messages):
                return text
            taken = text if taken is None else taken
        if taken is not None:
            return taken
        assert refusal is not None
        raise refusal

    def _first_text(
        self, template: jinja2.Template, form: ContentForm, conversation: Conversation
    ) -> str:
        """Of the first form of the messages that the template takes; else the first one's error."""
        others = self._tokens | {
            "add_generation_prompt": conversation.add_generation_prompt,
            "tools": conversation.tools or None,
            "documents": conversation.documents,
        }
        others |= conversation.variables
        continues = conversation.continue_final_message
        first: jinja2.UndefinedError | TypeError | None = None
        for messages in variants(conversation.messages, form):
            shown = marked(messages) if continues else messages
            try:
                text = self._text(template, {"messages": shown} | others)
                return up_to_mark(text) if continues else text
            except (jinja2.UndefinedError, TypeError) as error:
                first = first or error
        assert first is not None
        raise first

    def _text(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        pieces, length = [], 0
        for piece in template.generate(variables):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST_TEXT:
                raise RequestError(
                    f"the chat template makes more than {LONGEST_TEXT:,} characters of these "
                    "messages; send less"
                )
        return "".join(pieces)

    def stop(self) -> None:
        """Make renderings in progress fail at their next loop or call."""
        self._sandbox.patience_s = 0.0


@dataclass(frozen=True, slots=True)
class _Wants:
    """How a template wants messages to be. `developer`: it knows this role."""

    form: ContentForm
    developer: bool


# ---- where templates run


class Renderer(Protocol):
    """Used within one event loop."""

    @property
    def reasons(self) -> bool:
        """Does the template know reasoning?"""

    @property
    def offers(self) -> bool:
        """Does the template know tools?"""

    @property
    def calls(self) -> CallFormat:
        """How the template's model calls tools."""

    @property
    def one_call(self) -> bool:
        """Does the template take one call a turn?"""

    async def render(self, conversation: Conversation) -> str:
        """The text. Raises RequestError with the template's own words if it refuses."""

    async def close(self) -> None:
        """Renderings that are under way fail."""


class ThreadRenderer:
    """For the model's own template."""

    def __init__(self, template: ChatTemplate, *, patience_s: float = PATIENCE_S) -> None:
        self.reasons, self.offers = knows_reasoning(template), knows_tools(template)
        self.calls, self.one_call = call_format(template), takes_one_call(template)
        self._template = CompiledTemplate(template, patience_s=patience_s)
        self._threads = FairThreads(THREADS, "chat-template")

    async def render(self, conversation: Conversation) -> str:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._template.render, conversation)

    async def close(self) -> None:
        self._template.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)


class ProcessRenderer:
    """For a template of --chat-template. Construct it in the event loop: its children start then."""

    def __init__(self, template: ChatTemplate, *, patience_s: float = PATIENCE_S) -> None:
        self.reasons, self.offers = knows_reasoning(template), knows_tools(template)
        self.calls, self.one_call = call_format(template), takes_one_call(template)
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
            "source": template.source
            if isinstance(template.source, str)
            else dict(template.source),
            "tokens": dict(template.tokens),
            "patience_s": patience_s,
        }
        self._first = json.dumps(first).encode()
        self._starting = asyncio.create_task(self._start())

    async def ask(self, line: bytes) -> dict[str, str]:
        """The child's answer. Raises RequestError if none comes in time."""
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
            if (
                not answer
            ):  # also when cancelled: its late answer would be mistaken for the next one
                process.kill()
                self._starting = asyncio.create_task(self._start())
                await process.wait()
        if not answer:
            raise RequestError("the chat template crashed on these messages; send others")
        found: dict[str, str] = json.loads(answer)
        return found

    async def close(self) -> None:
        """Kill it."""
        process = await asyncio.shield(self._starting)
        if process.returncode is None:
            process.kill()
        await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        """A process that has compiled the template, or one that has ended."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "baton.server.templates",
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
