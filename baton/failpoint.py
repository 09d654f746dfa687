"""Failpoints: named places where tests and the reliability battery (tools/faults) inject a fault.

    BATON_FAILPOINTS=site:action:nth[:seconds],...   each process acts at its nth hit of the site, once
                     site:action:%nth                ... at every nth hit
                     @FOLDER                         files of FOLDER named like that, read at each hit

Off unless the variable is set: hit() then returns after one comparison. An unknown site or action ends
the process at its start with exit code 2. A file of FOLDER is removed by the process that acts on it: of
several processes, and of those that replace dead ones, one acts. FOLDER/.fired gets a JSON line for each
action before it is carried out: site, action, pid, and the monotonic time in seconds.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "BATON_FAILPOINTS"
FIRED = ".fired"
SETTLED_S = 0.05  # a folder changed since may change again without a new modification time

MESSAGES = (
    *("Hello", "Submit", "Reserve", "Reserved", "Fill", "Filled", "Start", "Decoded", "Cancel"),
    *("ChunkFilled", "Finished", "Attach", "Heartbeat"),
)
SITES = frozenset(
    [f"{way}.{name}" for way in ("received", "sending") for name in MESSAGES]
    + [
        "worker.begin",  # a worker's process: before torch and the model are loaded
        "prefill.chunk",  # before a forward
        "prefill.forward",  # in a forward, where memory may run out
        "prefill.layer",  # one layer's blocks are pushed to another process's pool
        "prefill.computed",  # KV is written, not yet stamped; Filled is not sent
        "prefill.payload",  # bytes of a frame, after their digest was taken
        "prefill.stamp",  # the first block's stamp in the decode worker's pool
        "follower.step",  # another rank of a tensor-parallel worker: before a forward
        "decode.step",  # before a forward
        "decode.forward",  # in a forward, where memory may run out
        "decode.kv",  # the first row's first block of KV, before a forward
        "decode.first_token",
        "decode.token",
        "decode.last_token",
        "server.accepted",  # a request was checked, and not yet sent to the router
        "server.chunk",  # before a chunk of a stream
    ]
)

Subject = Callable[[], Any]
"""The memory that an action changes: anything that can be indexed and assigned to."""


def _kill(argument: float, subject: Subject | None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # a signal to oneself may take a moment; nothing else happens meanwhile


def _stop(argument: float, subject: Subject | None) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _wedge(argument: float, subject: Subject | None) -> None:
    while True:
        pass


def _delay(argument: float, subject: Subject | None) -> None:
    time.sleep(argument)


def _nan(argument: float, subject: Subject | None) -> None:
    assert subject is not None, "this site has no memory to change"
    subject()[:] = float("nan")


def _oom(argument: float, subject: Subject | None) -> None:
    raise MemoryError("a failpoint")


def _damage(argument: float, subject: Subject | None) -> None:
    """Flip one bit of a sequence of bytes."""
    assert subject is not None, "this site has no memory to change"
    memory = subject()
    index = random.randrange(len(memory))
    memory[index] = int(memory[index]) ^ 1 << random.randrange(8)


ACTIONS: Mapping[str, Callable[[float, Subject | None], None]] = {
    "kill": _kill,
    "stop": _stop,
    "wedge": _wedge,
    "delay": _delay,
    "nan": _nan,
    "damage": _damage,
    "oom": _oom,
}
ONLY_AT = {
    "nan": ("decode.kv",),
    "damage": ("prefill.payload", "prefill.stamp"),
    "oom": ("prefill.forward", "decode.forward"),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One fault: where, what, and at which hit."""

    site: str
    action: str
    nth: int
    repeats: bool = False  # at every nth hit
    seconds: float = 0.0  # of a delay

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ValueError(f"no site {self.site!r}; sites are {', '.join(sorted(SITES))}")
        if self.action not in ACTIONS:
            raise ValueError(f"no action {self.action!r}; actions are {', '.join(ACTIONS)}")
        allowed = ONLY_AT.get(self.action, (self.site,))
        if self.site not in allowed:
            raise ValueError(f"{self.action} works at {', '.join(allowed)}, not at {self.site}")
        if self.nth < 1 or not 0 <= self.seconds < 3600:
            raise ValueError(
                f"nth must be at least 1, seconds in [0, 3600), got {self.nth} and {self.seconds}"
            )

    def __str__(self) -> str:
        text = f"{self.site}:{self.action}:{'%' if self.repeats else ''}{self.nth}"
        return f"{text}:{self.seconds:g}" if self.seconds else text

    def due(self, count: int) -> bool:
        """Whether to act at this hit; the first one has count 1."""
        return count % self.nth == 0 if self.repeats else count == self.nth


def parse(text: str) -> Point:
    """SITE:ACTION:NTH[:SECONDS]. Raises ValueError."""
    match text.split(":"):
        case [site, action, nth, *rest] if len(rest) <= 1:
            seconds = float(rest[0]) if rest else 0.0
            return Point(site, action, int(nth.removeprefix("%")), nth.startswith("%"), seconds)
    raise ValueError(f"a failpoint is SITE:ACTION:NTH[:SECONDS], got {text!r}")


class Armed:
    """The failpoints of one process."""

    def __init__(self, points: Sequence[Point], folder: Path | None) -> None:
        self._always, self._folder = list(points), folder
        self._found: list[Point] = []  # files of the folder
        self._seen_ns = 0  # the folder's modification time at the last look
        self._looked = 0.0
        self._counts: dict[str, int] = {}

    def hit(self, site: str, subject: Subject | None) -> None:
        """Count this hit, and act where it is due."""
        for point in [*self._always, *self._in_folder()]:
            if point.site != site:
                continue
            name = str(point)
            self._counts[name] = count = self._counts.get(name, 0) + 1
            if point.due(count) and self._claim(point):
                self._note(point)
                ACTIONS[point.action](point.seconds, subject)

    def _in_folder(self) -> list[Point]:
        if self._folder is None:
            return []
        now, changed_ns = time.time(), self._folder.stat().st_mtime_ns
        if changed_ns != self._seen_ns or self._looked < changed_ns / 1e9 + SETTLED_S:
            self._seen_ns, self._looked = changed_ns, now
            self._found = [parse(n) for n in os.listdir(self._folder) if not n.startswith(".")]
            present = {str(point) for point in [*self._always, *self._found]}
            self._counts = {n: count for n, count in self._counts.items() if n in present}
        return self._found

    def _claim(self, point: Point) -> bool:
        """Whether this process is the one that acts."""
        if self._folder is None or point in self._always or point.repeats:
            return True
        try:
            (self._folder / str(point)).unlink()
        except FileNotFoundError:
            return False
        return True

    def _note(self, point: Point) -> None:
        if self._folder is not None:
            line = {"site": point.site, "action": point.action, "pid": os.getpid()}
            with (self._folder / FIRED).open("a") as file:
                file.write(json.dumps({**line, "at": time.monotonic()}) + "\n")


def read(environment: Mapping[str, str]) -> Armed | None:
    """What the variable names; None if it is not set. Raises ValueError."""
    words = [word for word in environment.get(VARIABLE, "").split(",") if word]
    if not words:
        return None
    folders = [Path(word[1:]) for word in words if word.startswith("@")]
    if len(folders) > 1 or not all(each.is_dir() for each in folders):
        raise ValueError(f"one existing folder can be named, got {folders}")
    points = [parse(word) for word in words if not word.startswith("@")]
    return Armed(points, folders[0] if folders else None)


def _read_or_leave() -> Armed | None:
    try:
        return read(os.environ)
    except ValueError as error:
        sys.stderr.write(f"error: {VARIABLE}: {error}\n")
        sys.exit(2)


_ARMED = _read_or_leave()


def hit(site: str, subject: Subject | None = None) -> None:
    """This place was reached. `subject`: see Subject."""
    if _ARMED is not None:
        _ARMED.hit(site, subject)


def messages(way: str, these: Sequence[object]) -> None:
    """These messages have been received, or are about to be sent together."""
    if _ARMED is not None:
        for each in these:
            _ARMED.hit(f"{way}.{type(each).__name__}", None)
