"""Check: is a ledger what the promise says? And is a service what it was before?

Every id has exactly one outcome. A complete answer equals the fault-free one: text, finish_reason and
completion_tokens. What came of an incomplete one is the beginning of the fault-free one. No answer ends
without a finish_reason or an error. Afterwards no block is held and nothing is left over.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from tools.faults.ledger import Event, Record, records

MORE_FDS = 4  # sockets that are just being closed, a log that was opened again
IMPORTED_MIB = 300.0  # what a spare process may import after the first census; it does nothing else
MORE_MEMORY, MORE_MIB = 0.05, 24.0  # the larger of both


@dataclass(frozen=True, slots=True)
class Answer:
    """The fault-free answer to one case."""

    text: str
    finish: str
    tokens: int


@dataclass(slots=True)
class Verdict:
    """`lost` and `wrong` name ids with the reason; `outcomes` counts what became of all."""

    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        found = []
        for name, which in (("lost", self.lost), ("wrong", self.wrong)):
            if which:
                more = f" and {len(which) - 5} more" if len(which) > 5 else ""
                found.append(f"{len(which)} {name}: {'; '.join(which[:5])}{more}")
        return found


def outcome(record: Record) -> str:
    """What became of a request: ok, left, `error CODE`; broken: cut after its status; unanswered: cut
    or refused before; or a word in capitals, which the promise forbids."""
    if not record.sent:
        return "NEVER SENT"
    if len(record.sent) > 1:
        return "SENT TWICE"
    if not record.ends:
        return "NO END"
    if len(record.ends) > 1 or len(record.finishes) > 1 or record.after_end:
        return "TWO OUTCOMES"
    end = record.ends[0]
    match end.how:
        case "error":
            return "TWO OUTCOMES" if record.finishes else f"error {end.code or end.status}"
        case "hang":
            return "HANG"
        case "broken":
            return "broken" if end.status or record.chunks else "unanswered"
        case "left":
            return "left"
    if not record.finishes:
        return "SILENT END"
    return "ok" if end.how == "done" else "NO DONE"


def check(
    events: Iterable[Event],
    reference: Mapping[int, Answer],
    expected: Collection[str],
    *,
    accepted: Collection[str] = (),
) -> Verdict:
    """`expected`: ids that must be in the ledger. `accepted`: outcomes beside ok that this row allows,
    such as `left`; then the text must still be the beginning of the fault-free one."""
    found = records(events)
    verdict = Verdict(len(set(expected) | set(found)))
    for missing in sorted(set(expected) - set(found)):
        verdict.outcomes["MISSING"] += 1
        verdict.lost.append(f"{missing}: not in the ledger")
    for record in found.values():
        became = outcome(record)
        verdict.outcomes[became] += 1
        if became != "ok" and became not in accepted:
            verdict.lost.append(f"{record.id}: {became}")
        if record.sent and (why := _difference(record, reference, whole=became == "ok")):
            verdict.wrong.append(f"{record.id}: {why}")
    return verdict


def _difference(record: Record, reference: Mapping[int, Answer], *, whole: bool) -> str:
    """How an answer differs from the fault-free one; empty if it does not."""
    right = reference.get(record.sent[0].case)
    if right is None:
        return f"case {record.sent[0].case} has no fault-free answer"
    text = record.text
    if not whole:
        return "" if right.text.startswith(text) else f"not the beginning of it: {_at(text, right)}"
    if text != right.text:
        return _at(text, right)
    if record.finishes != [right.finish]:
        return f"finish_reason {record.finishes}, not {right.finish}"
    tokens = record.ends[0].tokens
    return "" if tokens == right.tokens else f"completion_tokens {tokens}, not {right.tokens}"


def _at(text: str, right: Answer) -> str:
    pairs = zip(text, right.text, strict=False)
    where = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(right.text)))
    return (
        f"from character {where}: {text[where : where + 20]!r}, "
        f"not {right.text[where : where + 20]!r}"
    )


def answers(events: Iterable[Event]) -> dict[int, Answer]:
    """The answers of a fault-free run. Raises ValueError if one is not complete, or if two answers to one
    case differ."""
    found: dict[int, Answer] = {}
    for record in records(events).values():
        if (became := outcome(record)) != "ok":
            raise ValueError(f"the fault-free run is not fault-free: {record.id}: {became}")
        tokens = record.ends[0].tokens
        if tokens is None:
            raise ValueError(f"{record.id}: the answer has no usage")
        answer = Answer(record.text, record.finishes[0], tokens)
        if found.setdefault(record.sent[0].case, answer) != answer:
            raise ValueError(
                f"{record.id}: a second answer to case {record.sent[0].case}, another one"
            )
    return found


# ---- the service


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a service."""

    pid: int
    fds: int
    memory_mib: float  # its own, without what it maps


@dataclass(frozen=True, slots=True)
class Census:
    """What a service holds."""

    processes: Mapping[str, Process]
    shared_memory: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()  # of its run folder
    leased: int = 0
    quarantined: int = 0
    running: int = 0
    waiting: int = 0


def compare(before: Census, after: Census, *, pool_mib: float = 0.0) -> list[str]:
    """What `after` has too much or too little. Memory is compared for the processes that are the same; a
    decode worker's may grow by its private pool, whose pages are first used at some point."""
    found = []
    if set(before.processes) != set(after.processes):
        found.append(f"processes {sorted(after.processes)}, before {sorted(before.processes)}")
    for name in sorted(set(before.processes) & set(after.processes)):
        was, now = before.processes[name], after.processes[name]
        if now.fds > was.fds + MORE_FDS:
            found.append(f"{name} has {now.fds} file descriptors, before {was.fds}")
        more = now.memory_mib - was.memory_mib
        allowed = max(MORE_MIB, MORE_MEMORY * was.memory_mib)
        allowed += pool_mib if name.startswith("decode") else 0.0
        allowed += IMPORTED_MIB if name == "standby" else 0.0
        if now.pid == was.pid and more > allowed:
            found.append(f"{name} has {now.memory_mib:.0f} MiB, before {was.memory_mib:.0f}")
    for what, had, has in (
        ("/dev/shm", before.shared_memory, after.shared_memory),
        ("the run folder", before.files, after.files),
    ):
        if has - had:
            found.append(f"left over in {what}: {', '.join(sorted(has - had)[:5])}")
    for what in ("leased", "quarantined", "running", "waiting"):
        if number := getattr(after, what):
            unit = "KV blocks" if what in ("leased", "quarantined") else "requests"
            found.append(f"{number} {unit} still {what}")
    return found
