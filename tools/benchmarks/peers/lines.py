"""What every arm of `bench engine` speaks: JSON lines over stdin and stdout.

    {"do": "load", "folder": ..., "dtype": ..., "threads": ...}     -> {"seconds": s}
    {"do": "generate", "prompts": [[ids], ...], "new": 100}         -> {"seconds": s, "ids": [[ids], ...]}
    {"do": "prefill", "prompt": [ids]}                              -> {"seconds": s}

"generate" is prefill and decode of all prompts as one batch, greedy, EOS ignored. An arm that cannot
do something answers {"failure": why}. This file imports nothing of the project: the arms of other
environments take it from the folder they stand in.
"""

import json
import os
import sys
import time
from itertools import islice
from typing import Any, Protocol

Ids = list[int]
FAILURES = (
    AssertionError,  # peers say with it that they do not have something
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
    """What an arm does."""

    def load(self, folder: str, dtype: str, threads: int) -> None: ...

    def generate(self, prompts: list[Ids], new: int) -> list[Ids]: ...

    def prefill(self, prompt: Ids) -> None: ...


def serve(engine: Engine, *also: type[Exception]) -> None:
    """Do what the lines on stdin say until they end; `also` are the engine's own failures. Whatever
    prints, of this process or of one it starts, is turned to stderr."""
    failures: tuple[type[Exception], ...] = (*FAILURES, *also)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in iter(sys.stdin.readline, ""):
        try:
            answer = obey(engine, json.loads(line))
        except failures as error:  # the other arms go on, and the table says it
            answer = {"failure": f"{type(error).__name__}: {first_line(error)}"}
        print(json.dumps(answer), file=answers, flush=True)


def first_line(error: Exception) -> str:
    """Of what it says; some say nothing."""
    return next(iter(str(error).splitlines()), "")


def obey(engine: Engine, order: dict[str, Any]) -> dict[str, Any]:
    """One order."""
    begun = time.perf_counter()
    if order["do"] == "load":
        engine.load(order["folder"], order["dtype"], order["threads"])
        return {"seconds": time.perf_counter() - begun}
    if order["do"] == "prefill":
        engine.prefill(order["prompt"])
        return {"seconds": time.perf_counter() - begun}
    ids = engine.generate(order["prompts"], order["new"])
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "ids": [list(islice(each, order["new"])) for each in ids]}
