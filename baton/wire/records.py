"""Records: plain values inside messages, about tokens, requests, workers and pools."""

from dataclasses import dataclass

ITL_BUCKETS_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0),
)
"""Upper ends of the buckets of Counts.itl, in seconds; one more bucket holds longer gaps."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's logprob by the model's own logits (before penalties, bias and temperature), and those of
    the likeliest tokens, in descending order."""

    value: float
    top_ids: tuple[int, ...] = ()
    top_values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one request's time went, in seconds, read off the ledger's timestamps."""

    queue_s: float = 0.0  # Submit to Reserve, and the wait for a Fill batch
    reserve_s: float = 0.0
    prefill_s: float = 0.0  # Fill sent to Filled received, without the hand-over
    handover_s: float = 0.0  # pushing KV and making it visible, as the writer measured it
    decode_s: float = 0.0
    detokenize_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0
    kv_bytes: int = 0  # KV bytes of the prompt
    moved_bytes: int = 0  # bytes copied (0 where memory is shared)
    retries: int = 0
    preemptions: int = 0  # how often it lost its blocks to an older request and began again
    cached_tokens: int = 0  # prompt tokens found in the prefix cache


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a request of any client. `reason` is length, stop, abort, or an error code."""

    request: str
    reason: str
    prompt_tokens: int
    tokens: int  # generated
    transport: str  # of its KV; empty if decode filled its own blocks
    timings: Timings


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker as the router sees it. `state` is alive, suspect or dead."""

    worker: str
    role: str
    device: str
    state: str
    transports: tuple[str, ...] = ()  # prefill: of its links to decode workers, with GB/s
    load_s: float = 0.0  # from the process's start until it could join
    how: str = ""  # engine backend


@dataclass(frozen=True, slots=True)
class ProcessDown:
    """A process of the cluster that does not run, as its supervisor sees it. `role` is prefill, decode,
    router or server."""

    name: str
    role: str
    deaths: int  # within the last minute
    why: str  # of the last death: signal or exit code, and its last error message
    restart_in_s: float  # when this was written
    log: str  # where its log is


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """The KV pool of one decode worker, in blocks. `free` includes cached ones."""

    worker: str
    blocks: int
    free: int
    cached: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class Counts:
    """The router's counts: current ones, or totals since its start."""

    waiting: int  # requests before decode
    running: int  # requests on a worker
    generated_tokens: int
    preemptions: int
    refills: int  # fills that failed, or arrived damaged
    lost_prefill: int  # workers
    lost_decode: int
    late_reports: int
    itl: tuple[int, ...]  # gaps between tokens, counted in ITL_BUCKETS_S
    itl_s: float  # their sum
    pools: tuple[PoolInfo, ...]
