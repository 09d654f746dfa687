"""Checklist: the seed document's requirements S1.1 to S1.7, and where this report shows them met.

Each line looks into the report's own data: without the evidence it stays open. Pure.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tools.lab.store import Saved
from tools.lab.study import Study

Studies = Mapping[str, Study]


@dataclass(frozen=True, slots=True)
class Line:
    """One requirement; `evidence` are links into the report, empty while it is open."""

    id: str
    text: str
    evidence: tuple[str, ...]


def checklist(saved: Sequence[Saved]) -> list[Line]:
    """All seven, in order."""
    studies = {each.study.name: each.study for each in saved}
    lines = [Line("S1.1", TEXTS["S1.1"], ("[environment](#environment)",) if saved else ())]
    for name, looks in LOOKS.items():
        found = [look(studies) for look in looks]
        lines.append(Line(name, TEXTS[name], tuple(found) if all(found) else ()))
    return lines


def _table(study: str, word: str) -> Callable[[Studies], str]:
    """A table of this study with numbers, whose title has this word."""

    def look(studies: Studies) -> str:
        tables = studies[study].tables if study in studies else ()
        found = next((t for t in tables if word in t.title.lower() and t.rows), None)
        return f"[{found.title}](#{slug(found.title)})" if found else ""

    return look


def _pictures(study: str) -> Callable[[Studies], str]:
    def look(studies: Studies) -> str:
        found = studies[study].pictures if study in studies else ()
        return ", ".join(f"[{each.file}]({each.file})" for each in found)

    return look


def _findings(study: str) -> Callable[[Studies], str]:
    def look(studies: Studies) -> str:
        there = study in studies and studies[study].findings
        return f"[findings](#{slug(findings_title(studies[study].title))})" if there else ""

    return look


def _quoted(studies: Studies) -> str:
    there = "baseline" in studies and studies["baseline"].quotations
    return f"[the text](#{slug(studies['baseline'].title)})" if there else ""


def _logs(studies: Studies) -> str:
    return ", ".join(f"[{name}.jsonl]({name}.jsonl)" for name in studies)


def _failures(studies: Studies) -> str:
    count = sum(len(study.failures) for study in studies.values())
    return f"[failures: {count}](#failures)" if studies else ""


TEXTS = {
    "S1.1": "the environment before a run: CPU or GPU, memory, device and dtype chosen, model",
    "S1.2": "named stage timers on a monotonic clock, a table of them at the end",
    "S1.3": "one prompt, 50 tokens, greedy: the text, prefill against decode, tokens/s",
    "S1.4": "a batcher with a fixed window; queueing, execution and total latency of each request",
    "S1.5": "batch sizes and windows: average, P95, throughput, utilisation, what was given for what",
    "S1.6": "with and without the KV cache over prompt lengths: times, memory, plots, conclusions",
    "S1.7": "a report with tables, plots and conclusions, structured logs beside it, failures too",
}
LOOKS: Mapping[str, tuple[Callable[[Studies], str], ...]] = {
    "S1.2": (_table("baseline", "stages"),),
    "S1.3": (_quoted, _findings("baseline")),
    "S1.4": (_table("batching", "each request"),),
    "S1.5": (
        *(_table("batching", "batch size,"), _table("batching", "window,")),
        *(_table("batching", "utilisation"), _pictures("batching"), _findings("batching")),
    ),
    "S1.6": (
        *(_table("kv-cache", "with and without"), _table("kv-cache", "memory")),
        *(_pictures("kv-cache"), _findings("kv-cache")),
    ),
    "S1.7": (_logs, _failures),
}


def slug(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = (c for c in title.lower() if c.isalnum() or c in "-_ ")
    return "".join(kept).replace(" ", "-")


def findings_title(title: str) -> str:
    """The heading of a study's findings: unlike those of the others, for it is linked to."""
    return f"{title}: findings"
