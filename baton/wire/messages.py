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

Messages of workers name *runs* ("7f3a#5", "7f3a#9": the attempts at a request), those of clients name
requests; the router translates. Every message is a frozen dataclass of plain values; baton.wire.codec
checks each field's type and bounds (baton/bounds.py) on arrival. client_messages.py defines those of
clients, adapter_messages.py those about adapters, local_messages.py what is never sent; all are
imported from here.
"""

from dataclasses import dataclass
from typing import Annotated

from baton.adapters.changes import NONE, Changes
from baton.adapters.identity import Adapters
from baton.bounds import (
    LIST_MAX,
    Blocks,
    Bytes,
    Count,
    Digest,
    Ids,
    Line,
    Name,
    OptionalName,
    Pid,
    Protocol,
    Range,
    Rate,
    RunName,
    Seconds,
    Size,
    Tokens,
    TotalSeconds,
    Vector,
)
from baton.kv.grant import Grant
from baton.kv.region import Receipt, Regions
from baton.params import GenerationParams
from baton.wire.adapter_messages import AdapterChanged as AdapterChanged
from baton.wire.adapter_messages import AdaptersHeld as AdaptersHeld
from baton.wire.adapter_messages import LoadAdapter as LoadAdapter
from baton.wire.adapter_messages import UnloadAdapter as UnloadAdapter
from baton.wire.adapter_messages import UseAdapters as UseAdapters
from baton.wire.client_messages import Abort as Abort
from baton.wire.client_messages import Accepted as Accepted
from baton.wire.client_messages import ClusterInfo as ClusterInfo
from baton.wire.client_messages import Emissions as Emissions
from baton.wire.client_messages import Emitted as Emitted
from baton.wire.client_messages import Failed as Failed
from baton.wire.client_messages import Finished as Finished
from baton.wire.client_messages import GetClusterInfo as GetClusterInfo
from baton.wire.client_messages import Observe as Observe
from baton.wire.client_messages import Observed as Observed
from baton.wire.client_messages import PromptScored as PromptScored
from baton.wire.client_messages import Submit as Submit
from baton.wire.client_messages import Supervised as Supervised
from baton.wire.local_messages import Exited as Exited
from baton.wire.local_messages import Malformed as Malformed
from baton.wire.local_messages import Terminate as Terminate
from baton.wire.local_messages import Unreachable as Unreachable
from baton.wire.records import Ages, Logprobs, Speed, Work

PROTOCOL = 9


# ---- router -> worker -----


@dataclass(frozen=True, slots=True)
class Welcome:
    """The worker has joined. A worker on the same host watches the router's `pid`."""

    epoch: Name
    host: Name
    pid: Pid


@dataclass(frozen=True, slots=True)
class Refused:
    """The worker cannot join. It prints `why` and exits with code 4."""

    why: Line


@dataclass(frozen=True, slots=True)
class Reset:
    """The router gave this worker up: drop everything and say Hello with a new epoch."""

    why: Line


@dataclass(frozen=True, slots=True)
class Dismissed:
    """The answer to Leaving, once nothing runs on this worker: it may end its process."""


@dataclass(frozen=True, slots=True)
class Attach:
    """To prefill: open a link to this decode worker's pool."""

    worker: Name
    epoch: Name
    regions: Regions


@dataclass(frozen=True, slots=True)
class Detach:
    """To prefill: this decode worker is gone; close the link and drop its fills."""

    worker: Name
    epoch: Name


@dataclass(frozen=True, slots=True)
class WriterJoined:
    """To decode: this prefill worker can write to your pool by this transport. No earlier write of it
    can still arrive. On the same `host` its `pid` can be watched."""

    writer: Name
    host: Name
    pid: Pid
    transport: Name


@dataclass(frozen=True, slots=True)
class WriterClear:
    """To decode: this writer is dead or has restarted, so that no earlier write of it can still arrive;
    or its transport can shut it out (baton/kv/transports.py), which decode then does."""

    writer: Name


@dataclass(frozen=True, slots=True)
class Reserve:
    """Reserve blocks for so many tokens: the known ones and a few more. `block_hashes`
    (baton/kv/prefix.py) are the root and those of the first blocks."""

    run: RunName
    tokens: Tokens
    block_hashes: Annotated[tuple[Digest, ...], Size(0, LIST_MAX)] = ()


@dataclass(frozen=True, slots=True)
class Renew:
    """Extend the leases of these runs."""

    runs: Annotated[tuple[RunName, ...], Size(0, LIST_MAX)]


@dataclass(frozen=True, slots=True)
class Fill:
    """Compute KV for these tokens (a prompt without its last) into the granted blocks. The Fills of a
    batch are sent together. `rope_floor`: see baton/rope.py. With `pooling`: compute the embedding of the
    tokens, all of them; the blocks are room for it, and nothing in them is kept. `adapter`: the digest of
    the one to apply, as in GenerationParams. `block_hashes` (baton/kv/prefix.py): of the full blocks, if
    the prefill worker may keep their KV."""

    grant: Grant
    token_ids: Ids
    rope_floor: Tokens = 0
    pooling: OptionalName = ""
    adapter: OptionalName = ""
    block_hashes: Annotated[tuple[Digest, ...], Size(0, LIST_MAX)] = ()


@dataclass(frozen=True, slots=True)
class Drop:
    """Stop writing for this run. Always answered with Released."""

    run: RunName


@dataclass(frozen=True, slots=True)
class Start:
    """Decode from here. The first `prompt_tokens` of `token_ids` are the prompt; the others come from an
    earlier run and count against `max_new_tokens`. The last token is decode's first step. Without a
    `receipt` the blocks are not filled, and decode computes the KV itself. `params` are resolved();
    prompt_logprobs are set only if nothing is filled or cached. `itl_s`: while decode computes the
    prompt, its streams want a token within so many seconds of the one before; 0: no limit."""

    run: RunName
    token_ids: Ids
    prompt_tokens: Tokens
    params: GenerationParams
    receipt: Receipt | None = None
    itl_s: Seconds = 0.0

    def __post_init__(self) -> None:
        if self.params.sampling is None:
            raise ValueError("Start.params must be resolved: sampling is missing")


@dataclass(frozen=True, slots=True)
class Cores:
    """Compute on these cores of the host from the next step on."""

    cores: Annotated[tuple[Annotated[int, Range(0, 2**16)], ...], Size(0, 2**16)]


@dataclass(frozen=True, slots=True)
class Cancel:
    """The run is over: free its blocks. If the prefill worker `writer` may still be writing into them,
    they go to quarantine until it has stopped."""

    run: RunName
    writer: Name | None = None


# ---- worker -> router ----


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker asks to join. If it does not fit, it is Refused, with both values named. `epoch` changes
    with every restart and every Reset. `patience_s`: longest silence, that is, longest step."""

    role: Name
    worker: Name
    epoch: Name
    protocol: Protocol
    host: Name
    pid: Pid
    device: Line
    model: Name  # fingerprint
    dtype: Name
    layout: Name  # KVLayout.fingerprint
    block_size: Tokens
    block_bytes: Bytes
    blocks: Blocks  # of a decode worker's pool; an engine's: requests at once; 0 for prefill
    regions: Regions
    patience_s: Seconds
    load_s: TotalSeconds
    how: Line = ""  # engine backend, for people
    takes_cores: bool = False  # it computes on the cores that the router assigns
    adapters: Adapters = ()  # of --lora, sorted by name; all workers of a cluster have the same
    changes: Changes = NONE  # the last that a router told this process
    kv_dtype: OptionalName = ""  # of its KV cache; an engine has none


@dataclass(frozen=True, slots=True)
class Leaving:
    """A worker will end (SIGTERM): it gets no new work and finishes what runs there. When nothing is left
    the router sends Dismissed. After `within_s` it ends anyway, and what still runs is moved."""

    within_s: Seconds


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent from the step loop, in both directions, so a wedged process falls silent. `work`: of a worker
    that computes. `speeds`: what it has learnt of its forwards, by cores; the present one first. `idle`:
    the same of forwards with one request and nothing else.
    `requests`: how many took part in the forwards of which `speeds` tells, on average."""

    epoch: Name
    steps: Count
    work: Work | None = None
    speeds: Annotated[tuple[Speed, ...], Size(0, 256)] = ()
    idle: Annotated[tuple[Speed, ...], Size(0, 256)] = ()
    requests: Annotated[float, Range(0, 2**31)] = 1.0


@dataclass(frozen=True, slots=True)
class Attached:
    """A prefill worker can write to this decode worker's pool."""

    worker: Name
    epoch: Name
    transport: Name
    gb_per_s: Rate  # measured at attach; 0 if nothing has to be moved
    why: Line  # which better transports do not work, and why


@dataclass(frozen=True, slots=True)
class AttachFailed:
    """A prefill worker cannot write to this decode worker's pool."""

    worker: Name
    epoch: Name
    why: Line


@dataclass(frozen=True, slots=True)
class WayLost:
    """A prefill worker can no longer write to this decode worker's pool, and has given up all fills of
    it. The KV of these `runs` has perhaps not arrived, although it was sent."""

    worker: Name
    epoch: Name
    why: Line
    runs: Annotated[tuple[RunName, ...], Size(0, LIST_MAX)]


@dataclass(frozen=True, slots=True)
class Reserved:
    """Blocks are reserved for the run, under a lease."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class Deferred:
    """No room for the run now."""

    run: RunName


@dataclass(frozen=True, slots=True)
class Preempted:
    """The run has given its blocks back: the pool is full and an older run needs them."""

    run: RunName


@dataclass(frozen=True, slots=True)
class Outgrown:
    """The run has given its blocks back: at its length all its KV must be computed again, with other
    rotary frequencies (baton/rope.py)."""

    run: RunName


@dataclass(frozen=True, slots=True)
class Expired:
    """The run's lease ended before it was started; its blocks are released."""

    run: RunName


@dataclass(frozen=True, slots=True)
class ChunkFilled:
    """The first `tokens` of the run's prompt are computed, but not all: a sign of progress, and for
    observers."""

    run: RunName
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Filled:
    """The run's blocks hold the KV of all prompt tokens but the last. The writer has stopped writing.
    `reused`: first tokens whose KV it did not compute, because it was there."""

    run: RunName
    receipt: Receipt
    compute_s: Seconds
    reused: Tokens = 0


@dataclass(frozen=True, slots=True)
class Embedded:
    """The embedding of the run's tokens, of length 1. The writer has stopped writing."""

    run: RunName
    vector: Vector
    compute_s: Seconds


@dataclass(frozen=True, slots=True)
class FillFailed:
    """The run could not be filled. The writer has stopped writing."""

    run: RunName
    why: Line


@dataclass(frozen=True, slots=True)
class Released:
    """The writer has stopped writing for this run: the answer to Drop. The router sets `writer` and
    passes it on to decode."""

    run: RunName
    writer: OptionalName = ""


@dataclass(frozen=True, slots=True)
class FillRefused:
    """Decode found the filled blocks incomplete or damaged, and has released them. `missing`: part of
    what was sent never came, so the way from the prefill worker is at fault."""

    run: RunName
    why: Line
    missing: bool = False


@dataclass(frozen=True, slots=True)
class RunTokens:
    """Sampled tokens of one run. `position` is that of the first, so a gap is noticed. `finish` is set
    with a run's last: stop or length. `logprobs`: one for each, if requested. `ages`: seconds since each
    was sampled; empty: just now."""

    run: RunName
    position: Tokens
    token_ids: Ids
    finish: Name | None = None
    logprobs: Logprobs = ()
    ages: Ages = ()


@dataclass(frozen=True, slots=True)
class Decoded:
    """Tokens of one decode step, or of several (see GenerationParams.stream_interval_s)."""

    runs: Annotated[tuple[RunTokens, ...], Size(0, LIST_MAX)]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs of the run's prompt tokens but the first."""

    run: RunName
    logprobs: Logprobs


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A decode worker's KV pool, in blocks. Sent after changes, at most a few times a second."""

    free: Blocks  # cached ones included
    cached: Blocks
    quarantined: Blocks


@dataclass(frozen=True, slots=True)
class RunFailed:
    """One run cannot continue (numerical_error, ...). Other runs are not affected."""

    run: RunName
    code: Name
    message: Line


@dataclass(frozen=True, slots=True)
class Paused:
    """An engine worker takes no new runs, and why; empty: it does again. What runs there goes on. `busy`:
    it serves, and has enough to do."""

    why: Line
    busy: bool


@dataclass(frozen=True, slots=True)
class RunReturned:
    """An engine worker cannot go on with the run; another one may, from its last token. `suspect`: the
    run may be at fault, as for the death of a worker."""

    run: RunName
    why: Line
    suspect: bool


LOCAL = (Exited, Unreachable, Malformed, Terminate)
"""Messages of a process to its own node: the codec refuses them from a socket."""

Message = (
    Abort | Accepted | AdapterChanged | AdaptersHeld | Attach | AttachFailed | Attached | Cancel
    | ChunkFilled | ClusterInfo | Cores | Decoded | Deferred | Detach | Dismissed | Drop | Embedded
    | Emissions | Emitted | Exited | Expired | Failed | Fill | FillFailed | FillRefused | Filled
    | Finished | GetClusterInfo | Heartbeat | Hello | Leaving | LoadAdapter | Malformed | Observe
    | Observed | Outgrown | Paused | PoolStats | Preempted | PromptLogprobs | PromptScored | Refused
    | Released | Renew | Reserve | Reserved | Reset | RunFailed | RunReturned | Start | Submit
    | Supervised | Terminate | UnloadAdapter | Unreachable | UseAdapters | WayLost | Welcome
    | WriterClear | WriterJoined
)  # fmt: skip
