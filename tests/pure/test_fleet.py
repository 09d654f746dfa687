"""A cluster on many nodes: what is placed, what follows a death, a bad node, a node that goes away. The
Placer is a pretend one; Ray itself: tests/ray."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

import baton.server.__main__
import decode_worker.__main__
import prefill_worker.__main__
import router.__main__
from baton.cluster.fleet import UNLISTED_S, WAITING_S, Fleet, Lost, Needs, with_devices
from baton.cluster.options import ClusterOptions
from baton.cluster.owner import Look, Order
from baton.errors import InputError, ModelError, WorkerLost
from baton.topology import Topology
from baton.wire.keys import NAMES
from baton.wire.messages import ClusterInfo
from baton.wire.records import ProcessDown, WorkerInfo
from sampler.params import SamplingParams

OPTIONS = ClusterOptions("demo", Topology(("cpu",), ("cpu", "cpu")), batch_size=4)
KEYS = {name: name.encode() for name in NAMES}
EVERYONE = ("router", "prefill-0", "decode-0", "decode-1", "server")
GONE = Lost("its owner or its node is gone", placed_again=True)
COMMANDS = {
    "router": router.__main__.main, "prefill_worker": prefill_worker.__main__.main,
    "decode_worker": decode_worker.__main__.main, "baton.server": baton.server.__main__.main,
}  # fmt: skip


@dataclass
class PretendPlacer:
    """Notes what it is told."""

    placed: dict[str, tuple[Order, Needs]] = field(default_factory=dict)
    asked: dict[str, ClusterInfo | None] = field(default_factory=dict)
    to_answer: list[tuple[str, Look | Lost]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    going: set[str] = field(default_factory=set)

    def place(self, order: Order, needs: Needs) -> None:
        self.placed[order.name] = (order, needs)

    def ask(self, name: str, info: ClusterInfo | None) -> None:
        self.asked[name] = info

    def answers(self) -> Sequence[tuple[str, Look | Lost]]:
        found, self.to_answer = self.to_answer, []
        return found

    def leave(self, name: str) -> None:
        self.left.append(name)

    def move(self, name: str) -> None:
        self.moved.append(name)

    def remove(self, names: Sequence[str]) -> None:
        self.removed += names

    def draining(self) -> frozenset[str]:
        return frozenset(self.going)


class Scene:
    """A fleet under a pretend clock; process i runs on node i."""

    def __init__(self, options: ClusterOptions = OPTIONS) -> None:
        self.now = 100.0
        self.placer = PretendPlacer()
        self.fleet = Fleet(
            self.placer, options, host="10.0.0.1", port=7000, version="1", keys=KEYS,
            clock=lambda: self.now,
        )  # fmt: skip
        self.fleet.start(["--port", "8000", "--model", "demo"], b"secret\n")

    def answer(self, *names: str, **changes: object) -> list[str]:
        """These owners answer: the process runs, or what is changed of that."""
        for name in names:
            look = Look(f"host-{name}", f"node-{name}", True)
            self.placer.to_answer.append((name, replace(look, **changes)))  # type: ignore[arg-type]
        return self.fleet.check()

    def lose(self, name: str, lost: Lost = GONE) -> list[str]:
        self.placer.to_answer.append((name, lost))
        return self.fleet.check()

    def info(self, *names: str, ready: bool = True) -> list[str]:
        """The router lists these workers."""
        workers = tuple(WorkerInfo(f"{n}.abc", n.partition("-")[0], "cpu", "alive") for n in names)
        return self.fleet.check(
            ClusterInfo(ready, "demo", "f", 9, 9, "float32", SamplingParams(), workers, "")
        )

    def serve(self) -> None:
        """Everything runs and is ready."""
        self.answer(*EVERYONE)
        self.info("prefill-0", "decode-0", "decode-1")

    def after(self, seconds: float) -> list[str]:
        self.now += seconds
        return self.fleet.check()


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_every_process_is_placed_with_a_command_that_parses(scene: Scene) -> None:
    assert tuple(scene.placer.placed) == EVERYONE
    for order, _ in scene.placer.placed.values():
        module, *arguments = order.command
        with COMMANDS[module].make_context(module, arguments) as context:
            given = context.params
        assert given["model"] == "demo"
        assert given.get("router", given.get("address")) == "tcp://10.0.0.1:7000"
        assert str(given["keys"]) == "{keys}"


def test_front_processes_stay_here_and_workers_take_what_their_device_is() -> None:
    scene = Scene(replace(OPTIONS, topology=Topology(("cpu",), ("cuda",))))
    needs = {name: needs for name, (_, needs) in scene.placer.placed.items()}
    assert needs["router"] == needs["server"] == Needs(0, 0, here=True)
    assert needs["prefill-0"] == Needs(1, 0, here=False)
    assert needs["decode-0"] == Needs(1, 1, here=False)
    assert "cuda:0" in scene.placer.placed["decode-0"][0].command  # the only one that Ray shows it


def test_only_the_router_gets_its_secret_and_only_the_server_the_api_keys(scene: Scene) -> None:
    for name, (order, _) in scene.placer.placed.items():
        assert ("router.secret" in order.keys) == (name == "router")
        assert bool(order.api_keys) == (name == "server")
        assert "secret" not in repr(order).replace("router.secret", "")


@pytest.mark.parametrize(
    ("gpus", "prefill", "decode"),
    [(0, ("cpu",), ("cpu", "cpu")), (3, ("cuda",), ("cuda", "cuda"))],
)
def test_auto_is_what_the_cluster_has(
    gpus: int, prefill: tuple[str, ...], decode: tuple[str, ...]
) -> None:
    options = replace(OPTIONS, topology=Topology(("auto",), ("auto", "auto")))
    found = with_devices(options, gpus).topology
    assert (found.prefill_devices, found.decode_devices) == (prefill, decode)


def test_too_few_gpus_for_auto_are_said_and_named_ones_wait() -> None:
    options = replace(OPTIONS, topology=Topology(("auto",), ("auto", "cpu")))
    with pytest.raises(InputError, match="the workers need 2 GPUs, and the Ray cluster has 1"):
        with_devices(options, 1)
    named = replace(OPTIONS, topology=Topology(("cuda",), ("cuda",)))
    assert with_devices(named, 0) == named  # a cluster that scales may get them


def test_a_lost_owner_is_said_once_reported_and_forgotten_when_it_is_back(scene: Scene) -> None:
    scene.serve()
    assert scene.lose("decode-0") == [f"decode-0: {GONE.why}; it is placed again"]
    assert scene.lose("decode-0") == []
    assert [(each.name, each.role) for each in scene.fleet.down()] == [("decode-0", "decode")]
    assert scene.answer("decode-0", node="other", host="b") == ["decode-0 runs on b"]
    assert scene.fleet.down() == ()
    assert scene.placer.moved == []  # Ray did it


def test_an_owner_that_cannot_be_made_is_placed_anew_later_and_later(scene: Scene) -> None:
    scene.serve()
    broken = Lost("no space left on device", placed_again=False)
    for wait_s, moves in ((0.0, 1), (0.5, 2), (1.0, 3)):
        assert scene.lose("decode-0", broken)[0].endswith(f"is placed again in {wait_s:g} s")
        if wait_s:
            assert scene.lose("decode-0", broken) == []  # the same again
        scene.after(wait_s)
        assert scene.placer.moved == ["decode-0"] * moves


def test_a_process_that_cannot_run_ends_a_start(scene: Scene) -> None:
    with pytest.raises(ModelError, match="decode-0 on host-decode-0: no such model"):
        scene.answer("decode-0", runs=False, exit_code=3, why="no such model")
    with pytest.raises(WorkerLost, match="died 5 times"):
        scene.answer("prefill-0", runs=False, exit_code=1, why="prefill-0 died 5 times")


def test_a_process_that_cannot_run_on_a_node_is_moved_once_the_cluster_serves(scene: Scene) -> None:
    scene.serve()
    (note,) = scene.answer("decode-0", runs=False, exit_code=3, why="no such model")
    assert "cannot run on host-decode-0 (no such model); placed again" in note
    scene.after(1.0)
    assert scene.placer.moved == ["decode-0"]


def test_a_node_that_goes_away_gets_successors_before_its_workers_leave(scene: Scene) -> None:
    scene.serve()
    scene.placer.going = {"node-decode-0", "node-router"}
    (note,) = scene.after(10.0)
    assert "decode-0 drains" in note
    assert "decode-2 follows it" in note
    assert scene.placer.left == ["decode-0"]
    assert "decode-2" in scene.placer.placed["decode-2"][0].command
    assert scene.after(10.0) == []  # once
    assert scene.answer("decode-0", runs=True) == []
    assert scene.answer("decode-0", runs=False) == ["decode-0 has left host-decode-0"]
    assert scene.placer.removed == ["decode-0"]
    assert not scene.fleet.has("decode-0")
    assert scene.fleet.down() == ()


def test_a_leaving_process_whose_node_dies_is_not_placed_again(scene: Scene) -> None:
    scene.serve()
    scene.fleet.leave("decode-1")
    assert scene.lose("decode-1") == []
    assert scene.placer.removed == ["decode-1"]


def test_an_owner_hears_that_its_worker_is_not_listed_only_after_a_while(scene: Scene) -> None:
    """A new router lists nobody at first, and a cut link comes back: neither is a reason to kill it."""
    scene.serve()
    scene.now += 1000.0
    scene.info("prefill-0", "decode-1")  # the first news for a long time
    scene.after(1.0)
    assert scene.placer.asked["decode-0"] is None
    assert scene.placer.asked["decode-1"] is not None
    scene.after(UNLISTED_S - 1.5)
    assert scene.placer.asked["decode-0"] is None
    scene.after(1.0)
    assert scene.placer.asked["decode-0"] is not None


def test_a_worker_that_was_never_listed_has_all_the_time_to_load(scene: Scene) -> None:
    scene.answer(*EVERYONE)
    scene.info("prefill-0", ready=False)
    scene.after(10 * UNLISTED_S)
    assert scene.placer.asked["decode-0"] is None


def test_what_has_no_place_is_said_once(scene: Scene) -> None:
    scene.answer(*(name for name in EVERYONE if name != "decode-1"))
    assert scene.after(WAITING_S) == ["decode-1 waits for a node with a free CPU to take it in"]
    assert scene.after(WAITING_S) == []
    assert scene.answer("decode-1") == ["decode-1 runs on host-decode-1"]


def test_what_died_is_reported_to_the_router_with_its_node(scene: Scene) -> None:
    down = ProcessDown("decode-0", "decode", 2, "signal 9", 0.5, "10.0.0.2:/tmp/log")
    scene.serve()
    notes = scene.answer("decode-0", runs=False, down=(down,), notes=("decode-0 died",))
    assert notes == ["host-decode-0: decode-0 died"]
    assert scene.fleet.down() == (down,)


def test_at_the_end_nothing_is_left(scene: Scene) -> None:
    scene.fleet.stop()
    assert tuple(scene.placer.removed) == EVERYONE
