"""The ownership protocol, explored (explore.py), and the explorer itself, which must find planted bugs.

Here: all interleavings without a fault to their end (28 to 36 actions, some 250 to 700 worlds), and those
with one fault of any kind up to 7 actions for a pair of workers, 5 for three; by `make test-deep` one
more. Deeper: see explore.py."""

from dataclasses import replace
from typing import Any

import pytest

from baton.kv.blocks import BlockTable
from baton.kv.region import Arrival
from baton.wire import membership
from baton.wire import messages as msg
from baton.wire.node import To
from prefill_worker.worker import PrefillWorker
from router.requests import Requests
from router.router import Router
from router.workers import WorkerRegistry
from tests.depth import deep
from tests.pure.explore import Explorer
from tests.pure.explored import Reader
from tests.pure.worlds import SETTINGS, Report, Setting


@pytest.mark.parametrize("name", SETTINGS)
def test_every_interleaving_without_a_fault(name: str) -> None:
    report = Explorer(replace(SETTINGS[name], faults=0)).run(depth=100)
    assert not report.violation, report
    assert report.complete


DEPTHS = {"pair": 8, "two prefills": 6, "two decodes": 6}


@pytest.mark.parametrize(
    ("name", "depth"), [(name, deep(much, usual=much - 1)) for name, much in DEPTHS.items()]
)
def test_every_interleaving_with_one_fault(name: str, depth: int) -> None:
    report = Explorer(replace(SETTINGS[name], faults=1)).run(depth)
    assert not report.violation, report
    assert report.depth == depth


# ---- planted bugs


def explored(name: str, depth: int, *kinds: str, faults: int = 1) -> Report:
    setting: Setting = replace(SETTINGS[name], kinds=kinds, faults=faults)
    return Explorer(setting).run(depth)


def release_at_once(patch: pytest.MonkeyPatch) -> None:
    release = BlockTable.release
    patch.setattr(BlockTable, "release", lambda table, run, writer: release(table, run, None))


def ignore_released(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockTable, "writer_released", lambda table, writer, run: None)


def ignore_clear(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockTable, "writer_clear", lambda table, writer: None)


def obey_orders_of_an_older_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(membership, "ORDERS", ())


def take_a_silent_writer_for_dead(patch: pytest.MonkeyPatch) -> None:
    remove = WorkerRegistry.remove

    def removed(self: WorkerRegistry, worker: str, *, proven_dead: bool) -> Any:
        return remove(self, worker, proven_dead=True)

    patch.setattr(WorkerRegistry, "remove", removed)


def write_on_after_an_attach(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefillWorker, "_drop_all", lambda self, worker=None: None)


def miss_a_new_epoch(patch: pytest.MonkeyPatch) -> None:
    hello = Router._hello

    def handled(self: Router, sender: str, message: msg.Hello, now: float) -> Any:
        if self.workers.get(sender) is not None:
            return [To(sender, msg.Welcome(self._identity.epoch, "here", 1))]
        return hello(self, sender, message, now)

    patch.setattr(Router, "_hello", handled)


def ignore_a_preemption(patch: pytest.MonkeyPatch) -> None:
    report = Requests.report

    def reported(self: Requests, sender: str, message: msg.Message, now: float) -> Any:
        if isinstance(message, msg.Preempted):
            return []
        return report(self, sender, message, now)

    patch.setattr(Requests, "report", reported)


def trust_damaged_kv(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Reader, "arrival", lambda *_: Arrival.READY)


PLANTED = [
    (release_at_once, "pair", "abort", "may write for"),
    (ignore_released, "pair", "abort", "does not come to rest"),
    (ignore_clear, "pair", "kill", "does not come to rest"),
    (obey_orders_of_an_older_epoch, "pair", "doubt", "for r0#0"),
    (take_a_silent_writer_for_dead, "pair", "give_up", "may write for"),
    (write_on_after_an_attach, "pair", "give_up", "for r0#0"),
    (miss_a_new_epoch, "pair", "cut", "does not come to rest"),
    (ignore_a_preemption, "small pool", "", "does not come to rest"),
    (trust_damaged_kv, "pair", "damage", "blocks hold"),
]


@pytest.mark.parametrize(("bug", "name", "kind", "found"), PLANTED)
def test_a_planted_bug_is_found(
    bug: Any, name: str, kind: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    report = explored(name, 22, *kind.split(), faults=len(kind.split()))
    print(report)
    assert found in report.violation
    assert report.trace
