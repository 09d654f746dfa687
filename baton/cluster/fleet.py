"""Fleet: the processes of one cluster on many nodes. It decides; a Placer acts (baton/cluster/on_ray.py).

    router, HTTP server     on the node where `serve` runs, at an address that does not change
    workers                 wherever there is a core or a GPU for each

    a process died              its owner starts it again, on the same node      owner.py, restarts.py
    an owner or node died       the Placer places the owner again                here: said, and reported
    it cannot run on a node     moved to another place, later and later          here
    a node is to go away        a successor is placed, and the worker drains     here

The router takes in whichever worker says Hello, so nobody has to be told where a worker is now.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Protocol

from baton.clock import Clock, monotonic
from baton.cluster.child import WORKERS
from baton.cluster.options import ClusterOptions
from baton.cluster.owner import API_KEYS, HOST, KEYS, Look, Order
from baton.cluster.restarts import Restarts
from baton.cluster.supervisor import FINAL
from baton.errors import InputError, WorkerLost
from baton.topology import Topology
from baton.wire.messages import ClusterInfo
from baton.wire.records import ProcessDown

ASK_S = 0.5  # between two looks at a process
DRAINING_S = 2.0  # between two looks for nodes that are to go away
WAITING_S = 30.0  # until the user is told that there is no place for a process
UNLISTED_S = 60.0
"""A worker that the router does not list comes back by itself if a link was cut, or the router is a new
one. After so long it counts as stuck, and its owner is told what the router says: it kills the worker."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Why an owner cannot answer, and whether the Placer starts it again by itself."""

    why: str
    placed_again: bool


@dataclass(frozen=True, slots=True)
class Needs:
    """What a process takes of a node."""

    cpus: int
    gpus: int
    here: bool  # on the node where `serve` runs


class Placer(Protocol):
    """Places owners on nodes, and places them again when they are gone."""

    def place(self, order: Order, needs: Needs) -> None: ...

    def ask(self, name: str, info: ClusterInfo | None) -> None:
        """Ask the owner for a Look; does nothing while the last answer is still to come."""

    def answers(self) -> Sequence[tuple[str, Look | Lost]]:
        """What has been answered since the last call."""

    def leave(self, name: str) -> None:
        """Let the process drain and end."""

    def move(self, name: str) -> None:
        """End the owner, and place it again."""

    def remove(self, names: Sequence[str]) -> None:
        """End the owners for good."""

    def draining(self) -> frozenset[str]:
        """Ids of nodes that are to go away."""


@dataclass(slots=True)
class Member:
    """One process and what is known of it."""

    order: Order
    needs: Needs
    placed: float  # when it was, or had to be, placed last
    device: str = ""
    look: Look | None = None
    lost: str = ""  # why its owner does not answer
    waits: bool = False  # the user knows that there is no place
    leaving: bool = False
    listed: bool = False  # by the router
    unlisted_since: float = inf  # it was listed, and is not any more
    restarts: Restarts = field(default_factory=Restarts)  # of its owner


class Fleet:
    """Call check() once a second or more often; it never blocks."""

    def __init__(
        self,
        placer: Placer,
        options: ClusterOptions,
        *,
        host: str,
        port: int,
        version: str,
        keys: Mapping[str, bytes],
        clock: Clock = monotonic,
    ) -> None:
        """`host`: the address of this node. `port`: a free one, for the router. `keys`: files."""
        self.options = options
        self.address = f"tcp://{host}:{port}"
        self._placer, self._clock = placer, clock
        self._version, self._keys = version, keys
        self._members: dict[str, Member] = {}
        self._next = dict.fromkeys(WORKERS, 0)  # number of the next worker of a role
        self._info: ClusterInfo | None = None
        self._was_ready = False
        self._asked = self._looked_for_draining = -inf

    # ---- what runs

    def start(self, server: Sequence[str], api_keys: bytes = b"") -> None:
        """Place everything. `server`: the options of the HTTP server."""
        options = self.options
        router = ["router", "--address", self.address, *options.arguments("router"), "--keys", KEYS]
        router += ["--batch-size", str(options.batch_size)]
        router += ["--colocated"] if options.topology.colocated else []
        self._place("router", router, Needs(0, 0, here=True))
        topology = options.topology
        for role, devices in zip(
            WORKERS, (topology.prefill_devices, topology.decode_devices), strict=True
        ):
            for device in devices:
                self._place_worker(role, device)
        front = ["baton.server", "--router", self.address, "--keys", KEYS, *server]
        front += ["--api-key-file", API_KEYS] if api_keys else []
        self._place("server", front, Needs(0, 0, here=True), api_keys=api_keys)

    def _place_worker(self, role: str, device: str) -> str:
        name = f"{role}-{self._next[role]}"
        self._next[role] += 1
        command = [f"{role}_worker", "--router", self.address, *self.options.worker_arguments(role)]
        command += ["--device", "cuda:0" if device == "cuda" else device, "--name", name]
        command += ["--keys", KEYS]
        if role == "decode":
            command += ["--max-num-seqs", str(self.options.batch_size), "--kv-host", HOST]
        needs = Needs(1, self.options.ranks(role) if device == "cuda" else 0, here=False)
        self._place(name, command, needs, device=device)
        return name

    def _place(
        self,
        name: str,
        command: list[str],
        needs: Needs,
        *,
        device: str = "",
        api_keys: bytes = b"",
    ) -> None:
        keys = self._keys if name == "router" else _without_router_secret(self._keys)
        order = Order(name, tuple(command), self.options, self._version, keys, api_keys)
        self._members[name] = Member(order, needs, self._clock(), device)
        self._placer.place(order, needs)

    def leave(self, name: str) -> None:
        """Let a process drain; it is forgotten when it has ended."""
        self._members[name].leaving = True
        self._placer.leave(name)

    def has(self, name: str) -> bool:
        """Whether this process is still looked after."""
        return name in self._members

    def down(self) -> tuple[ProcessDown, ...]:
        """The processes that do not work now: for the router."""
        found: list[ProcessDown] = []
        now = self._clock()
        for name, each in self._members.items():
            found += each.look.down if each.look is not None else ()
            if each.lost:
                deaths = each.restarts.recent_deaths(now)
                log = "the logs of its owner"
                found.append(ProcessDown(name, each.order.role, deaths, each.lost, 0.0, log))
        return tuple(found)

    # ---- while it runs

    def check(self, info: ClusterInfo | None = None) -> list[str]:
        """Take in what owners and the router say. Returns notices for the user. Raises the error of a
        process for which a restart cannot help, if the cluster was never ready."""
        now = self._clock()
        if info is not None:
            self._take_info(info, now)
        notes: list[str] = []
        for name, answer in self._placer.answers():
            if (member := self._members.get(name)) is None:
                continue
            if isinstance(answer, Look):
                notes += self._take_look(name, member, answer, now)
            else:
                notes += self._take_loss(name, member, answer, now)
        notes += [*self._move_on(now)]
        if now - self._asked >= ASK_S:
            self._asked = now
            for name, member in self._members.items():
                self._placer.ask(name, self._certain(member, now))
        return notes

    def _take_info(self, info: ClusterInfo, now: float) -> None:
        self._info = info
        self._was_ready |= info.ready
        listed = {worker.worker.rpartition(".")[0] for worker in info.workers}
        for name, member in self._members.items():
            if name in listed:
                member.unlisted_since = inf
                member.restarts.serves(now)
            elif member.listed:
                member.unlisted_since = now
                member.restarts.serves_no_more(now)
            member.listed = name in listed

    def _certain(self, member: Member, now: float) -> ClusterInfo | None:
        """What the router says, unless it does not list this worker and that may be for a good reason."""
        info = self._info
        if info is None or member.order.role not in WORKERS:
            return info
        listed = {worker.worker.rpartition(".")[0] for worker in info.workers}
        if member.order.name in listed or now - member.unlisted_since >= UNLISTED_S:
            return info
        return None

    def _take_look(self, name: str, member: Member, look: Look, now: float) -> list[str]:
        before, member.look = member.look, look
        notes = [f"{look.host}: {note}" for note in look.notes]
        if member.lost or before is None or before.node != look.node:
            notes.insert(0, f"{name} runs on {look.host}")
        member.lost, member.waits = "", False
        if member.leaving and not look.runs:
            self._forget(name)
            return [*notes, f"{name} has left {look.host}"]
        if not look.exit_code or member.leaving or member.restarts.due is not None:
            return notes
        if not self._was_ready:
            raise FINAL.get(look.exit_code, WorkerLost)(f"{name} on {look.host}: {look.why}")
        wait_s = member.restarts.died(now)
        return [
            *notes,
            f"{name} cannot run on {look.host} ({look.why}); placed again in {wait_s:g} s",
        ]

    def _take_loss(self, name: str, member: Member, lost: Lost, now: float) -> list[str]:
        if member.leaving:  # it had to end anyway
            self._forget(name)
            return []
        known, member.lost = bool(member.lost), lost.why
        if member.restarts.due is not None or (known and lost.placed_again):
            return []
        member.look, member.placed = None, now
        member.listed, member.unlisted_since = False, inf
        wait_s = member.restarts.died(now)
        if lost.placed_again:
            member.restarts.started()
            return [f"{name}: {lost.why}; it is placed again"]
        return [f"{name}: {lost.why}; it is placed again in {wait_s:g} s"]

    def _forget(self, name: str) -> None:
        self._placer.remove([name])
        del self._members[name]

    def _move_on(self, now: float) -> Iterator[str]:
        """What time requires: moves that are due, nodes that go away, places that are missing."""
        for name, member in self._members.items():
            due = member.restarts.due
            if due is not None and now >= due:
                member.restarts.started()
                member.look, member.placed = None, now
                self._placer.move(name)
            if member.look is None and not member.waits and now - member.placed >= WAITING_S:
                member.waits = True
                what = (
                    "a free GPU" if member.needs.gpus else "a free CPU" if member.needs.cpus else ""
                )
                place = f"a node with {what}" if what else "this node"
                yield f"{name} waits for {place} to take it in"
        if now - self._looked_for_draining >= DRAINING_S:
            self._looked_for_draining = now
            yield from self._leave_nodes(self._placer.draining())

    def _leave_nodes(self, draining: frozenset[str]) -> Iterator[str]:
        for name, member in list(self._members.items()):
            if member.look is None or member.look.node not in draining or member.leaving:
                continue
            if member.order.role in WORKERS:
                successor = self._place_worker(member.order.role, member.device)
                self.leave(name)
                yield f"{name} drains: its node {member.look.host} goes away; {successor} follows it"

    def stop(self) -> None:
        """End everything."""
        self._placer.remove(list(self._members))
        self._members.clear()


def with_devices(options: ClusterOptions, gpus: int) -> ClusterOptions:
    """The options with cuda in place of `auto` if the Ray cluster has `gpus`, else cpu. Raises InputError
    if it has some, but not enough."""
    topology = options.topology
    wanted = [*topology.prefill_devices, *topology.decode_devices]
    roles = ["prefill"] * len(topology.prefill_devices) + ["decode"] * len(topology.decode_devices)
    needed = sum(options.ranks(r) for r, w in zip(roles, wanted, strict=True) if w != "cpu")
    if "auto" in wanted and 0 < gpus < needed:
        raise InputError(
            f"the workers need {needed} GPUs, and the Ray cluster has {gpus}: start fewer, or give "
            "--prefill-device or --decode-device cpu"
        )
    found = "cuda" if gpus else "cpu"
    prefill, decode = (
        tuple(found if each == "auto" else each for each in devices)
        for devices in (topology.prefill_devices, topology.decode_devices)
    )
    return replace(options, topology=Topology(prefill, decode, topology.colocated))


def _without_router_secret(keys: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: key for name, key in keys.items() if name != "router.secret"}
