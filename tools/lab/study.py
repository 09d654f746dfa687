"""Study: the catalogue of studies, what each is given, what it returns, and how results are stored.

    Setting ──► run(setting, notebook) ──► Study ──► NAME.json ──► report.py
                     │ record(): one JSON line for each measurement, as it is made
                     ▼
                NAME.jsonl

A study varies one thing and names it. A failure inside a study is recorded in its result, and the study
goes on. Its findings are sentences computed from its numbers, with the thresholds they used. The report
is made from the stored results alone, so one study can run again while the others keep theirs.

No torch here.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from baton.errors import OutputError

MODULES = {
    "baseline": "tools.lab.baseline",
    "batching": "tools.lab.batching",
    "kv-cache": "tools.lab.kv_cache",
    "claims": "tools.lab.claims",
    "disagg": "tools.lab.disagg",
}
"""The module of each study, in the order they run. Each is imported by name in a process of its own, so
a missing module fails one study only."""

STUDIES = tuple(MODULES)

DEFAULT_MODEL, QUICK_MODEL = "random:gpt2-4k", "demo"
"""The default is GPT-2 small with random weights and a context of 4,096 tokens. It costs what the real
model costs; in a step of the bundled model the processes cost more than the weights."""

NEW_TOKENS, QUICK_TOKENS = 50, 6
"""Length of an answer in the KV cache study (and, the first, in the baseline), and with --quick."""


def model_of(named: str | None, *, quick: bool) -> str:
    """The model of a study: the user's choice, or the default."""
    return named or (QUICK_MODEL if quick else DEFAULT_MODEL)


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


@dataclass(frozen=True, slots=True)
class Saved:
    """A study, where it was measured (machine, versions), and when and of which commit."""

    study: Study
    place: Mapping[str, str]
    moment: Mapping[str, str]


def save(folder: Path, saved: Saved) -> None:
    """The file appears whole or not at all."""
    path = folder / f"{saved.study.name}.json"
    part = path.with_suffix(".json.part")
    text = json.dumps(asdict(saved), indent=1, ensure_ascii=False)
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def load(folder: Path) -> tuple[list[Saved], list[Failure]]:
    """All that are there, in the order they run; and what could not be read."""
    found, failures = [], []
    for name in STUDIES:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            found.append(_saved(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, LookupError) as error:
            failures.append(Failure(path.name, f"cannot be read, do `lab {name}` again: {error}"))
    return found, failures


def _saved(raw: dict[str, Any]) -> Saved:
    study = dict(raw["study"])
    study["findings"] = tuple(study["findings"])
    study["tables"] = tuple(
        Table(each["title"], tuple(each["header"]), tuple(map(tuple, each["rows"])))
        for each in study["tables"]
    )
    study["pictures"] = tuple(Picture(**each) for each in study["pictures"])
    study["failures"] = tuple(Failure(**each) for each in study["failures"])
    return Saved(Study(**study), raw["place"], raw["moment"])
