"""Owner and writer of a pool, each a process that obeys lines on stdin.

test_transfer_nixl.py runs them in two network namespaces.

    python -m tests.torch.nixl_sides owner 10.78.0.1 KEYS     prints its region first
    python -m tests.torch.nixl_sides writer REGION KEYS

Every command is answered with one line.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import torch

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.region import Region
from baton.transfer.base import Link
from baton.transfer.curve import CurveKeys
from baton.transfer.registry import make_exports, open_link
from baton.transfer.slabs import allocate_slabs
from tests.torch.owners import BLOCKS, LAYOUT, Owner, fill, holds, reference

WRITER, DEADLINE_S = "p1", 2.0


def owner(host: str, keys: CurveKeys) -> Iterator[str]:
    """let-in, shut-out: of the writer. holds SEED BLOCK ...: True if these are the writer's bytes. noise:
    fills the pool with other bytes."""
    slabs = allocate_slabs(LAYOUT, BLOCKS, "cpu", shared=True)
    (export,) = make_exports(
        ["nixl"], slabs, epoch="epoch-1", run_dir=Path(), bind_host=host, keys=keys
    )
    side, region = Owner(slabs, export), export.region
    fields = [region.transport, region.layout, region.blocks, dict(region.address)]
    yield msgpack.packb(fields).hex()
    for line in sys.stdin:
        match line.split():
            case ["let-in"]:
                yield str(export.let_in(WRITER))  # type: ignore[attr-defined]
            case ["shut-out"]:
                yield str(export.shut_out(WRITER))  # type: ignore[attr-defined]
            case ["noise"]:
                for slab, noise in zip(slabs.tensors, reference(99), strict=False):
                    slab.copy_(noise)
                yield "done"
            case ["holds", seed, *blocks]:
                yield str(holds(side, reference(int(seed)), list(map(int, blocks))))
    side.close()


def writer(region: Region, keys: CurveKeys) -> Iterator[str]:
    """open, close: the link. push SEED BLOCK: begins to write. fill SEED BLOCK ...: to the end. settle:
    until what was pushed is written. The answer is the error, if there is one."""
    link: Link | None = None
    for grants, line in enumerate(sys.stdin, 1):
        words = line.split()
        blocks = tuple(map(int, words[2:]))
        grant = Grant("d0", "epoch-1", f"r{grants}#0", grants, blocks)
        try:
            match words[0]:
                case "open":
                    asked = {"writer": WRITER, "wanted": "nixl", "deadline_s": DEADLINE_S}
                    link = open_link([region], LAYOUT, device="cpu", keys=keys, **asked)  # type: ignore[arg-type]
                case "push" if link is not None:
                    for layer, slab in enumerate(reference(int(words[1]))):
                        link.push(grant, layer, slab, blocks, blocks)
                    stuck = grant
                case "settle" if link is not None:
                    link.abandon(stuck)
                case "fill" if link is not None:
                    fill(link, grant, reference(int(words[1])))
                case "close" if link is not None:
                    link.close()
            yield "done"
        except TransferError as error:
            yield str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    role, where, plain = sys.argv[1:]
    shared = CurveKeys(*msgpack.unpackb(bytes.fromhex(plain)))
    if role == "owner":
        said = owner(where, shared)
    else:
        said = writer(Region(*msgpack.unpackb(bytes.fromhex(where))), shared)
    for answer in said:
        print(answer, flush=True)
