"""Hand-over cost against prompt length, by every transport that runs here: real requests through a
cluster that has no other way (`kv_transport`), one at a time.

Bytes and time are of one event, the writer's receipt: from the first push of a request's blocks until
they are all on their way and sealed. So GB/s may be compared with what this machine's memory reads,
and must stay below it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch

from baton.errors import BatonError
from lab.disagg_cells import number
from lab.disagg_plan import PREFILL_TOKENS, TRANSPORTS, Plan
from lab.study import Notebook, Table
from measure.limits import BUFFER, best
from measure.slo import Trace
from measure.split import Split, options_for, running
from measure.workload import single

NEW_TOKENS = 2
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


def measure_handover(plan: Plan, notebook: Notebook) -> list[Handed]:
    """Every transport, every length, several times."""
    lengths = []
    for length in plan.lengths:
        if 2 <= length <= plan.context - NEW_TOKENS:
            lengths.append(length)
        else:
            why = f"{plan.model} takes prompts of 2 to {plan.context - NEW_TOKENS} tokens here"
            notebook.failed(f"hand-over of {length} tokens", why)
    found: list[Handed] = []
    for transport in TRANSPORTS if lengths else ():
        notebook.say(f"hand-over by {transport}")
        try:
            found += _by(transport, lengths, plan, notebook)
        except (BatonError, OSError) as error:
            notebook.failed(f"hand-over by {transport}", error)
    return found


def _by(transport: str, lengths: Sequence[int], plan: Plan, notebook: Notebook) -> list[Handed]:
    split = Split(transport, False, PREFILL_TOKENS)
    options = options_for(split, model=plan.model, dtype=plan.dtype, streams=4)
    found = []
    with running(split, replace(options, kv_transport=transport)) as arm:
        arm.drive(single(lengths[0], NEW_TOKENS, plan.seed))  # not counted
        for length in lengths:
            for number_ in range(plan.repeats):
                (trace,) = arm.drive(single(length, NEW_TOKENS, 100 * plan.seed + number_))
                handed = _handed(transport, trace)
                notebook.record("handover", **asdict(handed))
                found.append(handed)
    return found


def _handed(transport: str, trace: Trace) -> Handed:
    timings = trace.timings
    if not timings.prefill_s:
        raise BatonError(f"a prompt of {trace.prompt_tokens} tokens was not filled by prefill")
    return Handed(
        transport,
        trace.prompt_tokens,
        timings.kv_bytes,
        timings.moved_bytes,
        1e3 * timings.handover_s,
        1e3 * trace.ttft,
        1e3 * timings.prefill_s,
    )


def memory_read_gb_s() -> float:
    """By all of torch's threads, as measure.limits takes it."""
    buffer = torch.ones(BUFFER // 8, dtype=torch.int64)
    return BUFFER / best(buffer.sum) / 1e9


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
