"""Store: each study's result as NAME.json in the report's folder, so that one can be done again and the
others stay. The report is made of these files alone. No torch."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.errors import OutputError
from tools.lab.names import STUDIES
from tools.lab.study import Failure, Picture, Study, Table


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
