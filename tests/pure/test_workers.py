"""Who fits, who can write to whom, who is still alive."""

import dataclasses

import pytest

from baton.wire import messages as msg
from baton.wire.node import Effect, To, Watch
from router.workers import BEAT_S, DECODE, MISSED_BEATS, PREFILL, WorkerRegistry

SILENT = MISSED_BEATS * BEAT_S


def hello(worker: str, **changes: object) -> msg.Hello:
    role = DECODE if worker.startswith("d") else PREFILL
    plain = msg.Hello(
        role, worker, f"{worker}/0", msg.PROTOCOL, "here", 11, "cpu", "m" * 16, "float32", "layout",
        16, 1024, 8 if role == DECODE else 0, (), 10.0, 0.5,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def members(*workers: str) -> WorkerRegistry:
    made = WorkerRegistry(model="m" * 16, host="here")
    for worker in workers:
        made.join(hello(worker), 0.0)
    return made


def attach(made: WorkerRegistry, prefill: str, decode: str) -> list[Effect]:
    member = made.get(prefill)
    assert member is not None
    return made.attached(member, msg.Attached(decode, f"{decode}/0", "shm", 0.0, ""), 0.0)


def told(effects: list[Effect], worker: str) -> list[msg.Message]:
    return [e.message for e in effects if isinstance(e, To) and e.peer == worker]


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"protocol": 99}, ("protocol 99", f"the router {msg.PROTOCOL}")),
        ({"block_size": 0}, ("block size 0",)),
        ({"blocks": 0}, ("0 blocks",)),
        ({"patience_s": float("nan")}, ("nan s",)),
        ({"role": "drummer"}, ("'drummer'", "prefill, decode or engine")),
        ({"model": "x" * 16}, ("x" * 12, "m" * 12)),
        ({"layout": "other", "dtype": "bfloat16"}, ("bfloat16", "float32", "p1")),
        ({"layout": "other", "block_size": 32}, ("block size 32", "block size 16")),
    ],
)
def test_a_misfit_is_told_both_values(changes: dict[str, object], both: tuple[str, ...]) -> None:
    made = members("p1")
    why = made.rejection("d1", hello("d1", **changes))
    assert why is not None
    assert all(value in why for value in both), why
    assert made.rejection("d1", hello("d1")) is None


def test_a_worker_speaks_for_itself_alone() -> None:
    why = members().rejection("d1", hello("d9"))
    assert why is not None
    assert "'d1'" in why
    assert "'d9'" in why


def test_a_worker_is_compared_with_others_not_with_its_own_past() -> None:
    assert members("d1").rejection("d1", hello("d1", layout="other")) is None


def test_prefill_workers_are_told_of_every_decode_pool_whoever_came_first() -> None:
    made = members("p1", "d1")
    assert isinstance(told(made.join(hello("d2"), 0.0), "p1")[0], msg.Attach)
    attaches = [m for m in told(made.join(hello("p2"), 0.0), "p2") if isinstance(m, msg.Attach)]
    assert [attach.worker for attach in attaches] == ["d1", "d2"]


def test_a_writer_that_says_hello_has_dropped_what_it_wrote() -> None:
    assert told(members("d1").join(hello("p1"), 0.0), "d1") == [msg.WriterClear("p1")]


def test_a_process_of_the_same_host_is_watched() -> None:
    made = members()
    assert Watch("d1", 11) in made.join(hello("d1"), 0.0)
    assert not any(isinstance(e, Watch) for e in made.join(hello("d2", host="there"), 0.0))


def test_a_decode_worker_learns_who_can_write_to_it() -> None:
    made = members("p1", "d1")
    assert attach(made, "p1", "d1") == [To("d1", msg.WriterJoined("p1", "here", 11, "shm"))]


def test_a_way_to_a_pool_of_another_epoch_is_no_way() -> None:
    made = members("p1", "d1")
    prefill = made.get("p1")
    assert prefill is not None
    assert made.attached(prefill, msg.Attached("d1", "d1/9", "shm", 0.0, ""), 0.0) == []
    assert made.attached(prefill, msg.Attached("gone", "gone/0", "shm", 0.0, ""), 0.0) == []
    assert not prefill.attached


def test_a_decode_worker_that_leaves_is_detached_everywhere() -> None:
    made = members("p1", "p2", "d1", "d2")
    attach(made, "p1", "d1")
    effects = made.remove("d1", proven_dead=True)
    assert effects == [To(p, msg.Detach("d1", "d1/0")) for p in ("p1", "p2")]
    prefill = made.get("p1")
    assert prefill is not None
    assert not prefill.attached


def test_a_dead_writer_is_clear_and_a_silent_one_is_not() -> None:
    assert members("p1", "d1").remove("p1", proven_dead=True) == [To("d1", msg.WriterClear("p1"))]
    assert members("p1", "d1").remove("p1", proven_dead=False) == []
    assert members("p1", "d1").remove("stranger", proven_dead=True) == []


def test_the_silent_get_nothing_new_and_the_longer_silent_are_dead() -> None:
    made = members("d1", "d2")
    made.heard("d2", SILENT)
    assert [m.worker for m in made.alive(DECODE, SILENT)] == ["d2"]
    assert made.dead(SILENT) == []
    assert made.dead(SILENT + 10.0) == ["d1"]
    made.heard("stranger", 1.0)


def test_clients_see_every_worker_by_name_with_its_state_and_its_ways() -> None:
    made = members("p1", "d2", "d1")
    prefill = made.get("p1")
    assert prefill is not None
    made.attached(prefill, msg.Attached("d1", "d1/0", "frames", 3.21, ""), 0.0)
    made.heard("p1", SILENT)
    infos = made.infos(SILENT)
    assert [(i.worker, i.state) for i in infos] == [
        ("d1", "suspect"), ("d2", "suspect"), ("p1", "alive")
    ]  # fmt: skip
    assert infos[2].transports == ("frames 3.2 GB/s",)


def test_equal_clusters_are_walked_equally() -> None:
    one, other = members("d2", "d1", "p1"), members("p1", "d1", "d2")
    assert [m.worker for m in one.of(DECODE)] == [m.worker for m in other.of(DECODE)]


def test_comings_and_goings_leave_nothing_behind() -> None:
    made = members("p1")
    prefill = made.get("p1")
    assert prefill is not None
    for index in range(20):
        made.join(hello(f"d{index}"), 0.0)
        attach(made, "p1", f"d{index}")
        made.way_lost(prefill, msg.AttachFailed(f"d{index}", f"d{index}/0", "x"), 0.0, moved=0)
        made.remove(f"d{index}", proven_dead=True)
    assert (prefill.attached, prefill.failed) == ({}, {})
    assert [m.worker for m in made] == ["p1"]
