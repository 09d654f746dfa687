"""Records: plain values inside messages, about tokens, requests, workers and pools."""

from dataclasses import dataclass
from typing import Annotated

from baton.bounds import (
    INT_MAX,
    LIST_MAX,
    Blocks,
    Count,
    Ids,
    Line,
    Name,
    OptionalName,
    Range,
    Score,
    Seconds,
    Size,
    Tokens,
    TotalSeconds,
)

ITL_BUCKETS_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0),
)
"""Upper ends of the buckets of Counts.itl, in seconds; one more bucket holds longer gaps."""
FORWARD_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper ends of the buckets of Work.forwards, in tokens; one more bucket holds larger forwards."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's logprob by the model's own logits (before penalties, bias and temperature), and those of
    the likeliest tokens, in descending order."""

    value: Score
    top_ids: Ids = ()
    top_values: Annotated[tuple[Score, ...], Size(0, LIST_MAX)] = ()


Logprobs = Annotated[tuple[Logprob, ...], Size(0, LIST_MAX)]
Ages = Annotated[tuple[Seconds, ...], Size(0, LIST_MAX)]
"""Seconds since each of some tokens was sampled."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one request's time went, in seconds, read off the ledger's timestamps."""

    queue_s: TotalSeconds = 0.0  # Submit to Reserve, and the wait for a Fill batch
    reserve_s: TotalSeconds = 0.0
    prefill_s: TotalSeconds = 0.0  # Fill sent to Filled received, without the hand-over
    handover_s: TotalSeconds = 0.0  # pushing KV and making it visible, as the writer measured it
    decode_s: TotalSeconds = 0.0
    detokenize_s: TotalSeconds = 0.0
    ttft_s: TotalSeconds = 0.0
    total_s: TotalSeconds = 0.0
    kv_bytes: Count = 0  # KV bytes of the prompt
    moved_bytes: Count = 0  # bytes copied (0 where memory is shared)
    retries: Count = 0
    preemptions: Count = 0  # how often it lost its blocks to an older request and began again
    cached_tokens: Tokens = 0  # prompt tokens found in the prefix cache
    prefill_reused_tokens: Tokens = 0  # those that the prefill worker did not compute


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A request of any client has its first token. `timings`: what it took until then."""

    request: Name
    prompt_tokens: Tokens
    transport: OptionalName  # of its KV; empty if decode filled its own blocks
    timings: Timings


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a request of any client. `reason` is length, stop, abort, or an error code."""

    request: Name
    reason: Name
    prompt_tokens: Tokens
    tokens: Tokens  # generated
    transport: OptionalName  # of its KV; empty if decode filled its own blocks
    timings: Timings
    embedding: bool = False  # it asked for one: there is nothing to generate, and no prefix is used


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker as the router sees it. `state` is alive, suspect (silent), paused or leaving."""

    worker: Name
    role: Name
    device: Line
    state: Name
    transports: Annotated[
        tuple[Line, ...], Size(0, 4096)
    ] = ()  # prefill: of its links to decode workers, with GB/s
    load_s: TotalSeconds = 0.0  # from the process's start until it could join
    how: Line = ""  # engine backend


@dataclass(frozen=True, slots=True)
class ProcessDown:
    """A process of the cluster that does not run, as its supervisor sees it. `role` is prefill, decode,
    router or server."""

    name: Name
    role: Name
    deaths: Annotated[int, Range(0, INT_MAX)]  # within the last minute
    why: Line  # of the last death: signal or exit code, and its last error message
    restart_in_s: Seconds  # when this was written
    log: Line  # where its log is


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """The KV pool of one decode worker, in blocks. `free` includes cached ones."""

    worker: Name
    blocks: Blocks
    free: Blocks
    cached: Blocks
    quarantined: Blocks
    block_size: Tokens = 0  # tokens of a block


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker has computed since its process began. It only grows."""

    forwards: Annotated[tuple[Count, ...], Size(0, 256)] = ()  # by tokens, in FORWARD_TOKENS
    tokens: Count = 0  # in all forwards
    drafts: Count = 0
    draft_tokens: Count = 0
    accepted: Annotated[tuple[Count, ...], Size(0, 256)] = ()  # draft tokens, by place in the draft


@dataclass(frozen=True, slots=True)
class Speed:
    """How long a worker's forwards take on so many cores (0: of a GPU): seconds of any forward, what its
    streams take included, and of each prompt token in it (baton/pace.py)."""

    cores: Annotated[int, Range(0, 2**16)]
    forward_s: Seconds
    token_s: Seconds


@dataclass(frozen=True, slots=True)
class Decided:
    """How many prompts were filled by this role, and why (router/role_policy.py)."""

    role: Name  # prefill, decode
    cause: Name
    requests: Count


@dataclass(frozen=True, slots=True)
class WorkerWork:
    """The last that a worker has reported of its work."""

    worker: Name
    role: Name
    work: Work


@dataclass(frozen=True, slots=True)
class RoleBacklog:
    """What waits for the workers of one role."""

    role: Name  # prefill, decode
    requests: Count
    tokens: (
        Count  # prefill: prompt tokens whose KV is not computed; decode: of the requests, so far
    )
    oldest_s: TotalSeconds  # how long the first of them has waited


@dataclass(frozen=True, slots=True)
class Counts:
    """The router's counts: current ones, or totals since its start."""

    waiting: Count  # requests before decode
    running: Count  # requests on a worker
    generated_tokens: Count
    preemptions: Count
    refills: Count  # fills that failed, or arrived damaged
    lost_prefill: Count  # workers
    lost_decode: Count
    late_reports: Count
    itl: Annotated[tuple[Count, ...], Size(0, 256)]  # gaps between tokens, counted in ITL_BUCKETS_S
    itl_s: TotalSeconds  # their sum
    pools: Annotated[tuple[PoolInfo, ...], Size(0, 4096)]
    backlogs: Annotated[tuple[RoleBacklog, ...], Size(0, 16)] = ()
    tokenless: Count = 0  # requests on a worker that have no token yet
    works: Annotated[tuple[WorkerWork, ...], Size(0, 8192)] = ()
    router: OptionalName = ""  # its epoch: the totals of another one begin at 0
    decided: Annotated[tuple[Decided, ...], Size(0, 256)] = ()  # who filled the prompts
