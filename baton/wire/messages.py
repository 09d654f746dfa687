"""Every message there is. Orders are imperatives (Reserve), reports past participles (Reserved).

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

Workers know *runs* ("7f3a#0", "7f3a#1": the attempts at a request), clients know requests; only the
router knows both. Every message is a frozen dataclass of plain values; baton.wire.codec checks each
field's type on arrival.
"""

from dataclasses import dataclass

from baton.kv.grant import Grant
from baton.kv.region import Receipt, Region
from baton.params import GenerationParams
from baton.timeline import Moment
from baton.wire.records import Counts, Ended, Logprob, Timings, WorkerInfo
from sampler.params import SamplingParams

PROTOCOL = 6


# ---- client -> router -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GetClusterInfo:
    """Answered with ClusterInfo at once, and again whenever it changes."""


@dataclass(frozen=True, slots=True)
class Observe:
    """Follow all requests from now on: answered with Observed, again and again."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Continue this prompt: text, or token ids."""

    request: str
    prompt: str | tuple[int, ...]
    params: GenerationParams


@dataclass(frozen=True, slots=True)
class Abort:
    """The client no longer wants this request; it is answered with Finished(reason="abort")."""

    request: str


# ---- router -> client -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """The served model and the workers. `ready`: requests can be served now."""

    ready: bool
    model: str
    fingerprint: str
    context: int
    vocabulary: int
    dtype: str
    sampling: SamplingParams  # the model's own defaults
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
    was sampled, where some have waited (stream_interval_s)."""

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
    """Logprobs of the prompt's tokens but the first. Comes once, before the first Emitted."""

    request: str
    logprobs: tuple[Logprob, ...]


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
class Observed:
    """What has happened since the last one. `now` is the router's clock, like every `at`."""

    now: float
    moments: tuple[Moment, ...]
    ended: tuple[Ended, ...]
    counts: Counts | None  # once a second


# ---- router -> worker -----


@dataclass(frozen=True, slots=True)
class Welcome:
    """The worker has joined. `pid` lets a worker on the same host see the router's death at once."""

    epoch: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The worker does not fit; it prints `why` and leaves with exit code 4."""

    why: str


@dataclass(frozen=True, slots=True)
class Reset:
    """The router gave this worker up for dead: drop everything and say Hello with a new epoch."""

    why: str


@dataclass(frozen=True, slots=True)
class Attach:
    """Open a way to this decode worker's pool."""

    worker: str
    epoch: str
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Detach:
    """This decode worker is gone: close the way to it, drop what was meant for it."""

    worker: str
    epoch: str


@dataclass(frozen=True, slots=True)
class WriterJoined:
    """To decode: this prefill worker can write into your pool, by this transport, and nothing it
    wrote before can still arrive; `pid` and `host` let you see its death."""

    writer: str
    host: str
    pid: int
    transport: str


@dataclass(frozen=True, slots=True)
class WriterClear:
    """To decode: this writer is dead, or has started anew: nothing of it can still arrive."""

    writer: str


@dataclass(frozen=True, slots=True)
class Reserve:
    """Reserve blocks for so many tokens: the known ones and a few more; the run grows later.
    `block_hashes` (baton/kv/prefix.py) are of the first blocks, the root before them."""

    run: str
    tokens: int
    block_hashes: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Renew:
    """The leases of these runs are still wanted."""

    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fill:
    """Compute KV for these tokens (a prompt without its last) into the granted blocks. The prompts of one
    batch are sent together."""

    grant: Grant
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """Stop writing under this run; answered with Released, always."""

    run: str


@dataclass(frozen=True, slots=True)
class Start:
    """Decode from here. The first `prompt_tokens` of `token_ids` are the prompt; the others come from an
    earlier run and count against `max_new_tokens`. The last one is decode's first step. `receipt` is
    None where the blocks are not filled: decode computes the KV of all tokens itself. `params` are
    resolved(); prompt_logprobs are set only where nothing is filled or cached."""

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
    """Compute on these cores of your host from the next step on."""

    cores: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """The run is over, give its blocks back. `writer` is the prefill worker that may still be
    writing into them: they wait in quarantine until it is known to have stopped."""

    run: str
    writer: str | None = None


# ---- worker -> router ----


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker asks to join. What does not fit is refused with both values named.

    `epoch` names one life of the worker: a new one after every restart and every Reset.
    `patience_s` is how long the worker may be silent inside one step before it must be given up.
    """

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
    how: str = ""  # what computes its forwards, for people
    takes_cores: bool = False  # it computes on a CPU, on whatever cores the router gives it


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent from the step loop, both ways, so a wedged process falls silent."""

    epoch: str
    steps: int


@dataclass(frozen=True, slots=True)
class Attached:
    """A prefill worker can write into this decode worker's pool."""

    worker: str
    epoch: str
    transport: str
    gb_per_s: float  # measured at attach; 0 where nothing has to be moved
    why: str  # what was preferred and could not be used, empty if nothing


@dataclass(frozen=True, slots=True)
class AttachFailed:
    """A prefill worker has no way to this decode worker's pool."""

    worker: str
    epoch: str
    why: str


@dataclass(frozen=True, slots=True)
class Reserved:
    """Blocks are set aside for the run, under a lease."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class Deferred:
    """There is no room for the run now; ask again when something has ended."""

    run: str


@dataclass(frozen=True, slots=True)
class Preempted:
    """The pool is full: the run's blocks went to an older one. It can begin again when there is
    room, from the tokens it has given."""

    run: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The run's lease ran out before it was started; its blocks are gone."""

    run: str


@dataclass(frozen=True, slots=True)
class ChunkFilled:
    """A chunk of the run's prompt is computed, up to this many tokens; more is to come. For observers:
    nothing depends on it."""

    run: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Filled:
    """The run's blocks hold the KV of all prompt tokens but the last; the writer is done with them."""

    run: str
    receipt: Receipt
    compute_s: float


@dataclass(frozen=True, slots=True)
class FillFailed:
    """The run could not be filled. The writer is done with its blocks."""

    run: str
    why: str


@dataclass(frozen=True, slots=True)
class Released:
    """The writer will not write under this run any more: the answer to Drop, passed on to decode.
    `writer` is filled in by the router."""

    run: str
    writer: str = ""


@dataclass(frozen=True, slots=True)
class FillRefused:
    """Decode found the filled blocks incomplete or damaged; it has taken them back."""

    run: str
    why: str


@dataclass(frozen=True, slots=True)
class RunTokens:
    """Sampled tokens of one run, the first of them for this position of its sequence: a gap is noticed.
    `finish` is set with a run's last: stop (an EOS id) or length. `logprobs`: one for each, if they are
    wanted. `ages`: how many seconds ago each was sampled; empty: just now."""

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
    """A decode worker's KV pool, in blocks; sent when it changes, a few times a second at most."""

    free: int  # cached ones too
    cached: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class RunFailed:
    """One run cannot go on (numerical_error, ...); its neighbours are not touched."""

    run: str
    code: str
    message: str


# ---- the loop to its own node ----


@dataclass(frozen=True, slots=True)
class Exited:
    """From the loop itself, never sent: the process behind this peer is proven dead."""

    peer: str


@dataclass(frozen=True, slots=True)
class Unreachable:
    """From the loop itself, never sent: a message to this peer could not be delivered. Its process
    may be alive, and busy."""

    peer: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """From the loop itself, never sent: a Submit or Hello arrived that cannot be read. `about` is its
    request id or its protocol, `why` the rule it breaks."""

    kind: str
    about: str
    why: str


LOCAL = (Exited, Unreachable, Malformed)
"""What only a loop may say to its own node: the codec takes none of it from a socket."""

Message = (
    Abort | Accepted | Attach | AttachFailed | Attached | Cancel | ChunkFilled | ClusterInfo | Cores
    | Decoded | Deferred | Detach | Drop | Emissions | Emitted | Exited | Expired | Failed | Fill
    | FillFailed | FillRefused | Filled | Finished | GetClusterInfo | Heartbeat | Hello | Malformed
    | Observe | Observed | PoolStats | Preempted | PromptLogprobs | PromptScored | Refused | Released
    | Renew | Reserve | Reserved | Reset | RunFailed | Start | Submit | Unreachable | Welcome
    | WriterClear | WriterJoined
)  # fmt: skip
