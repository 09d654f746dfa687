"""Messages between clients and the router. Part of baton.wire.messages, which names them all."""

from dataclasses import dataclass
from typing import Annotated

from baton.adapters.changes import NONE, Changes
from baton.adapters.identity import Adapters
from baton.bounds import (
    LIST_MAX,
    Content,
    Ids,
    Line,
    Name,
    OptionalName,
    OptionalPid,
    Range,
    Seconds,
    Size,
    Tokens,
    TotalSeconds,
    Vector,
)
from baton.params import GenerationParams
from baton.timeline import Moment
from baton.wire.records import (
    Ages,
    Counts,
    Ended,
    FirstToken,
    Logprobs,
    ProcessDown,
    Timings,
    WorkerInfo,
)
from sampler.params import SamplingParams

# ---- client -> router


@dataclass(frozen=True, slots=True)
class GetClusterInfo:
    """Answered with ClusterInfo, and again after every change. `changes`: the last that this client was
    told by a router of the model with this `fingerprint`; a new router learns them so."""

    fingerprint: Line = ""
    changes: Changes = NONE


@dataclass(frozen=True, slots=True)
class Observe:
    """Follow all requests from now on: answered with a stream of Observed."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Continue this prompt: text, or token ids. Requests of one `tenant` (an API key, a client's address)
    share one fair part of the cluster, and those of one `group` (one HTTP request) one part of that.
    `queue_timeout_s`: it fails with queue_timeout if no worker has taken it by then; `timeout_s`: with
    deadline_exceeded if it has not ended by then. 0: no limit. `priority`: of its tenant's requests the
    lowest go first. `pooling` (baton/params.py): nothing is generated, and Finished has the embedding.
    `role_policy` (router/role_policy.py): who fills the prompt; "": what the router was started with."""

    request: Name
    prompt: Content | Ids
    params: GenerationParams
    tenant: OptionalName = ""
    group: OptionalName = ""
    queue_timeout_s: Seconds = 0.0
    timeout_s: Seconds = 0.0
    priority: Annotated[int, Range(-(2**31), 2**31 - 1)] = 0
    pooling: OptionalName = ""
    role_policy: OptionalName = ""


@dataclass(frozen=True, slots=True)
class Supervised:
    """From the process that starts this cluster's processes: those that do not run now. Sent after every
    change, and to each new router; an empty report withdraws the last one. Not answered."""

    down: Annotated[tuple[ProcessDown, ...], Size(0, 4096)]


@dataclass(frozen=True, slots=True)
class Abort:
    """The client no longer wants this request; it is answered with Finished(reason="abort")."""

    request: Name


# ---- router -> client


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """The served model and the workers. `ready`: requests can be served now. `degraded`: what is missing
    although requests are served, such as every prefill worker; empty if nothing is. `router_pid`: the
    router that says so, on its host; 0 if that is not known. `pool_tokens`: what the largest KV pool
    holds; 0 while there is none. `adapters`: those a request can be for, sorted by name. `changes`: how
    they came about."""

    ready: bool
    model: Line
    fingerprint: Line
    context: Tokens
    vocabulary: Tokens
    dtype: Line
    sampling: SamplingParams  # the model's own defaults
    workers: Annotated[tuple[WorkerInfo, ...], Size(0, 4096)]
    waiting_for: Line  # what is missing while not ready, for people
    degraded: Line = ""
    router_pid: OptionalPid = 0
    pool_tokens: Tokens = 0
    adapters: Adapters = ()
    changes: Changes = NONE
    kv_dtype: Line = ""  # of the KV cache


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is in the ledger: it will end with exactly one Finished or Failed."""

    request: Name
    prompt_tokens: Tokens
    tokenize_s: TotalSeconds


@dataclass(frozen=True, slots=True)
class Emitted:
    """New tokens, and the text they complete: never half a character, never part of a stop string.
    `logprobs`: one for each token, if requested. `ages`: seconds since each was sampled, if some were
    delayed (stream_interval_s)."""

    request: Name
    token_ids: Ids
    text: Content
    logprobs: Logprobs = ()
    ages: Ages = ()


@dataclass(frozen=True, slots=True)
class Emissions:
    """New tokens of several requests of one client, from one report of a decode worker."""

    emitted: Annotated[tuple[Emitted, ...], Size(0, LIST_MAX)]


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Logprobs of the prompt's tokens but the first. Sent once, before the first Emitted."""

    request: Name
    logprobs: Logprobs


@dataclass(frozen=True, slots=True)
class Finished:
    """A request has ended without error. `reason` is length, stop or abort; `stop` the stop string that
    was found; `embedding` what was asked for by Submit.pooling, of length 1."""

    request: Name
    reason: Name
    timings: Timings
    stop: Line = ""
    embedding: Vector = b""


@dataclass(frozen=True, slots=True)
class Failed:
    """A request has ended with an error. `code` is machine-readable (worker_lost, ...)."""

    request: Name
    code: Name
    message: Line


@dataclass(frozen=True, slots=True)
class Observed:
    """Events since the last Observed. `now` is the router's clock, like every `at`."""

    now: TotalSeconds
    moments: Annotated[tuple[Moment, ...], Size(0, LIST_MAX)]
    ended: Annotated[tuple[Ended, ...], Size(0, LIST_MAX)]
    counts: Counts | None  # once a second
    first: Annotated[tuple[FirstToken, ...], Size(0, LIST_MAX)] = ()
