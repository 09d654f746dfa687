"""How the ranks of a worker start, what is refused before, and what is said when one ends."""

from pathlib import Path

import pytest
import torch

from baton.cluster.launch import WorkerOptions
from baton.errors import InputError, TransferError, WorkerLost
from baton.kv.row import Logits, Row
from baton.parallel.orders import pack_order, plain_rows, rows_of, unpack_order
from baton.parallel.ranks import Ranks
from baton.parallel.runner import AfterSum
from baton.parallel.start import check_devices, with_threads
from baton.parallel.team import why_ended

CPU = torch.device("cpu")


def test_a_rank_that_does_not_come_ends_the_start_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(WorkerLost, match=r"^rank 1 of 2 .* did not start within 0\.05 s: .*$"):
        Ranks.join(0, 2, CPU, tmp_path, start_s=0.05)


@pytest.mark.parametrize(
    ("device", "size", "gpus", "said"),
    [
        ("cuda:0", 2, 1, "needs the GPUs cuda:0 to cuda:1, and there are 1"),
        ("cuda:3", 2, 4, "needs the GPUs cuda:3 to cuda:4, and there are 4"),
        ("mps", 2, 0, "on mps needs"),
    ],
)
def test_there_must_be_a_gpu_for_each_rank(device: str, size: int, gpus: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_devices(torch.device(device), size, gpus)


def test_ranks_on_gpus_that_are_there_or_on_the_cpu_are_not_refused() -> None:
    check_devices(torch.device("cuda:2"), 2, 4)
    check_devices(CPU, 64, 0)


@pytest.mark.parametrize(
    ("given", "size", "found"), [(None, 1, None), (8, 1, 8), (8, 2, 4), (1, 2, 1), (None, 2, 3)]
)
def test_ranks_share_the_threads_of_their_worker(
    given: int | None, size: int, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.parallel.start.usable_cores", lambda: 6)
    options = WorkerOptions(
        router="ipc://r", model="demo", device="cpu", dtype="float32", name="d", threads=given,
        block_size=16, max_model_len=None, max_num_batched_tokens=64, drain_timeout=1.0, keys=None,
        parent=None, tensor_parallel_size=size,
    )  # fmt: skip
    assert with_threads(options).threads == found


def test_rows_travel_with_the_blocks_that_a_forward_reads() -> None:
    rows = [Row((5, 6, 7), 14, [9, 4, 2, 8], Logits.ALL, 40), Row([1], 0, [3], Logits.LAST)]
    kind, (number, plain) = unpack_order(pack_order("run", 7, plain_rows(rows, 16)))
    assert (kind, number) == ("run", 7)
    assert rows_of(plain) == [
        Row([5, 6, 7], 14, [9, 4], Logits.ALL, 40),
        Row([1], 0, [3], Logits.LAST),
    ]


def test_a_layer_is_pushed_when_the_next_one_has_begun_and_the_last_at_the_end() -> None:
    seen: list[int] = []
    late = AfterSum(seen.append)
    late(0)
    assert seen == []
    late(1)
    assert seen == [0]
    late.done()
    assert seen == [0, 1]


def test_after_a_push_that_failed_nothing_more_is_pushed_and_the_error_comes_at_the_end() -> None:
    seen: list[int] = []

    def push(layer: int) -> None:
        seen.append(layer)
        raise TransferError("the way is lost")

    late = AfterSum(push)
    for layer in range(3):
        late(layer)
    with pytest.raises(TransferError, match="the way is lost"):
        late.done()
    assert seen == [0]


@pytest.mark.parametrize(
    ("code", "how"), [(-9, "SIGKILL"), (1, "exit code 1"), (-64, "signal 64|SIGRTMAX")]
)
def test_the_end_of_a_rank_is_told_with_its_cause(code: int, how: str) -> None:
    with pytest.raises(
        WorkerLost, match=rf"^rank 1 of this tensor-parallel worker ended \(({how})\)"
    ):
        raise WorkerLost(why_ended(1, code))
