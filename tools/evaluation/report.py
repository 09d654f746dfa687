"""Report: results as tables for people and as one JSON object."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.errors import OutputError
from baton.machine import this_machine
from baton.package import own_version
from baton.table import seconds, table
from tools.evaluation.bundle import SHUFFLE_SEED
from tools.evaluation.core import TaskResult, core
from tools.evaluation.generation import Written
from tools.evaluation.perplexity import Perplexity
from tools.evaluation.questions import SHOTS_SEED
from tools.evaluation.subject import About, Speed

Json = dict[str, Any]


def headline(about: About) -> str:
    """The model and how it runs, in one line."""
    where = about.runs if about.asked == "in process" else f"through {about.asked}"
    return f"{about.model} ({about.fingerprint[:12]}): {where}; context {about.context}"


def perplexity_table(name: str, found: Perplexity, call: str) -> str:
    """One line."""
    per_byte = "-" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
    head = ["perplexity of", "texts", "tokens", "perplexity", "bits/token", "bits/byte", "tokens/s"]
    line = [
        name, str(found.texts), f"{found.tokens:,}", f"{found.perplexity:.4f}",
        f"{found.bits_per_token:.4f}", per_byte, _rate(found.speed),
    ]  # fmt: skip
    how = f"window {found.window}, stride {found.stride}; "
    return f"{table(head, [line])}\n{how}{speed_line(found.speed, call)}"


def generation_table(name: str, found: Written, call: str) -> str:
    """One line."""
    head = [
        "continuations of",
        "texts",
        "BLEU",
        "ROUGE-1",
        "ROUGE-2",
        "ROUGE-L",
        "tokens",
        "tokens/s",
    ]
    line = [
        name, str(len(found.texts)), f"{found.bleu:.2f}",
        *(f"{100 * each:.2f}" for each in dataclasses.astuple(found.rouge)),
        f"{found.speed.tokens:,}", _rate(found.speed),
    ]  # fmt: skip
    how = f"greedy, {found.ended} of {len(found.texts)} ended within {found.new_tokens} tokens; "
    return f"{table(head, [line])}\n{how}{speed_line(found.speed, call)}"


def core_table(results: Sequence[TaskResult], call: str) -> str:
    """A line for each task, and the CORE score."""
    head = ["task", "kind", "shots", "examples", "accuracy", "+-", "chance", "centered", "tokens/s"]
    lines = [
        [
            each.task.label, each.task.kind, str(each.task.shots), str(len(each.verdicts)),
            f"{each.accuracy:.3f}", f"{each.standard_error:.3f}", f"{each.task.baseline:.3f}",
            f"{each.centered:.3f}", _rate(each.speed),
        ]
        for each in results
    ]  # fmt: skip
    lines.append(["CORE", "", "", "", "", "", "", f"{core(results):.3f}", ""])
    speeds = [f"{each.task.label}: {speed_line(each.speed, call)}" for each in results]
    return "\n".join([table(head, lines), *filter(None, map(_remark, results)), *speeds])


def speed_line(speed: Speed, call: str) -> str:
    """Time of all the work and of a call."""
    return (
        f"{seconds(speed.seconds)}; {call}s: {speed.calls}, median {seconds(speed.call_median_s)}, "
        f"p95 {seconds(speed.call_p95_s)}"
    )


def perplexity_json(found: Perplexity) -> Json:
    """All numbers."""
    return dataclasses.asdict(found) | {
        "perplexity": found.perplexity,
        "bits_per_token": found.bits_per_token,
        "bits_per_byte": found.bits_per_byte,
        "speed": _speed_json(found.speed),
    }


def generation_json(found: Written) -> Json:
    """With every text."""
    return {
        "bleu": found.bleu,
        "bleu_signature": found.bleu_signature,
        "rouge1_f": found.rouge.one,
        "rouge2_f": found.rouge.two,
        "rougeL_f": found.rouge.longest,
        "new_tokens": found.new_tokens,
        "ended": found.ended,
        "texts": [
            {"prompt": pair.prompt, "references": list(pair.references), "text": text}
            for pair, text in zip(found.pairs, found.texts, strict=True)
        ],
        "speed": _speed_json(found.speed),
    }


def core_json(results: Sequence[TaskResult]) -> Json:
    """With every example's verdict."""
    return {
        "core": core(results),
        "shuffle_seed": SHUFFLE_SEED,
        "solved_examples_seed": f"{SHOTS_SEED} + the example's number",
        "tasks": [_task_json(each) for each in results],
    }


def whole(about: About, settings: Mapping[str, Any], parts: Mapping[str, Json]) -> Json:
    """Everything that goes into the file."""
    return {
        "settings": dict(settings),
        "version": own_version(),
        "machine": str(this_machine()),
        "subject": dataclasses.asdict(about),
        **parts,
    }


def save(found: Json, file: Path) -> None:
    """Raises OutputError."""
    try:
        file.write_text(json.dumps(_plain(found), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error


def _task_json(result: TaskResult) -> Json:
    task = result.task
    return {
        "label": task.label,
        "kind": task.kind,
        "shots": task.shots,
        "delimiter": task.delimiter,
        "baseline": task.baseline,
        "examples": len(result.verdicts),
        "right": result.right,
        "accuracy": result.accuracy,
        "standard_error": result.standard_error,
        "centered": result.centered,
        "verdicts": [dataclasses.asdict(each) for each in result.verdicts],
        "speed": _speed_json(result.speed),
    }


def _remark(result: TaskResult) -> str:
    """How many examples were cropped or did not fit; empty if none."""
    counts = {
        "longer than the context: cropped from the left": sum(
            each.cropped and each.fits for each in result.verdicts
        ),
        "do not fit the context: counted as wrong": sum(not e.fits for e in result.verdicts),
        "have a token across the answer's beginning": sum(e.moved for e in result.verdicts),
    }
    said = [f"{count} examples {what}" for what, count in counts.items() if count]
    return f"{result.task.label}: {'; '.join(said)}" if said else ""


def _speed_json(speed: Speed) -> Json:
    return dataclasses.asdict(speed) | {"tokens_per_second": speed.per_second}


def _rate(speed: Speed) -> str:
    return f"{speed.per_second:,.0f}"


def _plain(value: Any) -> Any:
    """JSON has no infinity: it becomes a text."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
