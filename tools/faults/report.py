"""Report: the results as docs/faults.md and as the marked table of the README."""

import json
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tools.faults.battery import UNJUDGED, Result, p50
from tools.faults.service import ROOT

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HEAD = (
    "| fault | times injected | requests | lost | wrong tokens | next token, p50 / max | "
    "whole again, p50 / max | blocks leaked |"
)
RULE = "|---|---:|---:|---:|---:|---:|---:|---:|"
DYNAMO = (
    "NVIDIA Dynamo publishes for the same shape (8 clients, 100 requests each): a decode worker of four "
    "killed, 4 of 800 requests failed; the only decode worker killed, 280 of 800; 38 to 45 s to recover."
)
ABOUT = """\
Written by `make faults` (`tools/faults`); do not edit. Real processes, clients that keep a ledger of
every chunk, and a check against fault-free answers. A request is *lost* if it ends in anything but its
full answer, unless the row says what else is right. An answer is *wrong* if one character, the
finish_reason or the number of tokens differs from the fault-free one.""".splitlines()
COLUMNS = """\
*Next token*: the longest silence of all streams together between the fault and the recovery. *Whole
again*: until /readyz reports every worker of before, with new processes in the places of dead ones.
Times have bars where the notes name one. A missed one fails the row where the machine belonged to the
battery; where others used it meanwhile, or with `--lenient-times`, it is a note in capitals.
""".splitlines()
NOT_COVERED = """\
Not covered: F18 (a full /dev/shm: the KV pool is a memfd and needs no /dev/shm),
F19 (a clock that jumps: nothing waits by the calendar, which a test reads off the code), F23 (needs a
GPU), flipped bytes on the KV link between hosts (seals do not open, see
tests/torch/test_transfer_sealing.py; F7 flips bytes inside the process instead). L7 idles for half
an hour with `--only L7 --idle 1800`.
""".splitlines()


@dataclass(frozen=True, slots=True)
class About:
    """How a battery was run."""

    seed: int
    scale: float
    commit: str
    machine: str
    began: str
    seconds: float
    command: str


def about(
    *, seed: int, scale: float, seconds: float, only: Sequence[str], command: str = ""
) -> About:
    """This machine, this commit. `command`: by default that of the battery."""
    command = command or f"python -m tools.faults --seed {seed} --scale {scale:g}"
    command += "".join(f" --only {each}" for each in only)
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time.time() - seconds))
    return About(seed, scale, _commit(), _machine(), began, seconds, command)


def _commit() -> str:
    def git(*words: str) -> str:
        ran = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
        )
        return ran.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def _machine() -> str:
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(": ")[2]
            break
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {model or platform.machine()}, Linux {platform.release()}"


def _times(values: Sequence[float]) -> str:
    return f"{p50(values):.1f} / {max(values):.1f} s" if values else "-"


def row(result: Result, *, named: bool = False) -> str:
    """One line of a table. `named`: with the row's name, and whether it passed."""
    cells = [
        result.fault, f"{result.injected:,}", f"{result.requests:,}", str(result.lost),
        str(result.wrong), _times(result.token_s), _times(result.whole_s), str(result.leaked),
    ]  # fmt: skip
    if named:
        cells = [result.row, *cells, "pass" if result.passed else "**FAIL**"]
    return f"| {' | '.join(cells)} |"


def table(results: Sequence[Result]) -> str:
    """The README's table: rows in which faults were injected into a service with clients."""
    return "\n".join([HEAD, RULE, *(row(each) for each in results if each.in_table)])


def document(results: Sequence[Result], how: About) -> str:
    """docs/faults.md."""
    failed = [each for each in results if not each.passed]
    head = HEAD.removeprefix("| ")
    lines = [
        "# Faults injected, and what came of them",
        "",
        *ABOUT,
        "",
        f"* machine: {how.machine}",
        f"* commit: {how.commit}",
        f"* run: {how.began}, {how.seconds / 60:.0f} minutes, seed {how.seed}, scale {how.scale:g}",
        f"* replay: `{how.command}`; one row: `--only F2`; smaller: `--scale 0.1`",
        f"* result: {len(results) - len(failed)} of {len(results)} rows passed",
        *_resumed(results),
        *_unjudged(results),
        "",
        f"| row | {head} passed |",
        f"|---{RULE}---|",
        *(row(each, named=True) for each in results),
        "",
        *COLUMNS,
        DYNAMO,
        "",
        *NOT_COVERED,
        "",
        "## Notes",
        "",
    ]
    for each in results:
        outcomes = ", ".join(f"{count} {name}" for name, count in each.outcomes.most_common())
        lines.append(f"* **{each.row}** ({each.seconds:.0f} s): {outcomes or each.fault}")
        lines += [f"  * {note}" for note in each.notes]
        lines += [f"  * **fails**: {_one_line(problem)}" for problem in each.problems]
    return "\n".join(lines) + "\n"


def _resumed(results: Sequence[Result]) -> list[str]:
    """The rows of earlier calls, by commit and time."""
    calls = dict.fromkeys(each.ran for each in results if each.ran)
    return [
        f"* {', '.join(each.row for each in results if each.ran == call)}: {call}" for call in calls
    ]


def _unjudged(results: Sequence[Result]) -> list[str]:
    """The rows whose missed time bars were not judged, if there are any."""
    rows = [each.row for each in results if any(n.startswith(UNJUDGED) for n in each.notes)]
    if not rows:
        return []
    return [f"* **not judged**: times of {', '.join(rows)} missed a bar; the notes say why"]


def soaked(result: Result, lines: Sequence[str], how: About) -> str:
    """docs/soak.md."""
    return "\n".join(
        [
            "# A soak: load and a random fault a minute",
            "",
            "Written by `python -m tools.faults soak`; do not edit. The columns: [faults.md](faults.md).",
            "",
            f"* machine: {how.machine}",
            f"* commit: {how.commit}",
            f"* run: {how.began}, {how.seconds / 60:.0f} minutes, seed {how.seed}: `{how.command}`",
            f"* result: {'passed' if result.passed else 'failed'}",
            *(f"  * **fails**: {_one_line(each)}" for each in result.problems),
            "",
            HEAD,
            RULE,
            row(result),
            "",
            f"* outcomes: {', '.join(f'{n} {what}' for what, n in result.outcomes.most_common())}",
            *lines,
            "",
        ]
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:600].replace("<", "&lt;").replace("`", "'")


def marked(text: str, block: str) -> str:
    """`text` with the part between the marks replaced. Raises ValueError if they are not there."""
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"no {BEGIN} ... {END} in the text")
    return f"{text[:begin]}{BEGIN}\n{block}\n{text[end:]}"


def write(results: Sequence[Result], how: About, *, root: Path = ROOT) -> None:
    """docs/faults.md and the README's table."""
    (root / "docs" / "faults.md").write_text(document(results, how), encoding="utf-8")
    readme = root / "README.md"
    block = "\n".join(
        [
            "",
            table(results),
            "",
            f"{how.machine}; commit {how.commit}; seed {how.seed}; `make faults`, {how.began}. {DYNAMO}",
            "",
        ]
    )
    readme.write_text(marked(readme.read_text(encoding="utf-8"), block), encoding="utf-8")


def as_json(results: Sequence[Result], how: About) -> str:
    """For programs: one object."""
    rows = [
        {field.name: getattr(each, field.name) for field in fields(each)} | {"passed": each.passed}
        for each in results
    ]
    return json.dumps({**asdict(how), "rows": rows}, indent=1)


def passed_before(text: str, how: About, called: Callable[[str], str]) -> list[Result]:
    """The rows that passed, with all their parts, of what as_json() wrote. ValueError if they were run in
    another way. `called`: the row that a part belongs to."""
    found = json.loads(text)
    for name in ("seed", "scale", "machine"):
        if found[name] != getattr(how, name):
            raise ValueError(f"it has {name} {found[name]}, not {getattr(how, name)}")
    again = {called(each["row"]) for each in found["rows"] if not each["passed"]}
    results = []
    for each in found["rows"]:
        if called(each["row"]) not in again:
            del each["passed"]
            each["outcomes"] = Counter(each["outcomes"])
            each["ran"] = each["ran"] or f"commit {found['commit']}, {found['began']}"
            results.append(Result(**each))
    return results
