"""A whole `python main.py serve`, as several files ask it."""

import json
import os
import re
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from sampler.params import SamplingParams
from tests.cluster.processes import Ends, Terminal, children_of
from tests.patience import PATIENCE_S, until

LENGTH = 30
GREEDY = SamplingParams(temperature=0.0)
CHATML = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
Type = Callable[..., Terminal]


class Server:
    """One `main.py serve` in a terminal."""

    def __init__(self, type_in: Type, folder: Path, *options: object) -> None:
        self.template = folder / "chat.jinja"
        self.template.write_text(CHATML)
        self.terminal = type_in(
            "main.py", "serve", "--port", 0, "--chat-template", self.template, *options,
            TMPDIR=str(folder),
        )  # fmt: skip
        found = until(lambda: re.search(r"listening on (\S+);", self.said), "the port")
        self.url = found[1]
        until(lambda: "ready " in self.said or not self.terminal.runs(), "the server")
        assert self.terminal.runs(), self.said
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def said(self) -> str:
        return self.terminal.said

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """The sum over its labels. A new server has the router's counts after a second."""

        def series() -> list[str]:
            lines = self.get("/metrics").splitlines()
            return [line for line in lines if re.match(rf"baton:{name}(\{{|\s)", line)]

        found = until(series, name)
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def kill(self, name: str) -> None:
        pid = children_of(self.terminal.process.pid)[name]
        ended = Ends({name: pid})
        os.kill(pid, signal.SIGKILL)
        ended.wait()  # until then it may still accept a connection


def ask(server: Server, prompt: Any, **more: Any) -> Any:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": LENGTH} | more
    return server.client.completions.create(model="demo", prompt=prompt, **options)


def post(server: Server, path: str, body: Any) -> str:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return str(answer.read().decode())
