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

from baton.wire.client_messages import (
    Abort,
    Accepted,
    ClusterInfo,
    Counts,
    Emissions,
    Emitted,
    Ended,
    Failed,
    Finished,
    Inquire,
    Observe,
    Observed,
    PoolInfo,
    PromptScored,
    Submit,
    Timings,
    WorkerInfo,
)
from baton.wire.orders import (
    Attach,
    Cancel,
    Cores,
    Detach,
    Drop,
    Fill,
    FillJob,
    Refused,
    Renew,
    Reserve,
    Reset,
    Start,
    Welcome,
    WriterClear,
    WriterJoined,
)
from baton.wire.reports import (
    Attached,
    AttachFailed,
    Beat,
    Broke,
    ChunkFilled,
    Decoded,
    Deferred,
    Expired,
    Filled,
    FillFailed,
    FillRefused,
    Hello,
    Pool,
    Preempted,
    Released,
    Reserved,
    Said,
    Scored,
)

PROTOCOL = 5


@dataclass(frozen=True, slots=True)
class Exited:
    """From the loop itself, never sent: the process behind this peer is proven dead."""

    peer: str


@dataclass(frozen=True, slots=True)
class Unreachable:
    """From the loop itself, never sent: a message to this peer could not be delivered. Its process
    may be alive, and busy."""

    peer: str


LOCAL = (Exited, Unreachable)
"""What only a loop may say to its own node: the codec takes none of it from a socket."""


Message = (
    Abort
    | Accepted
    | Attach
    | AttachFailed
    | Attached
    | Beat
    | Broke
    | Cancel
    | ClusterInfo
    | Cores
    | ChunkFilled
    | Decoded
    | Deferred
    | Detach
    | Drop
    | Emissions
    | Emitted
    | Expired
    | Failed
    | Fill
    | FillFailed
    | FillRefused
    | Filled
    | Finished
    | Hello
    | Inquire
    | Observe
    | Observed
    | Pool
    | Preempted
    | PromptScored
    | Refused
    | Released
    | Renew
    | Reserve
    | Reserved
    | Reset
    | Scored
    | Start
    | Submit
    | Welcome
    | WriterClear
    | WriterJoined
    | Exited
    | Unreachable
)

__all__ = [
    "LOCAL",
    "PROTOCOL",
    "Abort",
    "Accepted",
    "Attach",
    "AttachFailed",
    "Attached",
    "Beat",
    "Broke",
    "Cancel",
    "ChunkFilled",
    "ClusterInfo",
    "Cores",
    "Counts",
    "Decoded",
    "Deferred",
    "Detach",
    "Drop",
    "Emissions",
    "Emitted",
    "Ended",
    "Exited",
    "Expired",
    "Failed",
    "Fill",
    "FillFailed",
    "FillJob",
    "FillRefused",
    "Filled",
    "Finished",
    "Hello",
    "Inquire",
    "Message",
    "Observe",
    "Observed",
    "Pool",
    "PoolInfo",
    "Preempted",
    "PromptScored",
    "Refused",
    "Released",
    "Renew",
    "Reserve",
    "Reserved",
    "Reset",
    "Said",
    "Scored",
    "Start",
    "Submit",
    "Timings",
    "Unreachable",
    "Welcome",
    "WorkerInfo",
    "WriterClear",
    "WriterJoined",
]
