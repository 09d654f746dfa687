"""Records: plain values that messages carry: of tokens, requests, workers and pools."""

from dataclasses import dataclass

ITL_BUCKETS_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0),
)
"""Upper ends of the buckets of Counts.itl, in seconds; one more bucket holds longer gaps."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was, by the model's own logits (before penalties, bias and temperature), and
    which were the likeliest, likeliest first."""

    value: float
    top_ids: tuple[int, ...] = ()
    top_values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one request's time went, in seconds, read off the ledger's timestamps."""

    queue_s: float = 0.0  # Submit to Reserve, and every wait for a batch to fill
    reserve_s: float = 0.0
    prefill_s: float = 0.0  # Fill sent to Filled received, hand-over apart
    handover_s: float = 0.0  # pushing KV and making it visible, as the writer measured it
    decode_s: float = 0.0
    detokenize_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0
    kv_bytes: int = 0  # KV bytes of the prompt
    moved_bytes: int = 0  # of these, bytes that were copied (0 where memory is shared)
    retries: int = 0
    preemptions: int = 0  # how often it gave its KV blocks to an older request, and began again
    cached_tokens: int = 0  # of the prompt, whose KV was there already


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a request, whoever had sent it. `reason` is length, stop, abort, or the code of
    its failure."""

    request: str
    reason: str
    prompt_tokens: int
    tokens: int  # generated
    transport: str  # which way its KV came, empty if decode filled its own
    timings: Timings


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker as the router sees it. `state` is alive, suspect or dead."""

    worker: str
    role: str
    device: str
    state: str
    transports: tuple[str, ...] = ()  # a prefill worker's ways to the decode workers, with GB/s
    load_s: float = 0.0  # from the process's start until it could join
    how: str = ""  # what computes its forwards


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """The KV pool of one decode worker, in blocks. `free` counts the cached ones too."""

    worker: str
    blocks: int
    free: int
    cached: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class Counts:
    """The router's counts: of now, or since its start."""

    waiting: int  # requests that do not decode yet
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
