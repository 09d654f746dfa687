"""What a client and the router say to each other. The whole picture: baton/wire/messages.py."""

from dataclasses import dataclass

from baton.kv.region import Plain
from baton.request import Logprob
from baton.timeline import Moment

# ---- client -> router -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inquire:
    """What are you serving? Answered with ClusterInfo at once and again whenever it changes."""


@dataclass(frozen=True, slots=True)
class Observe:
    """Tell me what happens to every request from now on: answered with Observed, again and again."""


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
    include_stop: bool = False  # the stop string or token that ends it belongs to the text
    stop_token_ids: tuple[int, ...] = ()
    keep_special: bool = False  # special tokens have text too
    min_tokens: int = 0  # before these no stop string, stop token or EOS ends it
    logprobs: int = -1  # of each token, and so many of the likeliest; -1: none
    prompt_logprobs: int = -1  # the same of the prompt's tokens: answered with PromptScored
    grammar: str = ""  # baton/grammar.py; empty: anything goes
    tell_every_s: float = 0.0  # so long tokens may wait to be told with later ones; 0: not at all


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
    string. `logprobs`: one for each token, if they were asked for. `ages`: how many seconds ago each
    was sampled, where some have waited (Submit.tell_every_s)."""

    request: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprob, ...] = ()
    ages: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Emissions:
    """What one report of a decode worker has brought for a client's requests, in one message."""

    emitted: tuple[Emitted, ...]


@dataclass(frozen=True, slots=True)
class PromptScored:
    """How likely the prompt's tokens were, the first apart, which nothing stands before. Comes once,
    before the first Emitted."""

    request: str
    logprobs: tuple[Logprob, ...]


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
    itl: tuple[int, ...]  # gaps between tokens, counted in baton.metrics.ITL_BUCKETS_S
    itl_s: float  # their sum
    pools: tuple[PoolInfo, ...]


@dataclass(frozen=True, slots=True)
class Observed:
    """What has happened since the last one. `now` is the router's clock, like every `at`."""

    now: float
    moments: tuple[Moment, ...]
    ended: tuple[Ended, ...]
    counts: Counts | None  # once a second
