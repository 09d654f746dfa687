"""A town whose workers are engines: the real nodes, and a pretend server behind each.

The server answers as vLLM does: JSON with token ids, one event a poll. Greedy answers are the pretend
model's. Drawn ones come from a stream of random numbers that begins with the request, as in most servers,
so an answer that is continued from its middle with the same seed is another one.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.wire import messages as msg
from baton.wire.node import ROUTER
from decode_worker.upstream.dialects import Json
from decode_worker.upstream.health import Look
from decode_worker.upstream.node import Broken, EngineWorker, Events, Heard, Looked, Refused
from decode_worker.upstream.survey import Survey
from router.batching import Rules
from tests.pure.slow_loads import wrong_counts
from tests.pure.town import EOS, VOCABULARY, Town, next_token


def drawn_token(context: Sequence[int], seed: int, number: int) -> int:
    """The token that request draws as its `number`th."""
    digest = hashlib.blake2b(f"{list(context)} {seed} {number}".encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "big") % (VOCABULARY - 1)


def drawn_answer(prompt: Sequence[int], length: int, seed: int) -> list[int]:
    """An undisturbed answer with this seed."""
    known = list(prompt)
    for number in range(length):
        known.append(drawn_token(known, seed, number))
    return known[len(prompt) :]


@dataclass
class Call:
    """An HTTP request that is answered."""

    body: Json
    generated: list[int] = field(default_factory=list)

    def next(self) -> Json:
        """The next event."""
        known = [*self.body["prompt"], *self.generated]
        if self.body["temperature"]:
            token = drawn_token(known, self.body["seed"], len(self.generated))
        else:
            token = next_token(known)
        self.generated.append(token)
        stops = token == EOS and not self.body["ignore_eos"]
        full = len(self.generated) == self.body["max_tokens"]
        finish = "stop" if stops else "length" if full else None
        return {"choices": [{"text": "", "token_ids": [token], "finish_reason": finish}]}


class PretendUpstream:
    """A server. `dead`: it refuses connections. `most`: requests that it takes at once. `deadly`: a
    context for which it dies when it has got so far."""

    def __init__(self) -> None:
        self.open: dict[int, Call] = {}
        self.news: list[Heard] = []
        self.dead = False
        self.most = 10**6
        self.deadly: Callable[[Sequence[int]], bool] = lambda known: False
        self.asked: list[Json] = []
        self.mute = False  # it accepts and sends nothing
        self.model = "m"
        self.garbled = False  # what it sends is no JSON

    # ---- the Upstream

    def ask(self, call: int, path: str, body: Json) -> None:
        assert path == "/v1/completions"
        assert call not in self.open
        self.asked.append(json.loads(json.dumps(body)))
        if self.dead:
            self.news.append(Broken(call, "connection refused", begun=False))
        elif len(self.open) >= self.most:
            self.news.append(Refused(call, 429, "too many requests", None))
        else:
            self.open[call] = Call(body)

    def close(self, call: int) -> None:
        self.open.pop(call, None)

    def look(self, how: Look) -> None:
        if self.mute:
            self.news.append(Looked(how, "no answer in time", answered=False))
        else:
            wrong = "another model" if self.model != "m" else "no JSON" if self.garbled else ""
            other = wrong if how is Look.WHOLE else ""
            self.news.append(Looked(how, "connection refused" if self.dead else other))

    def poll(self) -> list[Heard]:
        news, self.news = self.news, []
        for number, call in [] if self.mute else list(self.open.items()):
            if self.deadly([*call.body["prompt"], *call.generated]):
                self.die("it crashed")
                self.dead = False  # and is back at once
                return news + self.poll()
            event = {"model": self.model, **call.next()}
            text = json.dumps(event)
            news.append(Events(number, (text[:-3] if self.garbled else text,)))
            if event["choices"][0]["finish_reason"]:
                del self.open[number]
        return news

    # ---- what happens to it

    def die(self, why: str = "the connection was reset") -> None:
        """All connections break; new ones are refused."""
        self.dead = True
        self.news += [Broken(call, why, begun=True) for call in self.open]
        self.open.clear()


class EngineTown(Town):
    """Engines only."""

    def __init__(self, engines: int = 2, *, slots: int = 8, **options: object) -> None:
        self.upstreams: dict[str, PretendUpstream] = {}  # by worker, also of those that are gone
        self._slots = slots
        rules = Rules(batch_size=16, window_s=0.01, token_budget=64)
        super().__init__(prefills=0, decodes=0, **{"rules": rules, **options})  # type: ignore[arg-type]
        for index in range(engines):
            self.start_worker("engine", index)

    def turn(self) -> None:
        """What the router counts is compared with its slow definition."""
        super().turn()
        if ROUTER in self.nodes:
            assert not [*wrong_counts(self.router)]

    def start_worker(self, role: str, index: int) -> str:
        if role != "engine":
            return super().start_worker(role, index)
        self._boots += 1
        name = f"engine-{index}.{self._boots}"
        hello = msg.Hello(
            "engine", name, f"{name}/0", msg.PROTOCOL, "here", 1000 + self._boots, "http://up",
            "pretend", "upstream", "engine/vllm", 4, 1, self._slots, (), 0.0, 0.0,
        )  # fmt: skip
        upstream = self.upstreams[name] = PretendUpstream()
        self.nodes[name] = EngineWorker(
            hello, upstream, f"http://up-{index}", Survey("vllm", "m", 0, "m"), VOCABULARY
        )
        return name

    def kill(self, name: str, *, restart: bool = True) -> None:
        if name in self.upstreams:
            self.upstreams[name].open.clear()  # its connections end with it
        super().kill(name, restart=restart)

    def served(self) -> list[PretendUpstream]:
        """The servers of the workers that run."""
        return [self.upstreams[name] for name in self.workers("engine")]

    def at_rest(self) -> bool:
        return super().at_rest() and not any(each.open for each in self.upstreams.values())
