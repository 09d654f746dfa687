"""One grant, one writer in a process of its own, and every byte looked at afterwards."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import msgpack
import pytest
import torch

from baton.kv.grant import Grant
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.region import Arrival, Receipt
from baton.transfer.registry import make_exports
from baton.transfer.slabs import allocate_slabs
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
LAYOUT = KVLayout((LayerShape(2, 64, 64), LayerShape(1, 32, 16)), 16, "bfloat16")
BLOCKS = 12
GRANTED, FILLED = (7, 2, 3, 9), (7, 2, 3)

WRITER = """
import sys, msgpack, json, torch
from baton.kv.region import Region
from baton.transfer.registry import open_link
from tests.gpu.test_transfer_cuda import *
device = torch.device(sys.argv[1])
region = msgpack.unpackb(bytes.fromhex(sys.stdin.readline()))
link = open_link([Region(**region)], LAYOUT, device=device, writer="w")
grant = the_grant()
own = noise(device)
for layer in range(len(LAYOUT.layers)):
    if link.slabs is None:
        link.push(grant, layer, own[layer], FILLED, FILLED)
    else:
        pairs = zip(blocks_of(own[layer], layer), blocks_of(link.slabs[layer], layer))
        for mine, theirs in pairs:
            theirs[list(FILLED)] = mine[list(FILLED)]
        del pairs, mine, theirs
receipt = link.finish(grant, FILLED)
in_place = link.slabs is not None
print(json.dumps([receipt.moved_bytes, receipt.digest.hex(), link.transport, in_place]), flush=True)
sys.stdin.readline()
link.close()
"""


def the_grant() -> Grant:
    return Grant("owner", "epoch-1", "r#0", 5, GRANTED)


def noise(device: torch.device) -> list[torch.Tensor]:
    """The same everywhere: one slab a layer."""
    generator = torch.Generator().manual_seed(3)
    sizes = LAYOUT.slab_bytes(BLOCKS)[:-1]
    return [
        torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator).to(device)
        for n in sizes
    ]


def blocks_of(slab: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, a row a block."""
    keys = BLOCKS * LAYOUT.key_block_bytes(layer)
    return slab[:keys].view(BLOCKS, -1), slab[keys:].view(BLOCKS, -1)


def hand_over(transport: str, owner: str, writer: str, folder: Path) -> tuple[int, bool]:
    """Bytes moved, and whether it was in place; all bytes checked."""
    slabs = allocate_slabs(LAYOUT, BLOCKS, owner, shared=True)
    for slab in slabs.tensors[:-1]:
        slab.fill_(0xEE)
    folder.chmod(0o700)
    (export,) = make_exports(
        [transport], slabs, epoch="epoch-1", run_dir=folder, bind_host=None, keys=None
    )
    grant = the_grant()
    export.expect(grant)
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, writer],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    print(msgpack.packb(asdict(export.region)).hex(), file=child.stdin, flush=True)
    moved, digest, way, in_place = json.loads(child.stdout.readline())
    receipt = Receipt(moved, bytes.fromhex(digest), 0.0, way)
    deadline = time.monotonic() + PATIENCE_S
    while (arrival := export.arrival(grant, receipt, FILLED)) is Arrival.PENDING:
        assert time.monotonic() < deadline
        export.poll()
    assert arrival is Arrival.READY
    if slabs.device.type == "cuda":
        torch.cuda.synchronize()
    others = [block for block in range(BLOCKS) if block not in FILLED]
    for layer, sent in enumerate(noise(torch.device("cpu"))):
        pairs = zip(
            blocks_of(slabs.tensors[layer].cpu(), layer), blocks_of(sent, layer), strict=True
        )
        for found, expected in pairs:
            assert torch.equal(found[list(FILLED)], expected[list(FILLED)])
            assert (found[others] == 0xEE).all()
    stamps = slabs.tensors[-1].view(torch.int64).tolist()
    assert [block for block, stamp in enumerate(stamps) if stamp == 5] == sorted(FILLED)
    export.retire(grant)
    print("done", file=child.stdin, flush=True)  # importers go before the pool does
    child.stdin.close()
    assert child.wait(PATIENCE_S) == 0
    child.stdout.close()
    export.close()
    slabs.close()
    return moved, in_place


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA GPU")
@pytest.mark.parametrize("transport", ["cuda_ipc", "pinned"])
def test_on_one_gpu_every_byte_arrives(transport: str, tmp_path: Path) -> None:
    moved, in_place = hand_over(transport, "cuda:0", "cuda:0", tmp_path)
    assert in_place == (transport == "cuda_ipc")
    assert moved == (0 if in_place else len(FILLED) * LAYOUT.block_bytes)


@pytest.mark.gpu2
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("transport", ["cuda_ipc", "pinned"])
def test_between_two_gpus_every_byte_arrives(transport: str, tmp_path: Path) -> None:
    moved, in_place = hand_over(transport, "cuda:0", "cuda:1", tmp_path)
    assert not in_place
    assert moved == len(FILLED) * LAYOUT.block_bytes


def test_the_same_code_moves_every_byte_on_the_cpu(tmp_path: Path) -> None:
    """So that a slip in this file shows where there is no GPU: "pinned" has a CPU form."""
    if torch.cuda.device_count():
        pytest.skip("the tests above run")
    assert hand_over("pinned", "cpu", "cpu", tmp_path) == (len(FILLED) * LAYOUT.block_bytes, False)
    assert hand_over("shm", "cpu", "cpu", tmp_path) == (0, True)
