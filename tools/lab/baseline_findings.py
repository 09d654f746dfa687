"""Findings of the baseline, computed from its numbers. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tools.lab.phrasing import SAME, milliseconds, number, percent
from tools.lab.study import Table

STAGES = ("tokenize", "queue", "reserve", "prefill", "hand-over", "decode", "detokenize", "other")

BESIDE = "detokenize"
"""Overlaps decode, so it is in no sum."""


@dataclass(frozen=True, slots=True)
class Run:
    """One request: seconds of each stage by its name in STAGES. `total_s`: at the client."""

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
        """With hand-over. None if the prompt had nothing to prefill."""
        spent = self.stages["prefill"] + self.stages["hand-over"]
        return spent / self.filled if self.filled > 0 and spent > 0 else None

    @property
    def decode_token_s(self) -> float:
        return self.stages["decode"] / max(1, self.new_tokens)


@dataclass(frozen=True, slots=True)
class Share:
    """The share of this machine's limits that a stage reached; both measured in this run."""

    stage: str
    mfu: float
    mbu: float
    gflop_s: float
    gb_s: float


def stage_table(load_s: float, runs: Sequence[Run]) -> Table:
    """Medians and range over the repeats."""
    whole = median(run.total_s for run in runs)
    rows: list[tuple[str, ...]] = [
        ("load (until the workers are ready)", "1", _ms(load_s), "", "", "")
    ]
    for name in STAGES:
        values = [run.stages[name] for run in runs]
        share = percent(median(values) / whole) if whole else ""
        label = f"{name} (overlaps decode)" if name == BESIDE else name
        rows.append((label, str(len(runs)), *map(_ms, _spread(values)), share))
    totals = [run.total_s for run in runs]
    rows.append(("total, without load", str(len(runs)), *map(_ms, _spread(totals)), "100%"))
    header = ("stage", "runs", "median, ms", "least, ms", "most, ms", "of the total")
    return Table("Stages of one request", header, tuple(rows))


def share_table(shares: Sequence[Share]) -> Table:
    """MFU and MBU of each stage."""
    rows = tuple(
        (each.stage, number(each.gflop_s), percent(each.mfu), number(each.gb_s), percent(each.mbu))
        for each in shares
    )
    return Table(
        "Shares of this machine's limits", ("stage", "GFLOP/s", "MFU", "GB/s", "MBU"), rows
    )


def findings(runs: Sequence[Run], shares: Sequence[Share]) -> list[str]:
    """Prefill against decode, tokens/s, the largest stage, and the limit of each stage."""
    sentences = [slower(runs), speed(runs), largest(runs)]
    return [*filter(None, sentences), *map(bound, shares)]


def slower(runs: Sequence[Run]) -> str:
    """Whether prefill or decode is slower, per token and in total."""
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
        f"prefill and decode cost the same per token (within {percent(SAME)})"
        if ratio <= 1 + SAME
        else f"{name} is slower per token, {number(ratio)} times"
    )
    longer = "decode" if in_all[1] >= in_all[0] else "prefill"
    return (
        f"Of prefill and decode, {verdict}: prefill {milliseconds(prefill)} ({runs[0].filled} tokens "
        f"at once, hand-over included), decode {milliseconds(decode)} ({runs[0].new_tokens} tokens one "
        f"by one); {_basis(runs)}, threshold {percent(SAME)}. "
        f"In total, {longer} takes longer: prefill {milliseconds(in_all[0])}, decode "
        f"{milliseconds(in_all[1])}."
    )  # fmt: skip


def speed(runs: Sequence[Run]) -> str:
    """Tokens/s of decoding, and of the whole request."""
    decode = 1 / max(1e-9, median(run.decode_token_s for run in runs))
    whole = median(run.new_tokens / max(1e-9, run.total_s) for run in runs)
    first = median(run.ttft_s for run in runs)
    return (
        f"{number(decode)} tokens/s while decoding, {number(whole)} tokens/s over the whole request; "
        f"the first token comes after {milliseconds(first)}."
    )


def largest(runs: Sequence[Run]) -> str:
    """The stage that takes most of the time."""
    spent = {name: median(run.stages[name] for run in runs) for name in STAGES}
    whole = median(run.total_s for run in runs)
    name = max(spent, key=lambda each: spent[each])
    return f"Most of a request's time is {name}: {percent(spent[name] / whole)} of {milliseconds(whole)}."


def bound(share: Share) -> str:
    """Whether memory or arithmetic bounds the stage: the limit it is nearer to."""
    near, far = ("memory", "arithmetic") if share.mbu >= share.mfu else ("arithmetic", "memory")
    high, low = max(share.mbu, share.mfu), min(share.mbu, share.mfu)
    rest = ""
    if high > 1:
        rest = (
            " Above 100%: part of the weights came from the CPU caches, or the machine was slower when "
            "its limit was measured."
        )
    elif high < 0.5:
        rest = (
            " Below half of both limits: with a model and a batch this small, the work around the "
            "forward dominates."
        )
    return (
        f"{share.stage.capitalize()} is nearer to the limit of {near}: {percent(high)} of it, "
        f"{percent(low)} of that of {far}.{rest}"
    )


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return median(values), min(values), max(values)


def _ms(seconds: float) -> str:
    return number(1e3 * seconds)


def _basis(runs: Sequence[Run]) -> str:
    """What the comparison rests on."""
    requests = f"{len(runs)} requests" if len(runs) != 1 else "1 request"
    return f"medians of {requests}, {sum(run.new_tokens for run in runs)} decoded tokens"
