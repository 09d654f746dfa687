"""What hand-overs cost: figures of each, what they say together, and whether they can be true. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tools.lab.disagg_cells import number
from tools.lab.study import Table

WAYS = {
    "shm": "shared memory, in place",
    "pinned": "pinned pages (CPU form)",
    "frames": "frames over ipc",
}


@dataclass(frozen=True, slots=True)
class Handed:
    """One request's hand-over."""

    transport: str
    prompt: int  # tokens
    kv_bytes: int
    moved_bytes: int
    ms: float
    ttft_ms: float
    prefill_ms: float

    @property
    def gb_per_s(self) -> float | None:
        """None where nothing was moved."""
        return self.moved_bytes / self.ms / 1e6 if self.moved_bytes and self.ms else None


def too_fast(handed: Sequence[Handed], read_gb_s: float) -> list[str]:
    """Hand-overs that report more GB/s than the memory reads: their bytes or their time are wrong."""
    return [
        f"{each.transport} reports {each.gb_per_s:.1f} GB/s for {each.prompt} tokens, more than the "
        f"{read_gb_s:.1f} this machine's memory reads: its bytes or its time are wrong"
        for each in handed
        if each.gb_per_s is not None and each.gb_per_s > read_gb_s
    ]


def handover_table(handed: Sequence[Handed]) -> Table:
    """Medians, a line for each transport and length."""
    rows = []
    for (transport, prompt), its in grouped(handed).items():
        speeds = [each.gb_per_s for each in its if each.gb_per_s is not None]
        rows.append(
            (
                f"{WAYS[transport]}, {prompt:,} tokens",
                f"{its[0].kv_bytes / 1e6:.2f}",
                f"{its[0].moved_bytes / 1e6:.2f}",
                number(median(each.ms for each in its)),
                f"{number(min(each.ms for each in its))} .. {number(max(each.ms for each in its))}",
                number(median(speeds)) if speeds else "-",
                number(median(each.ttft_ms for each in its)),
            )
        )
    head = (
        "prompt",
        "KV, MB",
        "copied, MB",
        "hand-over, ms",
        "fastest .. slowest",
        "GB/s",
        "TTFT, ms",
    )
    return Table("Hand-over, by transport and prompt length", head, tuple(rows))


def handover_findings(handed: Sequence[Handed], read_gb_s: float) -> list[str]:
    """What the longest prompt costs by each transport, and whether the figures can be true."""
    if not handed:
        return ["No hand-over was measured."]
    longest = max(each.prompt for each in handed)
    parts = []
    for (transport, prompt), its in grouped(handed).items():
        if prompt != longest:
            continue
        speeds = [each.gb_per_s for each in its if each.gb_per_s is not None]
        how = f"{number(median(speeds))} GB/s" if speeds else "nothing copied"
        parts.append(f"{number(median(e.ms for e in its))} ms by {WAYS[transport]} ({how})")
    size = max(each.kv_bytes for each in handed if each.prompt == longest)
    said = [
        f"Handing over the KV of {longest:,} tokens ({size / 1e6:.1f} MB) takes {', '.join(parts)}; "
        "medians, as the writer measures it."
    ]
    wrong = too_fast(handed, read_gb_s)
    fastest = max((each.gb_per_s or 0.0 for each in handed), default=0.0)
    if wrong:
        said += wrong
    elif fastest:
        said.append(
            f"The fastest copy moved {number(fastest)} GB/s, below the {number(read_gb_s)} GB/s that "
            "this machine's memory reads, as it must be: bytes and time are of the same event."
        )
    return said


def grouped(handed: Sequence[Handed]) -> dict[tuple[str, int], list[Handed]]:
    """By transport and prompt length, in the order of measuring."""
    groups: dict[tuple[str, int], list[Handed]] = {}
    for each in handed:
        groups.setdefault((each.transport, each.prompt), []).append(each)
    return groups
