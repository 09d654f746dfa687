"""Bundle: tasks in the format of nanochat's eval bundle, read from a folder and checked.

core.yaml            icl_tasks, a list: label, icl_task_type, dataset_uri, num_fewshot,
                     continuation_delimiter (default: a space)
eval_meta_data.csv   "Eval Task", "Random baseline" (percent), ...
eval_data/URI        one example a line:

multiple_choice      {"query", "choices": [...], "gold"}                   one beginning, several endings
schema               {"context_options": [...], "continuation", "gold"}    several beginnings, one ending
language_modeling    {"context", "continuation"}
"""

import csv
import io
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from baton.errors import InputError
from tools.evaluation.data import Line, read_lines, read_text

SHUFFLE_SEED = 1337  # nanochat's: the order of the examples, and so what --max-per-task keeps
KINDS = ("multiple_choice", "schema", "language_modeling")


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """Which choice continues the query?"""

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True)
class Schema:
    """Which context does the continuation follow from?"""

    context_options: tuple[str, ...]
    continuation: str
    gold: int


@dataclass(frozen=True, slots=True)
class LanguageModeling:
    """Does the model itself continue like this, token for token?"""

    context: str
    continuation: str


Example = MultipleChoice | Schema | LanguageModeling


@dataclass(frozen=True, slots=True)
class Task:
    """Examples of one kind, and how they are presented."""

    label: str
    kind: str
    shots: int  # solved examples in front of each
    delimiter: str
    baseline: float  # accuracy of guessing, 0 to 1
    examples: tuple[Example, ...]  # numbered in this order


def read_bundle(folder: Path, *, max_per_task: int | None = None) -> tuple[Task, ...]:
    """Every task of the folder, shuffled as nanochat shuffles them. Raises InputError."""
    listing = folder / "core.yaml"
    try:
        found = yaml.safe_load(read_text(listing))
    except yaml.YAMLError as error:
        raise InputError(f"{listing} is not valid YAML: {' '.join(str(error).split())}") from error
    entries = found.get("icl_tasks") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{listing} has no list icl_tasks")
    baselines = _baselines(folder / "eval_meta_data.csv")
    tasks = tuple(
        _task(folder, f"{listing}, task {number}", entry, baselines, max_per_task)
        for number, entry in enumerate(entries, start=1)
    )
    labels = [task.label for task in tasks]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise InputError(f"{listing} has {min(twice)!r} twice")
    return tasks


def _task(
    folder: Path,
    place: str,
    entry: object,
    baselines: Mapping[str, float],
    max_per_task: int | None,
) -> Task:
    if not isinstance(entry, dict):
        raise InputError(f"{place}: a mapping is needed, got {entry!r}")
    line = Line(place, {str(key): value for key, value in entry.items()})
    label, kind = line.text("label"), line.text("icl_task_type")
    if kind not in KINDS:
        raise line.wrong(f"icl_task_type must be one of {', '.join(KINDS)}, got {kind!r}")
    if label not in baselines:
        raise line.wrong(f"eval_meta_data.csv has no line for {label!r}")
    file = folder / "eval_data" / line.text("dataset_uri")
    examples = [_example(each, kind) for each in read_lines(file)]
    random.Random(SHUFFLE_SEED).shuffle(examples)
    kept = tuple(examples[:max_per_task])
    shots = _shots(line)
    if not kept:
        raise InputError(f"{file} has no examples")
    if shots >= len(kept):
        raise line.wrong(
            f"{shots} solved examples for each need more than the {len(kept)} of {file}"
        )
    delimiter = line.text("continuation_delimiter") if "continuation_delimiter" in entry else " "
    return Task(label, kind, shots, delimiter, baselines[label], kept)


def _shots(line: Line) -> int:
    """num_fewshot: a number, or a list whose first element counts."""
    found = line.fields.get("num_fewshot")
    first = found[0] if isinstance(found, list) and found else found
    if type(first) is not int or first < 0:
        raise line.wrong(f"num_fewshot must be a number or a list of numbers, got {found!r}")
    return first


def _example(line: Line, kind: str) -> Example:
    if kind == "multiple_choice":
        choices = line.texts("choices", least=2)
        return MultipleChoice(line.text("query"), choices, line.index("gold", len(choices)))
    if kind == "schema":
        options = line.texts("context_options", least=2)
        return Schema(options, line.text("continuation"), line.index("gold", len(options)))
    return LanguageModeling(line.text("context"), line.text("continuation"))


def _baselines(file: Path) -> dict[str, float]:
    """The accuracy of guessing by task, 0 to 1."""
    found: dict[str, float] = {}
    for number, row in enumerate(csv.DictReader(io.StringIO(read_text(file))), start=2):
        found[_cell(file, number, row, "Eval Task")] = _share(file, number, row)
    return found


def _share(file: Path, number: int, row: Mapping[str, Any]) -> float:
    text = _cell(file, number, row, "Random baseline")
    try:
        percent = float(text)
    except ValueError as error:
        raise InputError(f"{file}:{number}: {text!r} is not a percentage") from error
    if not 0 <= percent < 100:
        raise InputError(f"{file}:{number}: a baseline must be 0 or more and below 100, got {text}")
    return percent / 100


def _cell(file: Path, number: int, row: Mapping[str, Any], column: str) -> str:
    found = row.get(column)
    if not isinstance(found, str):
        raise InputError(f"{file}:{number}: missing column {column!r}")
    return found
