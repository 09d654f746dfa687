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
    """What a study runs with. None or empty stands for the study's own default."""

    output: Path  # the report's folder
    model: str | None = None
    dtype: str = "auto"
    quick: bool = False  # small numbers, to see that it runs
    seed: int = 0
    batch_sizes: tuple[int, ...] = ()
    windows_ms: tuple[float, ...] = ()
    prompt_lengths: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    rounds: int | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Formatted numbers. Columns after the first are aligned to the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG in the report's folder. Raises ValueError without a caption."""

    file: str
    caption: str  # what is drawn, and the kind of axes

    def __post_init__(self) -> None:
        if not self.caption.strip():
            raise ValueError(f"{self.file} needs a caption")


@dataclass(frozen=True, slots=True)
class Failure:
    """A measurement that failed, and the reason in one line."""

    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Study:
    """The result of a study."""

    name: str  # its name on the command line
    title: str
    question: str
    varied: str  # the one thing that varies (or two, one at a time)
    fixed: Mapping[str, str]  # everything else that matters
    command: str  # repeats the study
    findings: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    failures: tuple[Failure, ...] = ()
    seconds: float = 0.0
    quotations: Mapping[str, str] = field(
        default_factory=dict
    )  # text that a model wrote, by caption


@dataclass(slots=True)
class Notebook:
    """Writes raw numbers to NAME.jsonl and progress to the terminal."""

    file: Path
    say: Callable[[str], None]
    failures: list[Failure] = field(default_factory=list)

    def record(self, what: str, /, **numbers: Cell) -> None:
        """Write one measurement at once, so that an interrupted run keeps it."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"what": what, **numbers}) + "\n")

    def failed(self, what: str, why: object) -> None:
        """Record and print a failure. The study goes on."""
        text = " ".join(str(why).split()) or type(why).__name__
        self.failures.append(Failure(what, text))
        self.record("failure", cell=what, why=text)
        self.say(f"{what} failed: {text}")


@dataclass(frozen=True, slots=True)
class Saved:
    """A study, where it was measured (machine, versions), when, and at which commit."""

    study: Study
    place: Mapping[str, str]
    moment: Mapping[str, str]


def save(folder: Path, saved: Saved) -> None:
    """Write NAME.json atomically. Raises OutputError."""
    path = folder / f"{saved.study.name}.json"
    part = path.with_suffix(".json.part")
    text = json.dumps(asdict(saved), indent=1, ensure_ascii=False)
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def load(folder: Path) -> tuple[list[Saved], list[Failure]]:
    """The stored studies in the order they run, and a Failure for each file that cannot be read."""
    found, failures = [], []
    for name in STUDIES:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            found.append(_saved(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, LookupError) as error:
            failures.append(Failure(path.name, f"cannot be read, run `lab {name}` again: {error}"))
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
