"""Recorded: what a real cluster did with its requests, in a file that `bench disagg --traces` writes.

It is a trace in Mooncake's format (baton/plan/arrivals.py), so anything that replays one can replay it.
The first line says how the cluster was set up; each request's line has three fields more:

    {"setting": {"prefills": 1, "decodes": 1, "cores": 2, "role_policy": "split", ...}}
    {"timestamp": 812, "input_length": 206, "output_length": 3, "began_ms": 3.1, "fill_ms": 151.0,
     "handover_ms": 0.2, "tokens_ms": [161.2, 174.9, 188.3]}

Times are milliseconds since the request's timestamp: `began_ms`, when a worker began with its prompt;
`tokens_ms`, when the client had each token. `fill_ms` is how long a prefill worker had the prompt, and 0
if the decode worker filled it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from math import inf, isfinite
from pathlib import Path
from typing import Any

from baton.errors import InputError
from baton.plan.arrivals import MOST_TOKENS
from baton.plan.simulation import Arrival, Shape
from router.batching import Rules
from router.role_policy import RolePolicy, Slo

WINDOW_S, FILL_TOKENS = 0.01, 8192  # of a router, if nothing else is said
FEWEST = 10
"""Requests from which anything can be learnt."""
LONGEST_MS = 1e9


@dataclass(frozen=True, slots=True)
class Setting:
    """The cluster that served, as far as its simulation needs it. `cores`: shared by all workers; 0: each
    has a device of its own. `batch_size`: requests on workers at once. Limits in seconds, 0: none."""

    prefills: int
    decodes: int
    cores: int = 0
    role_policy: str = RolePolicy.SPLIT.value
    batch_size: int = 64
    token_budget: int = 2048
    slo_ttft_s: float = 0.0
    slo_itl_s: float = 0.0

    def __post_init__(self) -> None:
        RolePolicy(self.role_policy)
        for each in fields(self):
            value = getattr(self, each.name)
            least = 1 if each.name in ("decodes", "batch_size", "token_budget") else 0
            if each.name == "role_policy":
                continue
            whole = each.name.endswith("_s") or isinstance(value, int)
            if isinstance(value, bool) or not whole or not least <= value <= MOST_TOKENS:
                raise ValueError(f"{each.name} must be a number from {least} on, got {value!r:.40}")

    @property
    def rules(self) -> Rules:
        """Of its router."""
        return Rules(
            self.batch_size, WINDOW_S, FILL_TOKENS, not self.prefills,
            role_policy=RolePolicy(self.role_policy),
            slo=Slo(self.slo_ttft_s or None, self.slo_itl_s or None),
        )  # fmt: skip

    def shape(self, pool_tokens: int) -> Shape:
        """Of its workers. `pool_tokens`: KV of each decode worker."""
        return Shape(self.prefills, self.decodes, pool_tokens, self.token_budget, 1 << 20)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request. Seconds from the beginning of the trace: `at`, `began`, `tokens`."""

    at: float
    prompt_tokens: int
    began: float
    fill_s: float  # by a prefill worker, without the hand-over; 0: its decode worker filled
    handover_s: float
    tokens: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        return self.tokens[0] - self.at

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


def arrivals_of(recorded: Sequence[Recorded]) -> list[Arrival]:
    """The same requests, to be simulated. No two prompts begin alike."""
    return [
        Arrival(each.at, (index + 1,) * each.prompt_tokens, len(each.tokens))
        for index, each in enumerate(recorded)
    ]


def lines(setting: Setting, recorded: Sequence[Recorded]) -> Iterator[str]:
    """The file."""
    yield json.dumps({"setting": asdict(setting)}) + "\n"
    for each in sorted(recorded, key=lambda one: one.at):
        at = round(1000 * each.at)
        line = {
            "timestamp": at,
            "input_length": each.prompt_tokens,
            "output_length": len(each.tokens),
            "began_ms": _ms(each.began - each.at),
            "fill_ms": _ms(each.fill_s),
            "handover_ms": _ms(each.handover_s),
            "tokens_ms": [_ms(time - each.at) for time in each.tokens],
        }
        yield json.dumps(line) + "\n"


def read_recorded(path: Path, *, option: str) -> tuple[Setting, list[Recorded]]:
    """Setting and requests, by time of arrival. Raises InputError; `option` names the file there."""
    found: list[Recorded] = []
    setting: Setting | None = None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            what = json.loads(line)
            if setting is None:
                setting = Setting(**what["setting"])
            else:
                found.append(_request(what))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            hint = "`bench disagg --traces FOLDER` writes such files"
            raise InputError(f"{option} {path}, line {number}: {_what(error)}; {hint}") from error
    if setting is None or len(found) < FEWEST:
        raise InputError(
            f"{option} {path} has {len(found)} requests, and {FEWEST} are the least to learn from: "
            "record more"
        )
    return setting, sorted(found, key=lambda one: one.at)


def _request(line: dict[str, Any]) -> Recorded:
    at, prompt = _number(line, "timestamp"), line["input_length"]
    if not isinstance(prompt, int) or not 1 <= prompt <= MOST_TOKENS:
        raise ValueError(f"input_length must be 1 to {MOST_TOKENS:,}, got {prompt!r:.40}")
    times = [_number({"tokens_ms": each}, "tokens_ms") for each in line["tokens_ms"]]
    if not times or times != sorted(times):
        raise ValueError("tokens_ms must be times that grow, at least one")
    began = _number(line, "began_ms")
    return Recorded(
        at, prompt, at + began, _number(line, "fill_ms"), _number(line, "handover_ms"),
        tuple(at + each for each in times),
    )  # fmt: skip


def _number(line: dict[str, Any], key: str) -> float:
    """Seconds."""
    value = line[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        not number
        or not isfinite(value)
        or not 0 <= value < (inf if key == "timestamp" else LONGEST_MS)
    ):
        raise ValueError(f"{key} must be milliseconds from 0 on, got {value!r:.40}")
    return float(value) / 1000


def _ms(seconds: float) -> float:
    return round(1000 * max(0.0, seconds), 3)


def _what(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
