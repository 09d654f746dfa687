"""What a client and the router say to each other. The whole picture: baton/wire/messages.py."""

from dataclasses import dataclass

from baton.kv.region import Plain

# ---- client -> router -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inquire:
    """What are you serving? Answered with ClusterInfo at once and again whenever it changes."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Generate. Exactly one of `prompt` and `token_ids` is given.

    `sampling` is SamplingParams.to_wire(); None asks for the model's own defaults.
    """

    request: str
    prompt: str | None
    token_ids: tuple[int, ...] | None
    max_new_tokens: int
    sampling: Plain | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    cache_salt: str = ""  # requests share cached KV with those of the same salt only


@dataclass(frozen=True, slots=True)
class Abort:
    """The client no longer wants this request; it is answered with Finished(reason="abort")."""

    request: str


# ---- router -> client -------------------------------------------------------------------------


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
class ClusterInfo:
    """What is served, and by whom. `ready`: a request would be worked on now."""

    ready: bool
    model: str
    fingerprint: str
    context: int
    vocabulary: int
    dtype: str
    sampling: Plain  # the model's own defaults, as SamplingParams.to_wire()
    workers: tuple[WorkerInfo, ...]
    waiting_for: str  # what is missing while not ready, in words


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is in the ledger: it will end with exactly one Finished or Failed."""

    request: str
    prompt_tokens: int
    tokenize_s: float


@dataclass(frozen=True, slots=True)
class Emitted:
    """New tokens, and the text they complete: never half a character, never part of a stop
    string."""

    request: str
    token_ids: tuple[int, ...]
    text: str


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
class Finished:
    """The end of a request that went well. `reason` is length, stop or abort."""

    request: str
    reason: str
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a request that did not. `code` is machine-readable (worker_lost, ...)."""

    request: str
    code: str
    message: str
