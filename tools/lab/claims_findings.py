"""Claims that are commonly made, what is measured for each, and the verdict. Pure.

    beaten            the median of the ratios reaches the claim's upper end
    reproduced        it reaches the lower end
    not reproduced    it does not
    no verdict        fewer than FEWEST timed answers, first tokens or steps on a side

A claim of one number N is the range from 5 % below N to 5 % above. A claim of an improvement without a
number needs 5 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from statistics import median

from tools.lab.phrasing import gigabytes, number, percent, spread
from tools.lab.shares import FEWEST, Share
from tools.lab.study import Table

NEAR = 0.05


class Verdict(StrEnum):
    """The outcome of a claim."""

    BEATEN = "beaten"
    REPRODUCED = "reproduced"
    NOT = "not reproduced"
    FEW = "no verdict"
    UNMEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Claim:
    """An improvement of `low` to `high` times. `high` is infinite if no number is claimed."""

    key: str
    title: str
    claimed: str
    low: float
    high: float

    @classmethod
    def of(cls, key: str, title: str, claimed: str, times: float) -> "Claim":
        """A claim of one number."""
        return cls(key, title, claimed, times * (1 - NEAR), times * (1 + NEAR))

    @classmethod
    def any_gain(cls, key: str, title: str, claimed: str) -> "Claim":
        """A claim of an improvement without a number."""
        return cls(key, title, claimed, 1 + NEAR, inf)


HALF = "halves latency (2 times)"
CLAIMS = (
    Claim("kv-cache", "KV cache", "2 to 4 times faster", 2.0, 4.0),
    Claim.of("half", "half precision", "halves memory (2 times)", 2.0),
    Claim.of("int8", "INT8", "a third of the memory (3 times)", 3.0),
    Claim.of("compiled", "compiled program (ours)", "1.2 times faster", 1.2),
    Claim.of("torch.compile", "torch.compile", "1.2 times faster", 1.2),
    Claim.of("speculation, repetitive", "speculation, repetitive text", HALF, 2.0),
    Claim.of("speculation, ordinary", "speculation, ordinary text", HALF, 2.0),
    Claim.any_gain("batching", "batching", "more tokens/s (no number)"),
    Claim.any_gain("prefix", "prefix cache", "earlier first token (no number)"),
)


@dataclass(frozen=True, slots=True)
class Result:
    """The measurement for a claim. `ratios`: how many times better, round by round. `before`
    and `after` are medians of the two sides, in `unit`."""

    key: str
    ratios: tuple[float, ...]
    before: float
    after: float
    unit: str
    definition: str
    beside: str = ""  # a sentence on further observations
    samples: int | None = None  # timed answers, first tokens or steps of a side; None: bytes, exact

    @property
    def ratio(self) -> float:
        """The median."""
        return median(self.ratios)


def verdict(claim: Claim, result: Result | None) -> Verdict:
    """The outcome, by the rule above."""
    if result is None or not result.ratios:
        return Verdict.UNMEASURED
    if result.samples is not None and result.samples < FEWEST:
        return Verdict.FEW
    if result.ratio >= claim.high:
        return Verdict.BEATEN
    return Verdict.REPRODUCED if result.ratio >= claim.low else Verdict.NOT


def by_rounds(key: str, rounds: Sequence[tuple[float, float]], unit: str, definition: str,
              beside: str = "", *, samples: int, more_is_better: bool = False) -> Result:  # fmt: skip
    """A Result from pairs (before, after) of the same round."""
    ratios = [after / before if more_is_better else before / after for before, after in rounds]
    befores, afters = zip(*rounds, strict=True)
    return Result(key, tuple(ratios), median(befores), median(afters), unit, definition, beside,
                  samples)  # fmt: skip


def claims_table(results: Mapping[str, Result]) -> Table:
    """A line for every claim, measured or not."""
    rows = []
    for claim in CLAIMS:
        result = results.get(claim.key)
        rows.append(
            (
                claim.title,
                claim.claimed,
                *(_numbers(result) if result else ("-", "-", "-", "-")),
                str(verdict(claim, result)),
                result.definition if result else "",
            )
        )
    head = (
        "claim",
        "claimed",
        "before",
        "after",
        "times",
        "rests on",
        "verdict",
        "what was measured",
    )
    return Table("Claims, measured here", head, tuple(rows))


def _numbers(result: Result) -> tuple[str, str, str, str]:
    unit = f" {result.unit}"
    return (
        number(result.before) + unit,
        number(result.after) + unit,
        spread(result.ratios),
        _basis(result),
    )


def _basis(result: Result) -> str:
    if result.samples is None:
        return "a count, exact"
    return f"{result.samples} in {len(result.ratios)} rounds"


def findings(results: Mapping[str, Result]) -> list[str]:
    """How many claims hold, which do not, where something is slower, and further observations."""
    found = {claim.key: verdict(claim, results.get(claim.key)) for claim in CLAIMS}
    measured = [claim for claim in CLAIMS if found[claim.key] is not Verdict.UNMEASURED]
    if not measured:
        return ["No claim could be measured."]
    counts = []
    for each in (Verdict.BEATEN, Verdict.REPRODUCED, Verdict.NOT, Verdict.FEW):
        its = [
            f"{claim.title} ({number(results[claim.key].ratio)} times; {claim.claimed})"
            for claim in measured
            if found[claim.key] is each
        ]
        counts.append(f"{len(its)} {each}" + (f": {', '.join(its)}" if its else ""))
    sentences = [
        f"Of {len(measured)} claims measured here {'; '.join(counts)}. Medians of the rounds' ratios; a "
        f"single number counts as reproduced within {percent(NEAR)} and as beaten above that."
    ]
    sentences += [
        _open(claim, results[claim.key]) for claim in measured if found[claim.key] is Verdict.FEW
    ]
    losing = [
        claim
        for claim in measured
        if results[claim.key].ratio < 1 - NEAR and found[claim.key] is not Verdict.FEW
    ]
    for claim in losing:
        worse = results[claim.key].ratio
        sentences.append(f"{claim.title} is worse than without here: {number(worse)} times.")
    if missing := [claim.title for claim in CLAIMS if found[claim.key] is Verdict.UNMEASURED]:
        sentences.append(f"Not measured: {', '.join(missing)}.")
    return sentences + [
        f"{claim.title}: {results[claim.key].beside}"
        for claim in measured
        if results[claim.key].beside
    ]


def _open(claim: Claim, result: Result) -> str:
    """What is known of a claim that gets no verdict."""
    better = Share(sum(each > 1 for each in result.ratios), len(result.ratios))
    return (
        f"{claim.title}: no verdict, as {result.samples} timed on a side are fewer than {FEWEST}; "
        f"{number(result.ratio)} times, better in {better} rounds."
    )


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of a model in one dtype. `rss_bytes` is None if it could not be read."""

    dtype: str
    weights: int
    kv: int  # of one sequence as long as the context
    tokens: int
    rss_bytes: int | None

    @property
    def bytes(self) -> int:
        """Weights and KV."""
        return self.weights + self.kv


def memory_result(key: str, full: Held, less: Held) -> Result:
    """How many times smaller `less` is."""
    definition = (
        f"weights + KV of one sequence of {full.tokens:,} tokens, "
        f"{full.dtype} to {less.dtype}; exact"
    )
    parts = (
        f"weights {gigabytes(full.weights)} to {gigabytes(less.weights)} "
        f"({number(full.weights / less.weights)} times), KV {gigabytes(full.kv)} to {gigabytes(less.kv)} "
        f"({number(full.kv / less.kv)} times)"
    )
    if full.rss_bytes and less.rss_bytes:
        parts += (
            f"; a decode worker's RSS {gigabytes(full.rss_bytes)} to {gigabytes(less.rss_bytes)} "
            f"({number(full.rss_bytes / less.rss_bytes)} times: torch and Python included)"
        )
    before, after = full.bytes / 1e6, less.bytes / 1e6
    return Result(key, (before / after,), before, after, "MB", definition, f"{parts}.")
