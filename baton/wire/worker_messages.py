"""What the router and the workers say to each other. The whole picture: baton/wire/messages.py."""

from dataclasses import dataclass

from baton.kv.grant import Grant
from baton.kv.region import Plain, Receipt, Region

# ---- worker -> router -------------------------------------------------------------------------


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
class Beat:
    """I am alive: sent from the step loop, both ways, so a wedged process falls silent."""

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
class Token:
    """One sampled token, for this position of the sequence: a gap is noticed. `finish` is set with a
    run's last one: stop (an EOS id) or length."""

    run: str
    position: int
    token_id: int
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one decode step produced."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Broke:
    """One run cannot go on (numerical_error, ...); its neighbours are not touched."""

    run: str
    code: str
    message: str


# ---- router -> worker -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """The worker is in. `pid` lets a worker on the same host see the router's death at once."""

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
    """Set blocks aside for so many tokens: those that are known, and a few of those to come; the run
    grows later. `chain` names what will be in the first of them (baton/kv/prefix.py), the root
    before them."""

    run: str
    tokens: int
    chain: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Renew:
    """The leases of these runs are still wanted."""

    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FillJob:
    """Compute KV for these tokens (a prompt without its last) into the granted blocks."""

    grant: Grant
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fill:
    """One batch of prompts, filled together."""

    jobs: tuple[FillJob, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """Stop writing under this run; answered with Released, always."""

    run: str


@dataclass(frozen=True, slots=True)
class Start:
    """Decode from here. `receipt` is None where nobody filled the blocks: decode computes the KV of
    all tokens itself. The last of `token_ids` is decode's first step, in either case."""

    run: str
    token_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Plain
    eos_token_ids: tuple[int, ...]
    receipt: Receipt | None = None


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
