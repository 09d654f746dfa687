"""All messages. Orders are imperatives (Reserve), reports past participles (Reserved).

    client           router                    decode worker              prefill worker
      |                |<------- Hello ------------|<-- (Attach, Attached) -- |
      |-- Submit ----->|                           |                          |
      |<- Accepted ----|-------- Reserve --------->|                          |
      |                |<------- Reserved ---------|                          |
      |                |-------- Fill ------------------------------------->  |
      |                |                           |<====== KV blocks ======= |
      |                |<------- Filled ------------------------------------- |
      |                |-------- Start ----------->|                          |
      |<- Emitted -----|<------- Decoded ----------|   (once a step)          |
      |<- Finished ----|                           |                          |

Messages of workers name *runs* ("7f3a#0", "7f3a#1": the attempts at a request), those of clients name
requests; the router translates. Every message is a frozen dataclass of plain values; baton.wire.codec
checks each field's type on arrival.
"""

from dataclasses import dataclass

from baton.kv.grant import Grant
from baton.kv.region import Receipt, Region
from baton.params import GenerationParams
from baton.timeline import Moment
from baton.wire.records import Counts, Ended, Logprob, ProcessDown, Timings, WorkerInfo
from sampler.params import SamplingParams

PROTOCOL = 7


# ---- client -> router -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GetClusterInfo:
    """Answered with ClusterInfo, and again after every change."""


@dataclass(frozen=True, slots=True)
class Observe:
    """Follow all requests from now on: answered with a stream of Observed."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Continue this prompt: text, or token ids. Requests of one `tenant` (an API key, a client's address)
    share one fair part of the cluster, and those of one `group` (one HTTP request) one part of that.
    `queue_timeout_s`: it fails with queue_timeout if no worker has taken it by then; `timeout_s`: with
    deadline_exceeded if it has not ended by then. 0: no limit."""

    request: str
    prompt: str | tuple[int, ...]
    params: GenerationParams
    tenant: str = ""
    group: str = ""
    queue_timeout_s: float = 0.0
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Supervised:
    """From the process that starts this cluster's processes: those that do not run now. Sent after every
    change, and to each new router; an empty report withdraws the last one. Not answered."""

    down: tuple[ProcessDown, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """The client no longer wants this request; it is answered with Finished(reason="abort")."""

    request: str


# ---- router -> client -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """The served model and the workers. `ready`: requests can be served now. `degraded`: what is missing
    although requests are served, such as every prefill worker; empty if nothing is."""

    ready: bool
    model: str
    fingerprint: str
    context: int
    vocabulary: int
    dtype: str
    sampling: SamplingParams  # the model's own defaults
    workers: tuple[WorkerInfo, ...]
    waiting_for: str  # what is missing while not ready, for people
    degraded: str = ""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is in the ledger: it will end with exactly one Finished or Failed."""

    request: str
    prompt_tokens: int
    tokenize_s: float


@dataclass(frozen=True, slots=True)
class Emitted:
    """New tokens, and the text they complete: never half a character, never part of a stop string.
    `logprobs`: one for each token, if requested. `ages`: seconds since each was sampled, if some were
    delayed (stream_interval_s)."""

    request: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprob, ...] = ()
    ages: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Emissions:
    """New tokens of several requests of one client, from one report of a decode worker."""

    emitted: tuple[Emitted, ...]


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Logprobs of the prompt's tokens but the first. Sent once, before the first Emitted."""

    request: str
    logprobs: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """A request has ended without error. `reason` is length, stop or abort."""

    request: str
    reason: str
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """A request has ended with an error. `code` is machine-readable (worker_lost, ...)."""

    request: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Observed:
    """Events since the last Observed. `now` is the router's clock, like every `at`."""

    now: float
    moments: tuple[Moment, ...]
    ended: tuple[Ended, ...]
    counts: Counts | None  # once a second


# ---- router -> worker -----


@dataclass(frozen=True, slots=True)
class Welcome:
    """The worker has joined. A worker on the same host watches the router's `pid`."""

    epoch: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The worker cannot join. It prints `why` and exits with code 4."""

    why: str


@dataclass(frozen=True, slots=True)
class Reset:
    """The router gave this worker up: drop everything and say Hello with a new epoch."""

    why: str


@dataclass(frozen=True, slots=True)
class Dismissed:
    """The answer to Leaving, once nothing runs on this worker: it may end its process."""


@dataclass(frozen=True, slots=True)
class Attach:
    """To prefill: open a link to this decode worker's pool."""

    worker: str
    epoch: str
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Detach:
    """To prefill: this decode worker is gone; close the link and drop its fills."""

    worker: str
    epoch: str


@dataclass(frozen=True, slots=True)
class WriterJoined:
    """To decode: this prefill worker can write to your pool by this transport. No earlier write of it
    can still arrive. On the same `host` its `pid` can be watched."""

    writer: str
    host: str
    pid: int
    transport: str


@dataclass(frozen=True, slots=True)
class WriterClear:
    """To decode: this writer is dead or has restarted; no earlier write of it can still arrive."""

    writer: str


@dataclass(frozen=True, slots=True)
class Reserve:
    """Reserve blocks for so many tokens: the known ones and a few more. `block_hashes`
    (baton/kv/prefix.py) are the root and those of the first blocks."""

    run: str
    tokens: int
    block_hashes: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Renew:
    """Extend the leases of these runs."""

    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fill:
    """Compute KV for these tokens (a prompt without its last) into the granted blocks. The Fills of a
    batch are sent together."""

    grant: Grant
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """Stop writing for this run. Always answered with Released."""

    run: str


@dataclass(frozen=True, slots=True)
class Start:
    """Decode from here. The first `prompt_tokens` of `token_ids` are the prompt; the others come from an
    earlier run and count against `max_new_tokens`. The last token is decode's first step. Without a
    `receipt` the blocks are not filled, and decode computes the KV itself. `params` are resolved();
    prompt_logprobs are set only if nothing is filled or cached."""

    run: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    params: GenerationParams
    receipt: Receipt | None = None

    def __post_init__(self) -> None:
        if self.params.sampling is None:
            raise ValueError("Start.params must be resolved: sampling is missing")


@dataclass(frozen=True, slots=True)
class Cores:
    """Compute on these cores of the host from the next step on."""

    cores: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """The run is over: free its blocks. If the prefill worker `writer` may still be writing into them,
    they go to quarantine until it has stopped."""

    run: str
    writer: str | None = None


# ---- worker -> router ----


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker asks to join. If it does not fit, it is Refused, with both values named. `epoch` changes
    with every restart and every Reset. `patience_s`: longest silence, that is, longest step."""

    role: str
    worker: str
    epoch: str
    protocol: int
    host: str
    pid: int
    device: str
    model: str  # fingerprint
    dtype: str
    layout: str  # KVLayout.fingerprint
    block_size: int
    block_bytes: int
    blocks: int  # capacity of a decode worker's pool, 0 for prefill
    regions: tuple[Region, ...]
    patience_s: float
    load_s: float
    how: str = ""  # engine backend, for people
    takes_cores: bool = False  # it computes on the cores that the router assigns


@dataclass(frozen=True, slots=True)
class Leaving:
    """A worker will end (SIGTERM): it gets no new work and finishes what runs there. When nothing is left
    the router sends Dismissed. After `within_s` it ends anyway, and what still runs is moved."""

    within_s: float


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent from the step loop, in both directions, so a wedged process falls silent."""

    epoch: str
    steps: int


@dataclass(frozen=True, slots=True)
class Attached:
    """A prefill worker can write to this decode worker's pool."""

    worker: str
    epoch: str
    transport: str
    gb_per_s: float  # measured at attach; 0 if nothing has to be moved
    why: str  # which better transports do not work, and why


@dataclass(frozen=True, slots=True)
class AttachFailed:
    """A prefill worker cannot write to this decode worker's pool."""

    worker: str
    epoch: str
    why: str


@dataclass(frozen=True, slots=True)
class Reserved:
    """Blocks are reserved for the run, under a lease."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class Deferred:
    """No room for the run now."""

    run: str


@dataclass(frozen=True, slots=True)
class Preempted:
    """The pool is full: the run's blocks went to an older run."""

    run: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The run's lease ended before it was started; its blocks are released."""

    run: str


@dataclass(frozen=True, slots=True)
class ChunkFilled:
    """The first `tokens` of the run's prompt are computed, but not all. For observers only."""

    run: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Filled:
    """The run's blocks hold the KV of all prompt tokens but the last. The writer has stopped writing."""

    run: str
    receipt: Receipt
    compute_s: float


@dataclass(frozen=True, slots=True)
class FillFailed:
    """The run could not be filled. The writer has stopped writing."""

    run: str
    why: str


@dataclass(frozen=True, slots=True)
class Released:
    """The writer has stopped writing for this run: the answer to Drop. The router sets `writer` and
    passes it on to decode."""

    run: str
    writer: str = ""


@dataclass(frozen=True, slots=True)
class FillRefused:
    """Decode found the filled blocks incomplete or damaged, and has released them."""

    run: str
    why: str


@dataclass(frozen=True, slots=True)
class RunTokens:
    """Sampled tokens of one run. `position` is that of the first, so a gap is noticed. `finish` is set
    with a run's last: stop or length. `logprobs`: one for each, if requested. `ages`: seconds since each
    was sampled; empty: just now."""

    run: str
    position: int
    token_ids: tuple[int, ...]
    finish: str | None = None
    logprobs: tuple[Logprob, ...] = ()
    ages: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Decoded:
    """Tokens of one decode step, or of several (see GenerationParams.stream_interval_s)."""

    runs: tuple[RunTokens, ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs of the run's prompt tokens but the first."""

    run: str
    logprobs: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A decode worker's KV pool, in blocks. Sent after changes, at most a few times a second."""

    free: int  # cached ones included
    cached: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class RunFailed:
    """One run cannot continue (numerical_error, ...). Other runs are not affected."""

    run: str
    code: str
    message: str


# ---- the loop to its own node ----


@dataclass(frozen=True, slots=True)
class Exited:
    """From the loop itself, never sent: the peer's process has ended."""

    peer: str


@dataclass(frozen=True, slots=True)
class Unreachable:
    """From the loop itself, never sent: a message could not be delivered. The peer may be alive."""

    peer: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """From the channel, never sent: a Submit or Hello arrived that cannot be read. `about` is its request
    id or its protocol, `why` the rule it breaks."""

    kind: str
    about: str
    why: str


@dataclass(frozen=True, slots=True)
class Terminate:
    """From the loop itself, never sent: SIGTERM came; end within so many seconds."""

    within_s: float


LOCAL = (Exited, Unreachable, Malformed, Terminate)
"""Messages of a process to its own node: the codec refuses them from a socket."""

Message = (
    Abort | Accepted | Attach | AttachFailed | Attached | Cancel | ChunkFilled | ClusterInfo | Cores
    | Decoded | Deferred | Detach | Dismissed | Drop | Emissions | Emitted | Exited | Expired | Failed
    | Fill | FillFailed | FillRefused | Filled | Finished | GetClusterInfo | Heartbeat | Hello
    | Leaving | Malformed | Observe | Observed | PoolStats | Preempted | PromptLogprobs
    | PromptScored | Refused | Released | Renew | Reserve | Reserved | Reset | RunFailed | Start
    | Submit | Supervised | Terminate | Unreachable | Welcome | WriterClear | WriterJoined
)  # fmt: skip
