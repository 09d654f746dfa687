"""Workload: the requests of the battery. A case is a body with a known fault-free answer; every sending
has its own cache_salt, so that prompts are filled anew."""

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

from tools.faults.client import Leave, Request

VOCABULARY = 2048
TEXT = (
    "In the future artificial intelligence will help people to learn and the village by the river "
    "has a garden where children read books about stars while the old teacher explains how water "
    "and light make plants grow every morning before work begins"
)
WORDS = TEXT.split()
SALTED = 0.85  # the others may find their prefix in the cache


def cases(
    seed: int,
    count: int,
    *,
    prompt: tuple[int, int] = (8, 400),
    answer: tuple[int, int] = (16, 120),
    sampled: bool = True,
) -> list[dict[str, Any]]:
    """Bodies of completions: half of them streams, a quarter sampled with a seed, a quarter as text. The
    lengths are in tokens; those of prompts are log-uniform."""
    rng, made = random.Random(f"cases {seed}"), []
    for index in range(count):
        length = round(math.exp(rng.uniform(math.log(prompt[0]), math.log(prompt[1]))))
        text: Any = [rng.randrange(3, VOCABULARY) for _ in range(length)]
        if index % 4 == 3:
            text = " ".join(rng.choice(WORDS) for _ in range(max(4, length * 2 // 3)))
        body: dict[str, Any] = {
            "model": "demo",
            "prompt": text,
            "max_tokens": rng.randint(*answer),
            "ignore_eos": rng.random() < 0.7,
            "temperature": 0,
            "stream": index % 2 == 0,
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        if sampled and index % 8 in (1, 2):
            body |= {"temperature": rng.choice([0.7, 1.0]), "seed": rng.randrange(1 << 31)}
            body["top_p"] = rng.choice([0.95, 1])
        made.append(body)
    return made


class Mix:
    """Requests drawn from the cases, for several clients, and the ids that were sent."""

    def __init__(
        self,
        name: str,
        seed: int,
        bodies: Mapping[int, Mapping[str, Any]],
        *,
        salted: float = SALTED,
    ) -> None:
        """`salted`: the share of requests whose prompt no cache knows."""
        self._name, self._seed = name, seed
        self._bodies, self._salted = dict(bodies), salted
        self.ids: list[str] = []

    def client(
        self,
        number: int,
        at_least: int,
        more: Callable[[], bool] = lambda: False,
        leave: Callable[[random.Random], Leave | None] = lambda rng: None,
    ) -> Callable[[], Request | None]:
        """A client's requests: so many, and others as long as `more()`."""
        rng, made = random.Random(f"{self._seed} {self._name} {number}"), 0

        def following() -> Request | None:
            nonlocal made
            if made >= at_least and not more():
                return None
            id = f"{self._name}-{number}-{made}"
            made += 1
            self.ids.append(id)
            case = rng.choice(list(self._bodies))
            body = dict(self._bodies[case])
            if rng.random() < self._salted:
                body["cache_salt"] = f"{id} {rng.random()}"
            return Request(id, case, body, leave(rng))

        return following

    def clients(
        self, count: int, at_least: int, more: Callable[[], bool] = lambda: False
    ) -> list[Callable[[], Request | None]]:
        """So many clients with so many requests each."""
        return [self.client(number, at_least, more) for number in range(count)]
