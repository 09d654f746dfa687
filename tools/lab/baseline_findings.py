"""What the baseline says, computed from its numbers. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tools.lab.phrasing import SAME, milliseconds
from tools.lab.study import Table

STAGES = ("tokenize", "queue", "reserve", "prefill", "hand-over", "decode", "detokenize", "other")

BESIDE = "detokenize"
"""Its time is part of decode's, and of no sum."""


@dataclass(frozen=True, slots=True)
class Run:
    """One request: seconds of each stage by its name in STAGES. `total_s`: as the client saw it."""

    stages: Mapping[str, float]
    total_s: float
    ttft_s: float
    prompt_tokens: int
    new_tokens: int

    @property
    def filled(self) -> int:
        """Tokens that prefill computes: the last one of the prompt is decode's first step."""
        return self.prompt_tokens - 1

    @property
    def prefill_token_s(self) -> float | None:
        """Hand-over included; None where nothing was left to prefill."""
        spent = self.stages["prefill"] + self.stages["hand-over"]
        return spent / self.filled if self.filled > 0 and spent > 0 else None

    @property
    def decode_token_s(self) -> float:
        return self.stages["decode"] / max(1, self.new_tokens)


@dataclass(frozen=True, slots=True)
class Share:
    """What a stage reached of this machine's limits, both measured in this run."""

    stage: str
    mfu: float
    mbu: float
    gflop_s: float
    gb_s: float


def stage_table(load_s: float, runs: Sequence[Run]) -> Table:
    """Medians over the repeats, and how far they lie apart."""
    whole = median(run.total_s for run in runs)
    rows: list[tuple[str, ...]] = [
        ("load (until the workers are ready)", "1", _ms(load_s), "", "", "")
    ]
    for name in STAGES:
        values = [run.stages[name] for run in runs]
        share = f"{median(values) / whole:.1%}" if whole else ""
        label = f"{name} (while decode goes on)" if name == BESIDE else name
        rows.append((label, str(len(runs)), *map(_ms, _spread(values)), share))
    totals = [run.total_s for run in runs]
    rows.append(("total, without load", str(len(runs)), *map(_ms, _spread(totals)), "100.0%"))
    header = ("stage", "runs", "median, ms", "least, ms", "most, ms", "of the total")
    return Table("Stages of one request", header, tuple(rows))


def share_table(shares: Sequence[Share]) -> Table:
    """MFU and MBU."""
    rows = tuple(
        (each.stage, f"{each.gflop_s:,.0f}", f"{each.mfu:.0%}", f"{each.gb_s:.1f}", f"{each.mbu:.0%}")
        for each in shares
    )  # fmt: skip
    return Table(
        "Shares of this machine's limits", ("stage", "GFLOP/s", "MFU", "GB/s", "MBU"), rows
    )


def findings(runs: Sequence[Run], shares: Sequence[Share]) -> list[str]:
    """Which of prefill and decode is slower, tokens/s, where the time goes, what bounds it."""
    said = [slower(runs), speed(runs), largest(runs)]
    return [*filter(None, said), *map(bound, shares)]


def slower(runs: Sequence[Run]) -> str:
    """For a token and in all."""
    decode = median(run.decode_token_s for run in runs)
    fills = [run.prefill_token_s for run in runs if run.prefill_token_s is not None]
    if not fills:
        return (
            f"Decode takes {milliseconds(decode)} a token; there was no prefill to compare it with."
        )
    prefill = median(fills)
    in_all = [
        median(run.stages[name] + run.stages.get(with_, 0.0) for run in runs)
        for name, with_ in (("prefill", "hand-over"), ("decode", ""))
    ]
    name, ratio = (
        ("decode", decode / prefill) if decode >= prefill else ("prefill", prefill / decode)
    )
    verdict = (
        f"prefill and decode cost the same for a token (within {SAME:.0%})"
        if ratio <= 1 + SAME
        else f"{name} is slower for a token, {ratio:.1f} times"
    )
    longer = "decode" if in_all[1] >= in_all[0] else "prefill"
    return (
        f"Of prefill and decode, {verdict}: prefill {milliseconds(prefill)} ({runs[0].filled} tokens "
        f"at once, hand-over included), decode {milliseconds(decode)} ({runs[0].new_tokens} tokens one "
        f"by one). In all, {longer} takes longer: prefill {milliseconds(in_all[0])}, decode "
        f"{milliseconds(in_all[1])}."
    )  # fmt: skip


def speed(runs: Sequence[Run]) -> str:
    """Tokens a second, while decoding and with everything before it."""
    decode = 1 / max(1e-9, median(run.decode_token_s for run in runs))
    whole = median(run.new_tokens / max(1e-9, run.total_s) for run in runs)
    first = median(run.ttft_s for run in runs)
    return (
        f"{decode:,.1f} tokens/s while decoding, {whole:,.1f} tokens/s of the whole request; the first "
        f"token comes after {milliseconds(first)}."
    )


def largest(runs: Sequence[Run]) -> str:
    """The stage that most of the time goes into."""
    spent = {name: median(run.stages[name] for run in runs) for name in STAGES}
    whole = median(run.total_s for run in runs)
    name = max(spent, key=lambda each: spent[each])
    return (
        f"Most of a request's time is {name}: {spent[name] / whole:.0%} of {milliseconds(whole)}."
    )


def bound(share: Share) -> str:
    """By memory or by arithmetic: the limit that it is nearer to."""
    near, far = ("memory", "arithmetic") if share.mbu >= share.mfu else ("arithmetic", "memory")
    high, low = max(share.mbu, share.mfu), min(share.mbu, share.mfu)
    rest = ""
    if high > 1:
        rest = (
            " More than all of it: weights partly come from the cores' caches, or the machine was "
            "slower when its limit was taken."
        )
    elif high < 0.5:
        rest = (
            " Less than half of either: for a model and a batch this small, what is done around the "
            "forward counts."
        )
    return (
        f"{share.stage.capitalize()} is nearer to the limit of {near}: {high:.0%} of it, {low:.0%} of "
        f"that of {far}.{rest}"
    )


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return median(values), min(values), max(values)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"
