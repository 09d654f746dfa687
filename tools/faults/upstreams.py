"""Two servers of another engine behind this router, which end in the middle of answers. docs/engines.md.

    python -m tools.faults.upstreams --model FILE.gguf -- llama-server -m FILE.gguf --port {port}

The command after -- starts a server; {port} in it is replaced. Clients ask by HTTP, half of them for
streams, while

    one      the first server, then the second, is killed and started again: the other one alone is left
    both     both are killed: requests wait, new ones are refused with the reason, until both are back
    deadline both are killed, and requests have a time limit: each says so

Every accepted request gets a complete answer, greedy ones that of an undisturbed run, or an explicit
error where one is due. The last line printed is JSON; the exit code is 1 if something else happened.
"""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import click

from tools.faults.by_hand import ByHand
from tools.faults.check import Answer, check, outcome
from tools.faults.client import Request, fetch, run_clients
from tools.faults.ledger import Chunk, End, Event, Ledger, records
from tools.faults.service import NotReady, free_port

UP_S, ANSWERS_S = 900.0, 600.0
LIMIT_S = 5
"""Of requests with a time limit: shorter than any server needs to be back."""
MIDDLE = 2
"""Parts of a streamed answer that are there when a server ends."""
LOOK_S = 0.01
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
WORDS = (
    "Once upon a time there was a teacher who",
    "The village by the river has a garden where",
    "In the future, artificial intelligence will",
    "Scientists have discovered a new way to",
    "The old man looked at the sea and",
    "Every morning before work begins, the children",
    "The capital of France is a city that",
    "Water and light make plants grow, because",
)


def bodies(count: int, tokens: int) -> dict[int, dict[str, Any]]:
    """Completions by case: half of them streams, every fourth pair sampled with a seed."""
    made: dict[int, dict[str, Any]] = {}
    for case in range(count):
        prompt = WORDS[case % len(WORDS)] + " and" * (case // len(WORDS))
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": case % 2 == 0}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        if seeded(case):
            body |= {"temperature": 0.8, "top_p": 0.95, "top_k": -1, "seed": 7 + case}
        made[case] = body
    return made


def seeded(case: int) -> bool:
    """Whether this case is sampled: resumed, it may be another one (docs/engines.md)."""
    return case % 8 in (6, 7)


def in_the_middle(events: Sequence[Event]) -> int:
    """Streams that have begun and not ended."""
    parts: dict[str, int] = {}
    for event in events:
        if isinstance(event, Chunk) and event.text and event.finish is None:
            parts[event.id] = parts.get(event.id, 0) + 1
        elif isinstance(event, End | Chunk):
            parts.pop(event.id, None)
    return sum(count >= MIDDLE for count in parts.values())


@dataclass(slots=True)
class Upstream:
    """A server of the other engine, on a port of its own that it keeps."""

    command: Sequence[str]
    folder: Path
    name: str
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Does not wait."""
        words = [word.replace("{port}", str(self.port)) for word in self.command]
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers, and is not loading. Raises SystemExit."""
        deadline = time.monotonic() + UP_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise SystemExit(f"error: {shlex.join(self.command)} ended; see {self.name}.log")
            with suppress(OSError, TimeoutError):
                if asyncio.run(fetch(self.port, "/v1/models"))[0] != 503:
                    return
            time.sleep(0.2)
        raise SystemExit(f"error: no server on port {self.port} within {UP_S:g} s")

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """With all processes that it started; returns when it has ended."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._process.wait(UP_S)
            self._process = None


@dataclass(slots=True)
class Outcome:
    """What came of everything. `unsteady`: greedy cases for which the engine itself has two answers."""

    engine: str = ""
    requests: int = 0
    ended: int = 0  # times that a server was ended
    open_streams: int = 0  # that had begun then
    retries: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)  # while no server was there
    unsteady: int = 0
    direct: str = ""
    seeded_same: str = ""
    problems: list[str] = field(default_factory=list)

    def require(self, good: bool, otherwise: str) -> None:
        if not good:
            self.problems.append(otherwise)


class Engines(ByHand):
    """A router, a worker for each upstream, and an HTTP server."""

    def __init__(
        self, upstreams: Sequence[Upstream], model: str, context: int, engine: list[object], keep: Path
    ) -> None:  # fmt: skip
        length = ("--max-model-len", context)
        super().__init__(
            {}, common=["--model", model], router=["--batch-size", 64, *length],
            server=["--queue-timeout", ANSWERS_S], keep=keep,
        )  # fmt: skip
        self.expected = {"engine": len(upstreams)}
        self._upstreams, self._engine = upstreams, [*length, *engine]

    def await_whole(self, within_s: float = UP_S) -> None:
        """Engines load for long."""
        super().await_whole(within_s)

    def _start(self) -> None:
        super()._start()
        for each in self._upstreams:
            self.start(
                each.name, "decode_worker", "--engine", "openai", "--upstream", each.url, "--router",
                self.address, "--name", each.name, *self._engine,
            )  # fmt: skip


class Trial:
    """Asks, ends servers, and judges."""

    def __init__(
        self, service: Engines, upstreams: Sequence[Upstream], folder: Path, asked: Mapping[int, Any],
        number: signal.Signals,
    ) -> None:  # fmt: skip
        self._service, self._upstreams, self._folder = service, upstreams, folder
        self._bodies, self._signal = asked, number
        self._reference: dict[int, Answer] = {}
        self._same = self._sampled = 0
        self.outcome = Outcome()

    def ask(
        self,
        name: str,
        meanwhile: Callable[[], None] = lambda: None,
        *,
        ends: bool = False,
        **more: Any,
    ) -> list[Event]:
        """All cases at once. `meanwhile` is done when streams are in the middle, if it `ends` a server,
        or never: then it says so."""
        ledger = Ledger(self._folder / f"{name}.jsonl")
        requests = [
            Request(f"{name}-{case}", case, {**body, **more}) for case, body in self._bodies.items()
        ]

        async def both() -> None:
            clients = [partial(next, iter([request]), None) for request in requests]
            asking = asyncio.create_task(
                run_clients(self._service.port, ledger, clients, deadline_s=ANSWERS_S)
            )
            while ends and not asking.done():
                if open_streams := in_the_middle(ledger.events):
                    self.outcome.open_streams += open_streams
                    await asyncio.to_thread(meanwhile)
                    break
                await asyncio.sleep(LOOK_S)
            else:
                self.outcome.require(not ends, f"{name}: no stream was in the middle")
            await asking

        asyncio.run(both())
        ledger.close()
        self.outcome.requests += len(requests)
        return ledger.events

    def calm(self) -> None:
        """The undisturbed answers, twice: an engine may have several to one prompt."""
        first, second = (
            {r.sent[0].case: r for r in records(self.ask(n)).values()} for n in ("calm", "again")
        )
        for case, record in first.items():
            if {outcome(record), outcome(second[case])} != {"ok"}:
                raise SystemExit(f"error: without a fault: {record.ends}, {second[case].ends}")
            if record.text != second[case].text and not seeded(case):
                self.outcome.unsteady += 1
            else:
                tokens = record.ends[0].tokens or 0
                self._reference[case] = Answer(record.text, record.finishes[0], tokens)

    def direct(self, model: str) -> None:
        """What the engine says when it is asked without us, greedily."""
        same = asked = 0
        for case, answer in self._reference.items():
            if not seeded(case):
                words = {k: self._bodies[case][k] for k in ("prompt", "max_tokens", "temperature")}
                body = words | ({"model": model} if model else {})
                _, data = asyncio.run(
                    fetch(self._upstreams[0].port, "/v1/completions", body, timeout_s=ANSWERS_S)
                )
                asked += 1
                same += json.loads(data)["choices"][0]["text"] == answer.text
        self.outcome.direct = f"{same} of {asked}"

    def judge(self, name: str, events: Sequence[Event], *, accepted: Sequence[str] = ()) -> None:
        """Complete and right, each; or an outcome that is accepted here."""
        greedy = [e for e in events if (case := _case(e)) in self._reference and not seeded(case)]
        verdict = check(greedy, self._reference, {e.id for e in greedy}, accepted=accepted)
        self.outcome.problems += [f"{name}: {each}" for each in verdict.problems]
        for record in records(events).values():
            became, case = outcome(record), _case(record.sent[0])
            self.outcome.outcomes[became] = self.outcome.outcomes.get(became, 0) + 1
            if case in self._reference and not seeded(case):
                continue
            self.outcome.require(became in ("ok", *accepted), f"{name}: {record.id}: {became}")
            if seeded(case) and became == "ok":
                self._sampled += 1
                self._same += record.text == self._reference[case].text
        self.outcome.seeded_same = f"{self._same} of {self._sampled}"

    def end(self, *which: int) -> None:
        for each in which:
            self._upstreams[each].end(self._signal)
            self.outcome.ended += 1

    def back(self, *which: int) -> None:
        for each in which:
            self._upstreams[each].start()

    def one(self, which: int) -> None:
        """One of two ends; the other one finishes what both had."""
        before = self._service.metric("request_retries")
        events = self.ask(f"one-{which}", lambda: self.end(which), ends=True)
        self.judge("one", events)
        retries = round(self._service.metric("request_retries") - before)
        self.outcome.retries += retries
        self.outcome.require(
            retries > 0, f"one: {self._upstreams[which].name} ended and had nothing"
        )
        self.back(which)
        self._service.await_whole()

    def both(self) -> None:
        """Nobody is left: what was taken in waits, what comes is refused with the reason."""

        def meanwhile() -> None:
            self.end(0, 1)
            state = self._await_not_ready()
            self.outcome.require(
                "127.0.0.1" in json.dumps(state), f"/readyz says no reason: {state}"
            )
            self._ask_until_refused()
            self.back(0, 1)

        before = self._service.metric("request_retries")
        self.judge("both", self.ask("both", meanwhile, ends=True))
        self.outcome.retries += round(self._service.metric("request_retries") - before)
        self._service.await_whole()

    def deadline(self) -> None:
        """Nobody comes back in time."""
        events = self.ask("deadline", lambda: self.end(0, 1), ends=True, timeout=LIMIT_S)
        self.judge("deadline", events, accepted=["error deadline_exceeded"])
        late = sum(outcome(each) == "error deadline_exceeded" for each in records(events).values())
        self.outcome.require(late > 0, "deadline: every answer was complete before its limit")
        self.back(0, 1)
        self._service.await_whole()
        self.judge("after", self.ask("after"))

    def _ask_until_refused(self) -> None:
        """What comes soon after the end waits as long as it may; later ones are refused."""
        body, deadline = {**self._bodies[1], "timeout": 1}, time.monotonic() + UP_S
        while time.monotonic() < deadline:
            status, said = asyncio.run(
                fetch(self._service.port, "/v1/completions", body, timeout_s=UP_S)
            )
            code = (json.loads(said).get("error") or {}).get("code", f"status {status}")
            self.outcome.refused[code] = self.outcome.refused.get(code, 0) + 1
            if code == "not_ready":
                return
            if code != "deadline_exceeded":
                break
        self.outcome.problems.append(f"both: a new request: {code}: {said[:300]!r}")

    def _await_not_ready(self) -> dict[str, Any]:
        deadline = time.monotonic() + UP_S
        while (state := asyncio.run(self._service.state())).get("ready", True):
            if time.monotonic() > deadline:
                raise NotReady(f"still ready without upstreams: {state}")
            time.sleep(LOOK_S)
        return state


def interrupted(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends it as Ctrl-C does, so that nothing stays behind."""
    raise KeyboardInterrupt


def _case(event: Event) -> int:
    return int(event.id.rpartition("-")[2])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", required=True, help="What the servers serve, as for --engine openai.")
@click.option("--upstream-kind", default="auto", show_default=True)
@click.option("--upstream-model", default="", help="Its name there.")
@click.option("--max-num-seqs", default=4, show_default=True, help="Requests at one server.")
@click.option("--max-model-len", default=512, show_default=True)
@click.option("--prompts", default=16, show_default=True, help="Asked at the same time.")
@click.option("--tokens", default=64, show_default=True, help="Of each answer.")
@click.option("--rounds", default=2, show_default=True, help="Ends of one of the two.")
@click.option("--how", type=click.Choice(list(SIGNALS)), default="kill", show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), default=None, help="Folder for logs.")
@click.argument("command", nargs=-1, required=True)
def main(
    model: str, upstream_kind: str, upstream_model: str, max_num_seqs: int, max_model_len: int,
    prompts: int, tokens: int, rounds: int, how: str, keep: Path | None, command: tuple[str, ...],
) -> None:  # fmt: skip
    """End two servers of another engine in the middle of answers; 1 if a request is lost or wrong."""
    signal.signal(signal.SIGTERM, interrupted)
    engine: list[object] = ["--upstream-kind", upstream_kind, "--max-num-seqs", max_num_seqs]
    if upstream_model:
        engine += ["--upstream-model", upstream_model]
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-up-")))
        folder.mkdir(parents=True, exist_ok=True)
        upstreams = [Upstream(command, folder, f"engine-{number}") for number in range(2)]
        for each in upstreams:
            stack.callback(each.end)
            each.start()
        for each in upstreams:
            each.wait()
        service = stack.enter_context(Engines(upstreams, model, max_model_len, engine, folder))
        trial = Trial(service, upstreams, folder, bodies(prompts, tokens), SIGNALS[how])
        trial.outcome.engine = command[0].rpartition("/")[2]
        steps: list[Callable[[], None]] = [trial.calm, lambda: trial.direct(upstream_model)]
        steps += [lambda which=number % 2: trial.one(which) for number in range(rounds)]  # type: ignore[misc]
        for step in (*steps, trial.both, trial.deadline):
            step()
            print(json.dumps(asdict(trial.outcome)), flush=True)
    if trial.outcome.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
