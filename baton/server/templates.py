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
    <- {"messages": [...], "add_generation_prompt": true, "tools": null}
    -> {"text": "..."} or {"error": "..."}
"""

import asyncio
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from time import sleep
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from baton.clock import monotonic
from baton.errors import ModelError, RequestError
from baton.host import die_with
from baton.package import ROOT

PATIENCE_S = 5.0
LONGEST_TEXT = 4 << 20  # characters
LONGEST_REASON = 500
LARGEST_NUMBER = 4096  # bits
WORK_S, REST_S = 0.002, 0.001
"""A long rendering pauses this often and this long. Ordinary ones take a tenth of a millisecond."""
DEFAULT = "default"
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
    """A Jinja template, and the special tokens it may name."""

    source: str
    tokens: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The variables of a template."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    tools: Sequence[Any] | None = None


# ---- reading


def read_template(folder: Path | None, override: Path | None = None) -> ChatTemplate | None:
    """The model's own template, or the one in the file `override`; None if there is neither. Raises
    ModelError for a file that cannot be read."""
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


def _token(value: Any) -> str | None:
    """A special token is a text, or an object with it."""
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
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    return found if isinstance(found, dict) else {}


# ---- the sandbox


class CompiledTemplate:
    """A template, compiled once. Several threads may render at the same time. The texts are those of
    transformers' apply_chat_template."""

    def __init__(self, template: ChatTemplate, *, patience_s: float = PATIENCE_S) -> None:
        self._tokens = dict(template.tokens)
        self._sandbox = _Sandbox(patience_s)
        self._template: jinja2.Template | None = None
        self._broken = ""
        try:
            self._template = self._sandbox.from_string(template.source)
        except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError) as error:
            self._broken = str(error)[:LONGEST_REASON]

    def render(self, conversation: Conversation) -> str:
        """Raises RequestError if the template refuses, and if time or text exceed their limits."""
        if self._template is None:
            raise RequestError(f"{REFUSES}: {self._broken}")
        variables = {
            "messages": conversation.messages,
            "add_generation_prompt": conversation.add_generation_prompt,
            "tools": conversation.tools or None,
            "documents": None,
        }
        self._sandbox.begin()
        pieces, length = [], 0
        try:
            for piece in self._template.generate(variables | self._tokens):
                pieces.append(piece)
                length += len(piece)
                if length > LONGEST_TEXT:
                    raise RequestError(
                        f"the chat template makes more than {LONGEST_TEXT:,} characters of these "
                        "messages; send less"
                    )
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
        return "".join(pieces)

    def stop(self) -> None:
        """Make renderings in progress fail at their next loop or call."""
        self._sandbox.patience_s = 0.0


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with a time limit. Every iteration, call, and filter
    or test of an item checks it, so between two checks lies one operation on data of limited size."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, patience_s: float) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
        )
        self.patience_s = patience_s
        self._thread = threading.local()
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]  # makes text without end

    def begin(self) -> None:
        """A rendering begins in this thread."""
        self._thread.began = self._thread.rested = monotonic()

    def check_time(self) -> bool:
        """True. Raises RequestError if the rendering in this thread takes too long."""
        now, thread = monotonic(), self._thread
        if now - thread.began > self.patience_s:
            raise RequestError(
                f"the chat template took longer than {self.patience_s:g} s for these messages"
            )
        if now - thread.rested > WORK_S:  # the interpreter's lock: the server's loop needs it too
            sleep(REST_S)
            thread.rested = monotonic()
        return True

    in_time = property(check_time)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        check = nodes.EnvironmentAttribute("in_time", environment=self)
        for loop in tree.find_all(nodes.For):
            if loop.test is not None:
                loop.test = nodes.And(check, loop.test, environment=self)
            loop.body.insert(0, nodes.ExprStmt(check, environment=self))
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.check_time()
        return super().call(__context, __obj, *args, **kwargs)

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        return super().call_filter(*args, **kwargs)

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        return super().call_test(*args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Powers and repetitions can take hours in one operation that no check interrupts."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length()
            if bits > LARGEST_NUMBER:
                raise OverflowError
        elif operator == "*":
            times, items = (left, right) if isinstance(left, int) else (right, left)
            length = len(items) if isinstance(items, str | list | tuple) else 0
            if isinstance(times, int) and times * length > LONGEST_TEXT:
                raise OverflowError
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """{% generation %} marks the assistant's text, for training. It has no effect here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Dict:
    """dict() without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """namespace() without names that begin with an underscore: they reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name of the template's
        attrs = dict(*args[1:], **kwargs)
        for name in attrs:
            _check_name(name)
        Namespace.__init__(args[0], attrs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: rename it")


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


# ---- where templates run


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
    """For a template of --chat-template. Construct it in the event loop: its children start then."""

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
