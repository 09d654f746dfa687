"""Study: what every study is given, and what it gives back. Plain data; the report is made of it alone.

    Setting ──► run(setting, notebook) ──► Study ──► report.py
                     │ record(): one JSON line for each measurement, as it is made
                     ▼
                NAME.jsonl

A study varies one thing and says which. Whatever fails in it is a Failure in its Study, and the rest
goes on. Its findings are sentences computed from its numbers, with the threshold they used.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Plain = str | int | float | bool | None
Cell = Plain | list[float] | list[str]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a study runs with. What is None or empty is the study's own default."""

    output: Path  # the report's folder
    model: str | None = None
    dtype: str = "auto"
    quick: bool = False  # small numbers: does it run, and what will the report look like?
    seed: int = 0
    batch_sizes: tuple[int, ...] = ()
    windows_ms: tuple[float, ...] = ()
    prompt_lengths: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    rounds: int | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers as people read them. Columns after the first are aligned to the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG in the report's folder."""

    file: str
    caption: str


@dataclass(frozen=True, slots=True)
class Failure:
    """What could not be measured, and why, in one line."""

    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Study:
    """One study's result."""

    name: str  # as the command line calls it
    title: str
    question: str
    varied: str  # the one thing (or two, each by itself)
    fixed: Mapping[str, str]  # everything else that matters, by name
    command: str  # that does it again
    findings: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    failures: tuple[Failure, ...] = ()
    seconds: float = 0.0
    quotations: Mapping[str, str] = field(default_factory=dict)  # caption: what a model wrote


@dataclass(slots=True)
class Notebook:
    """Raw numbers on their way into NAME.jsonl, and words on their way to the terminal."""

    file: Path
    say: Callable[[str], None]
    failures: list[Failure] = field(default_factory=list)

    def record(self, what: str, /, **numbers: Cell) -> None:
        """One measurement, written at once: a run that is broken off keeps what it has."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"what": what, **numbers}) + "\n")

    def failed(self, what: str, why: object) -> None:
        """Recorded and told; the study goes on."""
        text = " ".join(str(why).split()) or type(why).__name__
        self.failures.append(Failure(what, text))
        self.record("failure", cell=what, why=text)
        self.say(f"{what} failed: {text}")
