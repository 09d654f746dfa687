"""Role policy: who fills a prompt, a prefill worker or the decode worker that will continue it. Pure.

    remote   a prefill worker computes the KV and hands it over; the streams of the decode worker go on
    local    the decode worker computes it in chunks between their steps: nothing is handed over, and
             there are two places at which prompts are computed instead of one

Neither is best for all traffic. So `adaptive` predicts both for each request, when its blocks are
granted: its time to first token, and how far apart the tokens of the streams will be meanwhile. It
prefers the way that breaks the limits of fewer requests (SLO: Zhong et al., DistServe, 2024). Where both
break about as many it prefers the one for which all of them together wait less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from baton.errors import RequestError
from baton.pace import Pace, Span

HOP_S = 0.001
"""A hand-over takes one more message there and back."""
SURE = 0.9
"""A limit of ITL counts as kept with so much of it used: a worker that can, uses less (ITL_PART)."""
STREAMS_COUNT = 0.1
"""A second by which a stream is later, against one by which a first token is."""
WORTH_IT = 0.9
"""What a hand-over costs against what it saves: less is within the error of the predictions."""
USUAL_TTFT, USUAL_ITL = 10, 5
"""Without limits of the user: so many times what the prompt, or a step, takes on an idle worker."""

WORTH_WORDS_S = 0.0005
"""What is shorter is 0 ms."""


class RolePolicy(StrEnum):
    """What a user may ask for."""

    SPLIT = "split"
    COLOCATED = "colocated"
    ADAPTIVE = "adaptive"


def asked_for(policy: str) -> RolePolicy | None:
    """The policy of this name; None for "", which asks for none. Raises RequestError."""
    if not policy:
        return None
    try:
        return RolePolicy(policy)
    except ValueError:
        text = f"role_policy must be one of {', '.join(RolePolicy)}, got {policy!r}"
        raise RequestError(text, param="role_policy") from None


class Cause(StrEnum):
    """Why a prompt is filled where it is: the label of a counter."""

    ROLE_POLICY = "role_policy"  # it is pinned by the user, or there is only one way
    EMBEDDING = "embedding"  # only prefill workers compute them
    PROMPT_LOGPROBS = "prompt_logprobs"  # only decode workers compute logits
    SHORT = "short"  # too little for a hand-over
    NO_PREFILL = "no_prefill"  # no prefill worker can fill it
    FAILED_FILLS = "failed_fills"  # of this request, again and again
    UNMEASURED = "unmeasured"  # the workers have not told their speed yet
    TTFT = "ttft"  # elsewhere its first token would be too late
    ITL = "itl"  # elsewhere the tokens of the streams would be too far apart
    WAITING = "waiting"  # elsewhere all would wait longer


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds: of the time to the first token, and of that between two tokens. None: USUAL_TTFT
    and USUAL_ITL times those of an idle worker."""

    ttft_s: float | None = None
    itl_s: float | None = None


NO_SLO = Slo()


@dataclass(frozen=True, slots=True)
class Decision:
    """`why`: for people, with the figures. `itl_s`: the limit of the streams of a decode worker while it
    fills (Start); 0: none."""

    remote: bool
    cause: Cause
    why: str
    itl_s: float = 0.0


UNDECIDED = Decision(True, Cause.ROLE_POLICY, "")


@dataclass(frozen=True, slots=True)
class DecodeSide:
    """The decode worker that has granted the blocks. `filling`: tokens left of the prompts that it fills
    already, oldest first."""

    idle: Pace  # with nothing to do
    alone: Pace  # on the cores that it has while no prefill worker computes
    beside: Pace  # on those it has while one does
    streams: int  # requests that get tokens
    filling: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillSide:
    """The prefill worker that would fill the prompt."""

    pace: Pace  # on the cores that it has then
    filling: tuple[int, ...] = ()  # tokens left of its prompts, oldest first
    handover_s: float = 0.0  # for this prompt
    known: int | None = (
        None  # its first tokens that are not computed there; None: those not on decode
    )

    def computes(self, prompt: Span) -> Span:
        """What it would compute. It is more than what is not cached where memory is not shared and little
        is kept there, and less where decode has lost what is."""
        if self.known is None:
            return prompt
        end = prompt.start + prompt.tokens
        start = min(self.known, end - 1)
        return Span(start, end - start)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What one way is predicted to mean, in seconds. `others_s`: by how much prompts that are filled now
    are later, added up; `streams_s`: the same of streams."""

    ttft_s: float
    gap_s: float  # between two tokens of the streams, at most
    others_s: float
    streams_s: float

    @property
    def cost_s(self) -> float:
        """What is to be small where no limit is broken. Streams have their limit, and each step is as
        short as it asks; so their time counts little."""
        return self.ttft_s + self.others_s + STREAMS_COUNT * self.streams_s


def local_outlook(prompt: Span, decode: DecodeSide, prefill: PrefillSide, itl_s: float) -> Outlook:
    """The decode worker fills the prompt, with steps as short as `itl_s` asks. As long as the prefill
    worker has something to do, beside it."""
    limit_s = itl_s if decode.streams else 0.0
    alone, beside = decode.alone.limited(limit_s), decode.beside.limited(limit_s)
    busy_s = prefill.pace.fill_s(Span(0, sum(prefill.filling))) if prefill.filling else 0.0
    tokens = ahead(decode.filling, prompt.tokens)
    alone_s, beside_s = (p.fill_s(prompt, tokens * p.token_s) for p in (alone, beside))
    fill_s = beside_s if beside_s <= busy_s else busy_s + alone_s * (1 - busy_s / beside_s)
    pace = beside if busy_s else alone
    work_s = pace.chunk_s(prompt)
    joins_s = pace.forward_s / 2 if decode.streams else 0.0  # at the end of the present step
    room_s = pace.space_s(prompt.start)
    return Outlook(
        ttft_s=joins_s + fill_s,
        gap_s=pace.forward_s + min(room_s, work_s + sum(decode.filling) * pace.token_s),
        others_s=behind(decode.filling, prompt.tokens) * work_s,
        streams_s=decode.streams * work_s,
    )


def remote_outlook(prompt: Span, decode: DecodeSide, prefill: PrefillSide, itl_s: float) -> Outlook:
    """The prefill worker does. Where it takes cores from the decode worker, what runs there is slower."""
    limit_s = itl_s if decode.streams else 0.0
    alone, beside, pace = (
        decode.alone.limited(limit_s),
        decode.beside.limited(limit_s),
        prefill.pace,
    )
    own_s, step_s = pace.fill_s(prompt), beside.forward_s
    before_s = ahead(prefill.filling, prompt.tokens) * pace.token_s
    joins_s = step_s / 2 if decode.streams else 0.0
    fills_slower = max(0.0, 1 - beside.fill_rate() / alone.fill_rate())
    steps_slower = max(0.0, 1 - alone.forward_s / step_s)
    waiting = behind(prefill.filling, prompt.tokens) * pace.chunk_s(prompt)
    full_s = max(beside.step_s(), 0.0 if prefill.filling else overtaken_s(alone, beside))
    return Outlook(
        ttft_s=pace.fill_s(prompt, before_s) + prefill.handover_s + HOP_S + joins_s + step_s,
        gap_s=full_s if decode.filling else step_s,
        others_s=waiting + len(decode.filling) * fills_slower * own_s,
        streams_s=decode.streams * steps_slower * own_s,
    )


def overtaken_s(alone: Pace, beside: Pace) -> float:
    """Seconds of a full step of a decode worker during which the prefill worker begins: it was made for
    the cores that the decode worker had, and is computed on those that are left."""
    return beside.forward_s + alone.space_s() * max(1.0, beside.token_s / alone.token_s)


def ahead(filling: Sequence[int], tokens: int) -> int:
    """Tokens that are computed before the end of a new prompt of so many: half of each forward is the
    oldest prompt's, the rest goes to the shortest (baton/pace.py)."""
    oldest = min(filling[0], tokens) if filling else 0
    return oldest + sum(each for each in filling[1:] if each <= tokens)


def behind(filling: Sequence[int], tokens: int) -> int:
    """Prompts that end later because of a new one of so many tokens."""
    return sum(each > tokens for each in filling)


def choose(
    prompt: Span, decode: DecodeSide, prefill: PrefillSide, slo: Slo, *, waited_s: float = 0.0
) -> Decision:
    """Who fills the prompt. `prompt`: what is not cached; `waited_s`: since its submission."""
    ttft_s = slo.ttft_s or USUAL_TTFT * decode.idle.fill_s(prompt)
    itl_s = slo.itl_s or USUAL_ITL * decode.idle.forward_s
    local = local_outlook(prompt, decode, prefill, itl_s)
    remote = remote_outlook(prefill.computes(prompt), decode, prefill, itl_s)
    late = [waited_s + each.ttft_s > ttft_s for each in (local, remote)]
    far = [decode.streams * (each.gap_s > SURE * itl_s) for each in (local, remote)]
    delayed = [each.others_s / ttft_s for each in (local, remote)]  # about so many are late then
    here, there = (sum(each) for each in zip(late, far, delayed, strict=True))
    if abs(here - there) > 0.5:
        to_remote = there < here
        cause = Cause.ITL if (far[1] < far[0]) == to_remote and far[0] != far[1] else Cause.TTFT
    else:
        to_remote, cause = remote.cost_s < WORTH_IT * local.cost_s, Cause.WAITING
    ways = (remote, there, local, here) if to_remote else (local, here, remote, there)
    waited = f"waited {_ms(waited_s)}; " if waited_s >= WORTH_WORDS_S else ""
    who = "prefill" if to_remote else "decode"
    words = _words(*ways, streams=decode.streams, limits=f"{_ms(ttft_s)}, {_ms(itl_s)}")
    why = f"{who} fills {prompt.tokens:,} tokens: {waited}{words}"
    return Decision(to_remote, cause, why, itl_s)


def _words(
    chosen: Outlook,
    broken: float,
    other: Outlook,
    others_broken: float,
    *,
    streams: int,
    limits: str,
) -> str:
    """The figures of both ways. `broken`: for about how many requests a limit is broken then."""
    gaps = f"; {streams} streams: a token in {_ms(chosen.gap_s)} (not {_ms(other.gap_s)})"
    return (
        f"first token in {_ms(chosen.ttft_s)} (else {_ms(other.ttft_s)}){gaps if streams else ''}; "
        f"limits {limits}: broken for {broken:.1f} (not {others_broken:.1f}); "
        f"all wait {_ms(chosen.cost_s)} (not {_ms(other.cost_s)})"
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms"
