"""What a reading of the GPU's path found, as far as it shows without a card: transports."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.transfer import cuda_ipc, device, pieces, slabs
from baton.transfer.base import Owner
from baton.transfer.device import gathered_copy
from baton.transfer.registry import make_exports
from baton.transfer.slabs import Slabs, allocate_slabs
from tests.torch.test_gpu_findings import CPU, CUDA, LAYOUT

# ---- 8, 9, 14: transports


def test_expandable_segments_rule_out_ipc_and_no_other_transport(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """With "auto" IPC is passed over, and by name it is refused. Its memory is the CPU's."""
    tmp_path.chmod(0o700)
    given = Slabs(LAYOUT, 3, CUDA, allocate_slabs(LAYOUT, 3, CPU, shared=False).tensors)
    segment = {"address": 0, "total_size": 2**63, "is_expandable": False}
    monkeypatch.setattr("torch.cuda.memory_snapshot", lambda: [segment])
    slabs.refuse_expandable(given.tensors[0])
    segment["is_expandable"] = True
    with pytest.raises(TransferError, match="remove expandable_segments:True"):
        cuda_ipc.export(given, Owner("e"))
    monkeypatch.setattr("baton.transfer.pinned.PinnedExport.__init__", refused)
    exports = make_exports("auto", given, epoch="e", run_dir=tmp_path)
    assert [export.region.transport for export in exports] == ["frames"]
    for export in exports:
        export.close()


def refused(*_: Any, **__: Any) -> None:
    raise TransferError("this machine has no card")


def test_a_pool_for_ipc_is_allocated_before_anybody_looks_at_its_segments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "torch.cuda.memory_snapshot",
        lambda: pytest.fail("the export looks, and may be passed over"),
    )
    whole = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: whole(*size, dtype=dtype))
    assert allocate_slabs(LAYOUT, 3, CUDA, shared=True).device == CUDA


def test_an_error_of_registering_pages_does_not_hit_the_next_launch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pending: list[str] = []

    def register(*_: object) -> int:
        pending.append("CUDA error: resource already mapped")
        return 712

    def launch(*_: object, **__: object) -> None:
        if pending:
            raise RuntimeError(pending.pop())

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: None)
    monkeypatch.setattr("torch.cuda.cudart", lambda: cudart)
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    monkeypatch.setattr(device.torch, "zeros", launch)
    pages = device.RegisteredPages([torch.ones(8, dtype=torch.uint8)], CUDA)
    pages.register_or_warn()
    assert "error 712" in caplog.text
    launch()  # the next kernel
    with pytest.raises(TransferError):
        pages.register()
    launch()


@pytest.mark.parametrize(
    ("source", "target", "gathers"),
    [((5, 1, 3, 0, 4), (0, 4, 2, 5, 1), True), ((1, 2, 3, 4), (2, 3, 4, 5), False)],
)
def test_scattered_blocks_go_together_and_the_copies_end_after_the_last_kernel(
    source: tuple[int, ...], target: tuple[int, ...], gathers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs, whose memory is the CPU's."""
    events: list[str] = []
    own = SimpleNamespace(device=CUDA, wait_event=lambda event: events.append("own stream waits"))
    event = SimpleNamespace(record=lambda stream: events.append(f"event on {stream}"))
    monkeypatch.setattr("torch.cuda.Stream", lambda device: own)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: "the other's")
    monkeypatch.setattr("torch.cuda.Event", lambda: event)
    monkeypatch.setattr("baton.transfer.device.gathered_copy",
                        lambda *given: (events.append("gathered"), gathered_copy(*given)))  # fmt: skip
    torch.manual_seed(0)
    one, two = (pieces.Rows(*torch.randint(0, 255, (2, 6, 8)).byte()) for _ in range(2))
    expected = pieces.Rows(two.keys.clone(), two.values.clone())
    expected.keys[list(target)] = one.keys[list(source)]
    expected.values[list(target)] = one.values[list(source)]
    monkeypatch.setattr(device.torch.Tensor, "is_cuda", True)
    device.CopyStream(CUDA, 1.0).copy_blocks(two, one, target, source)
    monkeypatch.undo()
    assert torch.equal(two.keys, expected.keys)
    assert torch.equal(two.values, expected.values)
    assert events == (["gathered", "event on the other's", "own stream waits"] if gathers else [])


def test_the_stamps_of_a_grant_are_cleared_once_for_all_exports(tmp_path: Any) -> None:
    """On a GPU, where each time is a wait; here its stamps are made to believe that they are there."""
    tmp_path.chmod(0o700)
    pool = allocate_slabs(LAYOUT, 6, CPU, shared=True, folder=tmp_path)
    exports = make_exports(["shm", "pinned", "frames"], pool, epoch="e", run_dir=tmp_path)
    written: list[tuple[int, ...]] = []
    stamps = pool.stamps
    stamps._near = None
    stamps.write = lambda blocks, generation: written.append(tuple(blocks))  # type: ignore[method-assign]
    for generation, blocks in ((1, (2, 4)), (2, (2, 4)), (3, (5,))):
        for export in exports:
            export.expect(Grant("w", "e", f"r#{generation}", generation, blocks))
    assert written == [(2, 4), (2, 4), (5,)]
    for export in exports:
        export.close()
    pool.close()
