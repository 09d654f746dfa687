"""The protocol of the arms of `bench engine`: JSON lines over stdin and stdout.

    {"do": "load", "folder": ..., "dtype": ..., "threads": ...}     -> {"seconds": s}
    {"do": "generate", "prompts": [[ids], ...], "new": 100}         -> {"seconds": s, "ids": [[ids], ...]}
    {"do": "prefill", "prompt": [ids]}                              -> {"seconds": s}

Each answer also has "cpu_seconds", those of all threads of this process. "generate" is prefill and decode
of all prompts as one batch, greedy, EOS ignored. An arm answers an order that it cannot do with
{"failure": why}. This file imports nothing of the project, as the arms of other environments import it
from their own folder.
"""

import json
import os
import sys
import time
from itertools import islice
from typing import Any, Protocol

Ids = list[int]
FAILURES = (
    AssertionError,  # raised by peers for missing features
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Engine(Protocol):
    """An engine as an arm runs it."""

    def load(self, folder: str, dtype: str, threads: int) -> None: ...

    def generate(self, prompts: list[Ids], new: int) -> list[Ids]: ...

    def prefill(self, prompt: Ids) -> None: ...


def serve(engine: Engine, *also: type[Exception]) -> None:
    """Obey the orders on stdin until it ends. `also` are the engine's own failures. Other output of this
    process and its children goes to stderr."""
    failures: tuple[type[Exception], ...] = (*FAILURES, *also)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in iter(sys.stdin.readline, ""):
        try:
            answer = obey(engine, json.loads(line))
        except failures as error:  # the other arms go on, and the table shows it
            answer = {"failure": f"{type(error).__name__}: {first_line(error)}"}
        print(json.dumps(answer), file=answers, flush=True)


def first_line(error: Exception) -> str:
    """The first line of its message, which may be empty."""
    return next(iter(str(error).splitlines()), "")


def obey(engine: Engine, order: dict[str, Any]) -> dict[str, Any]:
    """Do one order."""
    begun, used = time.perf_counter(), time.process_time()
    ids: list[Ids] = []
    if order["do"] == "load":
        engine.load(order["folder"], order["dtype"], order["threads"])
    elif order["do"] == "prefill":
        engine.prefill(order["prompt"])
    else:
        ids = engine.generate(order["prompts"], order["new"])
    answer: dict[str, Any] = {"seconds": time.perf_counter() - begun}
    answer["cpu_seconds"] = time.process_time() - used
    if ids:
        answer["ids"] = [list(islice(each, order["new"])) for each in ids]
    return answer
