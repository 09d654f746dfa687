"""Choosing a transport, and the memory under it."""

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from baton.errors import TransferError
from baton.host import host_id
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.region import Region
from baton.kv.transports import TRANSPORTS, Transport, selects, writes_by_itself
from baton.transfer.base import Export, Link, Owner
from baton.transfer.pieces import Stretch, stretches
from baton.transfer.registry import make_exports, open_link
from baton.transfer.slabs import Slabs, allocate_slabs, map_shared
from tests.patience import PATIENCE_S
from tests.torch.owners import BLOCKS, KEYS, LAYOUT


@pytest.fixture
def slabs() -> Iterator[Slabs]:
    made = allocate_slabs(LAYOUT, BLOCKS, "cpu", shared=True)
    yield made
    made.close()


@pytest.fixture
def exports(slabs: Slabs, folder: Path) -> Iterator[list[Export]]:
    kinds = ["frames_tcp", "frames", "pinned", "shm"]
    made = make_exports(kinds, slabs, epoch="e", run_dir=folder, bind_host="127.0.0.2", keys=KEYS)
    yield made
    for export in made:
        export.close()


def open_any(regions: list[Region], wanted: str = "auto", layout: KVLayout = LAYOUT) -> Link:
    return open_link(
        regions,
        layout,
        device="cpu",
        writer="p0",
        wanted=wanted,
        keys=KEYS,
        deadline_s=PATIENCE_S,
    )


def lost(region: Region, **address: str) -> Region:
    return replace(region, address={**region.address, **address})


def test_auto_offers_what_the_machine_can(slabs: Slabs, folder: Path) -> None:
    made = make_exports("auto", slabs, epoch="e", run_dir=folder)
    assert [export.region.transport for export in made] == ["shm", "frames"]
    for export in made:
        export.close()


def test_memory_is_preferred_to_messages(exports: list[Export]) -> None:
    link = open_any([export.region for export in exports])
    assert link.transport == "shm"
    assert link.why == ""
    assert link.probe() == 0
    link.close()


def test_the_next_best_is_taken_and_the_reason_kept(
    exports: list[Export], caplog: pytest.LogCaptureFixture
) -> None:
    tcp, ipc, pinned, shm = (export.region for export in exports)
    link = open_any([tcp, ipc, lost(shm, path="/proc/1/nowhere"), lost(pinned, host="other")])
    assert link.transport == "frames"
    assert "shm: the exported pool cannot be opened" in link.why
    assert "pinned: the pool is on another host" in link.why
    assert link.why in caplog.text
    link.close()


def test_between_hosts_only_tcp_is_left(exports: list[Export]) -> None:
    link = open_any([lost(export.region, host="elsewhere") for export in exports])
    assert link.transport == "frames_tcp"
    link.close()


@pytest.mark.parametrize("wanted", ["shm", "pinned", "frames", "frames_tcp"])
def test_a_named_transport_is_used(exports: list[Export], wanted: str) -> None:
    link = open_any([export.region for export in exports], wanted)
    assert link.transport == wanted
    link.close()


def test_a_named_transport_that_is_not_offered_names_both_sides(exports: list[Export]) -> None:
    with pytest.raises(TransferError, match=r"p0 on cpu.*wanted cuda_ipc, offered shm, pinned"):
        open_any([export.region for export in exports], "cuda_ipc")
    with pytest.raises(TransferError, match="shm: the pool is on another host"):
        open_any([lost(export.region, host="x") for export in exports], "shm")


def test_pools_of_another_layout_are_refused(exports: list[Export]) -> None:
    other = KVLayout((LayerShape(1, 8, 8),), 4, "float32")
    with pytest.raises(TransferError, match=f"{LAYOUT.fingerprint}.*{other.fingerprint}"):
        open_any([export.region for export in exports], layout=other)


def test_an_address_without_its_fields_is_refused(exports: list[Export]) -> None:
    for export in exports:
        with pytest.raises(TransferError, match="valid 'epoch'"):
            open_any([replace(export.region, address={"host": host_id()})])


def test_a_transport_of_the_future_is_passed_over(exports: list[Export]) -> None:
    future = Region("pigeon", LAYOUT.fingerprint, BLOCKS, {})
    link = open_any([future, exports[0].region])
    assert link.transport == "frames_tcp"
    link.close()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kinds": ["pigeon"]}, "no KV transport is called 'pigeon'"),
        ({"kinds": ["cuda_ipc"]}, "this pool is on cpu"),
        ({"kinds": ["frames"], "run_dir": None}, "run folder"),
        ({"kinds": ["frames_tcp"]}, "address of this machine"),
        ({"kinds": ["frames_tcp"], "bind_host": "127.0.0.1"}, "needs CURVE keys"),
        ({"kinds": ["frames_tcp"], "bind_host": "0.0.0.0", "keys": KEYS}, "one address"),
        ({"kinds": ["frames_tcp"], "bind_host": "192.0.2.1", "keys": KEYS}, "cannot open a socket"),
    ],
)
def test_what_cannot_be_exported_says_why(
    slabs: Slabs, folder: Path, options: dict[str, object], match: str
) -> None:
    with pytest.raises(TransferError, match=match):
        make_exports(slabs=slabs, epoch="e", **{"run_dir": folder, **options})  # type: ignore[arg-type]


def test_an_open_folder_is_refused(slabs: Slabs, folder: Path) -> None:
    folder.chmod(0o755)
    with pytest.raises(TransferError, match="0700"):
        make_exports(["frames"], slabs, epoch="e", run_dir=folder)


def test_private_memory_is_not_offered_as_shared(folder: Path) -> None:
    private = allocate_slabs(LAYOUT, BLOCKS, "cpu", shared=False)
    with pytest.raises(TransferError, match="private"):
        make_exports(["shm"], private, epoch="e", run_dir=folder)
    (frames,) = make_exports("auto", private, epoch="e", run_dir=folder)
    assert frames.region.transport == "frames"
    frames.close()


def test_pinned_is_measured(exports: list[Export]) -> None:
    link = open_any([export.region for export in exports], "pinned")
    assert link.probe() > 0
    link.close()


# ---- slabs


@pytest.mark.parametrize("shared", [True, False])
def test_slabs_have_storages_of_their_own_and_clear_stamps(shared: bool) -> None:
    slabs = allocate_slabs(LAYOUT, BLOCKS, "cpu", shared=shared)
    assert [slab.numel() for slab in slabs.tensors] == LAYOUT.slab_bytes(BLOCKS)
    for slab in slabs.tensors:
        assert slab.storage_offset() == 0
        assert slab.untyped_storage().nbytes() == slab.numel()
        assert slab.view(torch.float32).is_contiguous()
    assert not slabs.tensors[-1].any()
    slabs.close()


def test_without_memfd_a_file_in_the_private_folder_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    slabs = allocate_slabs(LAYOUT, BLOCKS, "cpu", shared=True, folder=folder)
    (export,) = make_exports(["shm"], slabs, epoch="e", run_dir=None)
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    link = open_any([export.region])
    assert link.slabs is not None
    link.slabs[0].fill_(3)
    assert int(slabs.tensors[0].sum()) == 3 * slabs.tensors[0].numel()
    link.close()
    slabs.close()
    assert not list(folder.iterdir())
    with pytest.raises(TransferError, match="run folder"):
        allocate_slabs(LAYOUT, BLOCKS, "cpu", shared=True)


def test_only_the_announced_file_is_mapped(slabs: Slabs) -> None:
    file = slabs.shared
    assert file is not None
    assert map_shared(file.path, file.size, file.token, LAYOUT, BLOCKS)
    for match, path, size, token, blocks in [
        ("not the announced one", file.path, file.size, bytes(16), BLOCKS),
        ("announced size|size of its", file.path, file.size + 1, file.token, BLOCKS),
        ("announced size|size of its", file.path, file.size, file.token, 999),
        ("another file", "/dev/null", file.size, file.token, BLOCKS),
        ("cannot be opened", f"/proc/{os.getpid()}/fd/9999", file.size, file.token, BLOCKS),
    ]:
        with pytest.raises(TransferError, match=match):
            map_shared(path, size, token, LAYOUT, blocks)


def test_nobody_can_cut_the_file_short(slabs: Slabs) -> None:
    assert slabs.shared is not None
    with pytest.raises(PermissionError):
        os.ftruncate(slabs.shared.fd, 0)


def test_stretches_join_neighbours() -> None:
    assert stretches([1, 2, 3, 7], [5, 6, 7, 8], 9) == [Stretch(1, 5, 3), Stretch(7, 8, 1)]
    assert stretches([1, 2, 3], [5, 6, 7], 2) == [Stretch(1, 5, 2), Stretch(3, 7, 1)]
    assert stretches([3, 2], [3, 2], 9) == [Stretch(3, 3, 1), Stretch(2, 2, 1)]
    assert stretches([], [], 9) == []


@pytest.mark.parametrize("declared", TRANSPORTS, ids=lambda each: each.name)
def test_a_declared_transport_has_its_module_and_functions(declared: Transport) -> None:
    module = import_module(f"baton.transfer.{declared.module}")
    assert callable(getattr(module, declared.export))
    assert callable(module.link)
    assert declared.needs in {"", *(each.name for each in fields(Owner))}
    assert set(declared.devices) <= {"cpu", "cuda"}


def test_a_transport_that_this_version_does_not_know_is_quarantined_and_never_chosen() -> None:
    assert writes_by_itself("of-the-future")
    assert selects("auto", "of-the-future")
    assert not selects("frames", "of-the-future")
    assert [each.name for each in TRANSPORTS if selects("frames", each.name)] == [
        "frames",
        "frames_tcp",
    ]
