"""What the workers say to the router: reports, past participles. The whole picture: messages.py."""

from dataclasses import dataclass

from baton.kv.grant import Grant
from baton.kv.region import Receipt, Region
from baton.request import Logprob


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
class ChunkFilled:
    """A chunk of the run's prompt is computed, up to this many tokens; more is to come. For those who
    watch: nothing hangs on it."""

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
class Said:
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
    """What one decode step produced, or several whose tokens could wait (see Start)."""

    runs: tuple[Said, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """How likely the run's prompt was: of each of its tokens but the first."""

    run: str
    logprobs: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Pool:
    """A decode worker's blocks, told when it changes, a few times a second at most."""

    free: int  # cached ones too
    cached: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class Broke:
    """One run cannot go on (numerical_error, ...); its neighbours are not touched."""

    run: str
    code: str
    message: str
