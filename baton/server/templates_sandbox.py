"""Sandbox: the Jinja environment of chat templates, that of transformers with limits in time and size."""

import json
import threading
from datetime import datetime
from time import sleep
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from baton.clock import monotonic
from baton.errors import RequestError

LONGEST_TEXT = 4 << 20  # characters
LARGEST_NUMBER = 4096  # bits
WORK_S, REST_S = 0.002, 0.001
"""A long rendering pauses this often and this long. Ordinary ones take a tenth of a millisecond."""


class Sandbox(ImmutableSandboxedEnvironment):
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
