"""The prefill worker's own pool: neighbouring blocks, so that few copies carry them."""

from baton.kv.layout import KVLayout, LayerShape
from baton.transfer.pieces import stretches
from prefill_worker.scratch import Scratch

LAYOUT = KVLayout((LayerShape(1, 4, 4),), 4, "float32")


def test_a_run_gets_neighbours_in_rising_order_again_and_again() -> None:
    scratch = Scratch(8)
    for turn in range(3):
        assert scratch.take(f"a{turn}", 3)
        assert scratch.take(f"b{turn}", 4)
        assert not scratch.take("c", 2)
        for run in (f"a{turn}", f"b{turn}"):
            blocks = scratch.held[run]
            assert len(stretches(blocks, range(len(blocks)), 8)) == 1
        scratch.give_back(f"b{turn}")
        scratch.give_back(f"a{turn}")
    assert scratch.table.idle
