"""Report: README.md, made from the stored studies. Pure text; nothing is measured or decided here.

environment          what all studies share, once
studies              question, what was varied, what was held fixed, findings, tables, pictures, command
failures             of all studies, in one place
contents             what a report of a baseline must hold, with links to where it is
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tools.lab.phrasing import number
from tools.lab.questions import EXPECTATIONS
from tools.lab.study import STUDIES, Failure, Saved, Study, Table

MODEL = "model"


def render(saved: Sequence[Saved], failures: Sequence[Failure] = (), title: str = "Lab") -> str:
    """The whole file. `failures`: those outside any study."""
    parts = [f"# {title} report", introduction(saved)]
    here = next((each.place for each in saved if each.place), {})
    if here:
        parts += ["## Environment", _facts({**here, **environment(saved)})]
    for each in saved:
        parts += section(each, here)
    parts += ["## Failures", _failures(saved, failures)]
    parts += ["## Contents", *_checklist(saved)]
    return "\n\n".join(part for part in parts if part) + "\n"


def introduction(saved: Sequence[Saved]) -> str:
    """The links to the studies, and the commands of those that are missing."""
    links = [f"[{each.study.title}](#{slug(each.study.title)})" for each in saved]
    there = {each.study.name for each in saved}
    missing = [name for name in STUDIES if name not in there]
    lines = ["Made by `python main.py lab`, from the numbers of one machine. " + " · ".join(links)]
    if missing:
        wanted = ", ".join(f"`python main.py lab {name}`" for name in missing)
        lines.append(f"Not in this report yet: {wanted}.")
    return "\n\n".join(lines)


def environment(saved: Sequence[Saved]) -> dict[str, str]:
    """The model of each study, and the commits and dates of all."""
    facts: dict[str, str] = {}
    models: dict[str, list[str]] = {}
    measured = [each for each in saved if each.place]
    for each in measured:
        models.setdefault(each.study.fixed.get(MODEL, "see below"), []).append(each.study.name)
    facts["models"] = "; ".join(
        name if len(models) == 1 else f"{name} ({', '.join(users)})"
        for name, users in models.items()
    )
    for name in ("commit", "date"):
        values = list(dict.fromkeys(each.moment.get(name, "unknown") for each in measured))
        facts[name] = values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
    return facts


def section(saved: Saved, first: Mapping[str, str]) -> list[str]:
    """One study, with the differences of its environment from the first study's."""
    study, moment = saved.study, saved.moment
    parts = [f"## {study.title}", _opening(study), f"**Varied:** {study.varied}."]
    if study.fixed:
        fixed = "; ".join(f"{name} {value}" for name, value in study.fixed.items())
        parts.append(f"**Held fixed:** {fixed}.")
    if "--quick" in study.command.split():
        parts.append("**Quick run:** small numbers, to see that it works; not for conclusions.")
    others = [
        f"{name}: {value} (the first study: {first[name]})"
        for name, value in saved.place.items()
        if first.get(name, value) != value
    ]
    if others:
        parts.append(f"**Not the environment above:** {'; '.join(others)}.")
    parts.append(f"### {findings_title(study.title)}")
    parts.append("\n".join(f"* {finding}" for finding in study.findings) or "None.")
    for caption, text in study.quotations.items():
        parts += [f"{caption}:", "\n".join(f"> {line}".rstrip() for line in text.splitlines())]
    for picture in study.pictures:
        parts.append(f"![{picture.caption}]({picture.file})\n\n*{picture.caption}*")
    for table in study.tables:
        parts += [f"### {table.title}", markdown(table)]
    parts.append(again(study, moment))
    return parts


def _opening(study: Study) -> str:
    """The question, and what to expect; of a study that failed as a whole, that it did."""
    measured = study.findings or study.tables
    return f"*{study.question}* {EXPECTATIONS[study.name] if measured else ''}".rstrip()


def again(study: Study, moment: Mapping[str, str]) -> str:
    """How to repeat it, and where its raw numbers are."""
    facts = ", ".join(f"{name} {value}" for name, value in moment.items() if name != "command")
    took = f" (took {number(study.seconds)} s)" if study.seconds else ""
    measured = f" Measured: {facts}." if facts else ""
    return (
        f"Repeat it{took}:\n\n    {study.command}\n\n"
        f"Every measurement: [{study.name}.jsonl]({study.name}.jsonl).{measured}"
    )


def markdown(table: Table) -> str:
    """Columns after the first are aligned to the right."""
    rule = ["---", *["--:"] * (len(table.header) - 1)]
    lines = [table.header, rule, *table.rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _facts(facts: Mapping[str, str]) -> str:
    return markdown(Table("", ("what", "this run"), tuple(facts.items()))).replace("--:", "---")


def _failures(saved: Sequence[Saved], failures: Sequence[Failure]) -> str:
    lines = [f"* {_cell(each.what)}: {_cell(each.why)}" for each in failures]
    lines += [
        f"* {each.study.name}, {_cell(failure.what)}: {_cell(failure.why)}"
        for each in saved
        for failure in each.study.failures
    ]
    return "\n".join(lines) or "None."


def _checklist(saved: Sequence[Saved]) -> list[str]:
    lines = []
    for line in checklist(saved):
        mark = "x" if line.evidence else " "
        evidence = ", ".join(line.evidence) or "not in this report"
        lines.append(f"- [{mark}] {line.text}: {evidence}")
    return [
        "What a report of a baseline should hold, and where it is.",
        "\n".join(lines),
    ]


Studies = Mapping[str, Study]


@dataclass(frozen=True, slots=True)
class Line:
    """What a report must hold. `evidence` holds links into the report; empty means open."""

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
    """A link to the study's table with this word in its title, if it has rows."""

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


def _failure_count(studies: Studies) -> str:
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
    "S1.7": (_logs, _failure_count),
}


def slug(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = (c for c in title.lower() if c.isalnum() or c in "-_ ")
    return "".join(kept).replace(" ", "-")


def findings_title(title: str) -> str:
    """The heading of a study's findings, unique because the checklist links to it."""
    return f"{title}: findings"
