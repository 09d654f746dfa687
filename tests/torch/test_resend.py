"""A kept prefix that decode lacks: sent in portions, and given up with its run."""

from collections.abc import Sequence

import pytest
import torch

from baton.engine.pool import Pool
from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout, LayerShape
from baton.transfer.in_place import InPlaceLink
from prefill_worker import resend
from prefill_worker.resend import Resend
from prefill_worker.ways import Ways

LAYOUT = KVLayout((LayerShape(1, 4, 4), LayerShape(1, 4, 4)), 4, "float32")
GRANT = Grant("d", "d/0", "r#0", 1, (4, 5, 6, 7, 0), (9,))


class Noted(InPlaceLink):
    """A link that takes note of what is pushed, and fails at a push."""

    def __init__(self, pool: Pool, fails_at: int) -> None:
        super().__init__(LAYOUT, pool.slabs, epoch="d/0", transport="noted")
        self.pushed: list[tuple[int, list[int], list[int]]] = []
        self._fails_at = fails_at

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        if len(self.pushed) == self._fails_at:
            raise TransferError("the way is down")
        self.pushed.append((layer, list(source), list(target)))


def opened(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Pool, Noted, Ways, Resend]:
    monkeypatch.setattr(resend, "PORTION_BYTES", 2 * LAYOUT.block_bytes + 1)
    pool = Pool.private(LAYOUT, 8, torch.device("cpu"))
    link, sending = Noted(pool, fails_at), Resend()
    ways = Ways(lambda *_: link)
    ways.attach("d", "d/0", ())
    sending.add(GRANT, [1, 2, 3], [4, 5, 6])
    return pool, link, ways, sending


def test_all_layers_of_each_portion_go_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, link, ways, sending = opened(99, monkeypatch)
    assert (sending.waits("d"), sending.waits("e")) == (True, False)
    sending.step(ways, pool)
    assert link.pushed == [(0, [1, 2], [4, 5]), (1, [1, 2], [4, 5])]
    assert sending.waits("d")
    sending.step(ways, pool)
    assert link.pushed[2:] == [(0, [3], [6]), (1, [3], [6])]
    assert not sending.waits("d")
    sending.step(ways, pool)
    sending.check("r#0")
    assert len(link.pushed) == 4


def test_a_way_that_is_not_there_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, link, ways, sending = opened(99, monkeypatch)
    ways.detach("d")
    sending.step(ways, pool)
    assert link.pushed == []
    assert sending.waits("d")
    sending.drop("r#0")
    assert not sending.waits("d")


def test_a_way_that_fails_ends_the_run_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _, ways, sending = opened(1, monkeypatch)
    sending.step(ways, pool)
    assert not sending.waits("d"), "nothing more is sent"
    with pytest.raises(TransferError, match="the way is down"):
        sending.check("r#0")
    sending.check("other")
    sending.drop("r#0")
    sending.check("r#0")
