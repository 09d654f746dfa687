"""The cost of handing KV blocks from one process to another, by every transport of this machine.

    python main.py bench handover --megabytes 25.6 --megabytes 64 --repeats 7
    python main.py bench handover --device cuda:0   # both processes on one GPU
    python main.py bench handover --transport frames_tcp --host 10.0.0.1    # by this network interface
    python main.py bench handover --transport nixl --host 10.0.0.1 --through "ip netns exec other"
    python main.py bench handover --transport frames_tcp --megabytes 151 --layer-ms 50    # overlapped

With --layer-ms the writer does as a prefill worker does: it computes each layer for so long (CPU time)
and gives its blocks to a courier. "after" is the time from the end of the last layer's computation until
READY; it alternates with pushes of the same blocks without computation.

tools/benchmarks/between_hosts.sh makes two network namespaces and measures between them, beside iperf3.
The owner is this process, the writer another one. The time runs from the writer's first push until the
grant is READY at the owner. For shared memory, and CUDA IPC on one GPU, that is only stamping and
checking, as prefill computes in place. The transports take turns, so a slow moment hits all of
them. CPU time is that of both processes with all their threads: encryption takes most of it over tcp.
The last line printed is JSON.
"""

import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import msgpack
import torch
import zmq

from baton.kv.grant import Grant
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.region import Arrival, Receipt, Region
from baton.package import ROOT
from baton.transfer.base import Export, Link
from baton.transfer.courier import Courier, Opened, Sent
from baton.transfer.registry import CurveKeys, make_exports, open_link, open_way
from baton.transfer.slabs import Slabs, allocate_slabs

LAYOUT = KVLayout(tuple(LayerShape(12, 64, 64) for _ in range(12)), 16, "float32")  # GPT-2 small
T = TypeVar("T")
CPU_TRANSPORTS = ("shm", "pinned", "frames", "frames_tcp")
BY_COURIER = ("frames", "frames_tcp", "nixl")
GPU_TRANSPORTS = ("cuda_ipc", "pinned", "frames")


@dataclass(frozen=True, slots=True)
class Figure:
    """One transport at one size. Times in ms."""

    transport: str
    megabytes: float
    moved_megabytes: float
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    gb_per_s: float | None  # at the median
    best_gb_per_s: float | None
    cpu_s_per_gb: float | None  # of both processes
    busiest_s_per_gb: (
        float | None
    )  # CPU time of the busiest thread: its inverse bounds GB/s on free cores
    after_ms: float | None  # with --layer-ms: the median from the last layer's end until READY


@dataclass(frozen=True, slots=True)
class Once:
    """One hand-over."""

    seconds: float
    moved: int  # bytes
    cpu_s: float  # of both processes
    after_s: float  # since the last layer was computed


def thread_times() -> dict[str, float]:
    """CPU seconds of each thread of this process so far, where the kernel tells."""
    tasks, found = Path("/proc/self/task"), {}
    for task in tasks.iterdir() if tasks.exists() else ():
        with contextlib.suppress(OSError, ValueError, IndexError):  # the thread has ended
            found[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def write(plan: dict[str, Any]) -> None:
    """The writer: opens the link, then fills a grant for each line on stdin."""
    region = Region(**plan["region"])
    keys = CurveKeys(plan["public"], plan["secret"])
    device = torch.device(plan["device"])
    asked: dict[str, Any] = {"device": device, "writer": "writer", "keys": keys}
    link: Link | Courier
    if plan["courier"]:
        link = open_way([region], LAYOUT, epoch="bench", wanted=region.transport, **asked)
        assert isinstance(link, Courier)
        _news(link, Opened)
    else:
        link = open_link([region], LAYOUT, wanted=region.transport, **asked)
    blocks = list(range(plan["blocks"]))
    sizes = LAYOUT.slab_bytes(plan["blocks"])
    own = None
    if isinstance(link, Courier) or link.slabs is None:
        own = [torch.ones(size, dtype=torch.uint8, device=device) for size in sizes]
    for line in sys.stdin:
        number, layer_s = json.loads(line)
        grant = Grant("owner", "bench", f"r{number}#0", number, tuple(blocks))
        began = time.process_time()
        receipt, computed = _fill(link, grant, own, blocks, layer_s)
        spent = time.process_time() - began
        told = [receipt.moved_bytes, receipt.digest.hex(), spent, computed, thread_times()]
        print(json.dumps(told), flush=True)
    link.close()


def _fill(
    link: Link | Courier,
    grant: Grant,
    own: list[torch.Tensor] | None,
    blocks: list[int],
    layer_s: float,
) -> tuple[Receipt, float]:
    """The receipt, and when (time.monotonic) the last layer was computed."""
    computed = time.monotonic()
    for layer in range(len(LAYOUT.layers)) if own else ():
        assert own is not None
        _compute(layer_s)
        computed = time.monotonic()
        link.push(grant, layer, own[layer], blocks, blocks)
    if isinstance(link, Courier):
        link.finish(grant, blocks)
        return _news(link, Sent).receipt, computed
    return link.finish(grant, blocks), computed


def _compute(seconds: float) -> None:
    """Products, for so much CPU time of this thread."""
    a, until = torch.ones(256, 256), time.thread_time() + seconds
    while time.thread_time() < until:
        a @ a


def _news(courier: Courier, kind: type[T]) -> T:
    while True:
        for each in courier.poll():
            if isinstance(each, kind):
                return each
            raise SystemExit(f"error: the way came to {each}")
        time.sleep(0.0002)


class Pair:
    """An owner in this process and a writer in another."""

    def __init__(
        self, transport: str, blocks: int, folder: Path, keys: CurveKeys, device: torch.device,
        host: str, through: Sequence[str], layer_s: float | None,
    ) -> None:  # fmt: skip
        self.blocks, self.layer_s = blocks, layer_s
        self.slabs: Slabs = allocate_slabs(LAYOUT, blocks, device, shared=True)
        (self.export,) = make_exports(
            [transport], self.slabs, epoch="bench", run_dir=folder, bind_host=host, keys=keys
        )
        self.writer = subprocess.Popen(
            [
                *through,
                sys.executable,
                "-m",
                "tools.benchmarks.handover",
                "--writer",
                str(folder / transport),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        plan = {"region": asdict(self.export.region), "blocks": blocks}
        plan |= {"device": str(device), "courier": layer_s is not None}
        plan |= {"public": keys.public, "secret": keys.secret}
        (folder / transport).write_bytes(msgpack.packb(plan))
        self.generation = 0
        self.times: list[tuple[dict[str, float], dict[str, float]]] = []  # of both, after each

    def busiest_s(self) -> float:
        """CPU seconds of the busiest thread of either process since the first hand-over."""
        spent = [
            last[name] - first.get(name, 0.0)
            for first, last in zip(self.times[0], self.times[-1], strict=True)
            for name in last
        ]
        return max(spent, default=0.0)

    def once(self, *, overlapped: bool = False) -> Once:
        """One hand-over, until READY."""
        assert self.writer.stdin is not None
        assert self.writer.stdout is not None
        self.generation += 1
        grant = Grant(
            "owner", "bench", f"r{self.generation}#0", self.generation, tuple(range(self.blocks))
        )
        self.export.expect(grant)
        poller = zmq.Poller()
        poller.register(self.writer.stdout.fileno(), zmq.POLLIN)
        for socket in self.export.wakeups():
            poller.register(socket, zmq.POLLIN)
        began, spent = time.perf_counter(), time.process_time()
        order = [self.generation, self.layer_s if overlapped else 0.0]
        print(json.dumps(order), file=self.writer.stdin, flush=True)
        while self.writer.stdout.fileno() not in dict(poller.poll(60_000)):
            self.export.poll()
        moved, digest, cpu_s, computed, writer_times = json.loads(self.writer.stdout.readline())
        self.times.append((thread_times(), writer_times))
        receipt = Receipt(moved, bytes.fromhex(digest), 0.0)
        _await(self.export, grant, receipt)
        took, spent = time.perf_counter() - began, time.process_time() - spent
        after_s = time.monotonic() - computed
        self.export.retire(grant)
        return Once(took, moved, spent + cpu_s, after_s)

    def close(self) -> None:
        """End the writer and free the memory."""
        assert self.writer.stdin is not None
        assert self.writer.stdout is not None
        self.writer.stdin.close()
        self.writer.wait(120)  # a busy machine takes its time to unload CUDA, or torch
        self.writer.stdout.close()
        self.export.close()
        self.slabs.close()


def _await(export: Export, grant: Grant, receipt: Receipt) -> None:
    while (arrival := export.arrival(grant, receipt)) is Arrival.PENDING:
        if not export.poll() and export.arrival(grant, receipt) is Arrival.PENDING:
            zmq.select(list(export.wakeups()), [], [], 0.001)
    if arrival is not Arrival.READY:
        raise SystemExit(f"error: the hand-over by {export.region.transport} came out {arrival}")


def compare(
    megabytes: float,
    repeats: int,
    device: torch.device,
    transports: Sequence[str],
    host: str = "127.0.0.1",
    through: Sequence[str] = (),
    layer_s: float | None = None,
) -> list[Figure]:
    """All transports at one size, in turns, after a warm-up each."""
    keys = CurveKeys(*zmq.curve_keypair())
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        given = (transports, Path(name), keys, host, through, layer_s)
        return _compare(megabytes, repeats, device, *given)


def _compare(
    megabytes: float,
    repeats: int,
    device: torch.device,
    transports: Sequence[str],
    folder: Path,
    keys: CurveKeys,
    host: str,
    through: Sequence[str],
    layer_s: float | None,
) -> list[Figure]:
    blocks = max(1, round(megabytes * 1e6 / LAYOUT.block_bytes))
    given = (blocks, folder, keys, device, host, through, layer_s)
    pairs = {name: Pair(name, *given) for name in transports}
    for pair in pairs.values():
        pair.once()
    taken: dict[str, list[Once]] = {name: [] for name in pairs}
    after: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(repeats):
        for name, pair in pairs.items():
            taken[name].append(pair.once())
            if layer_s is not None:
                after[name].append(pair.once(overlapped=True).after_s)
    figures = []
    for name, pair in pairs.items():
        pair.close()
        times = [once.seconds * 1000 for once in taken[name]]
        moved, median = taken[name][0].moved, statistics.median(times)
        cpu_s = statistics.median(once.cpu_s for once in taken[name])
        all_moved = moved * len(pair.times[1:])
        figures.append(
            Figure(
                transport=name,
                megabytes=round(blocks * LAYOUT.block_bytes / 1e6, 1),
                moved_megabytes=round(moved / 1e6, 1),
                median_ms=round(median, 3),
                fastest_ms=round(min(times), 3),
                slowest_ms=round(max(times), 3),
                gb_per_s=round(moved / median / 1e6, 2) if moved else None,
                best_gb_per_s=round(moved / min(times) / 1e6, 2) if moved else None,
                cpu_s_per_gb=round(1e9 * cpu_s / moved, 2) if moved else None,
                busiest_s_per_gb=(
                    round(1e9 * pair.busiest_s() / all_moved, 2)
                    if moved and layer_s is None
                    else None
                ),
                after_ms=(round(statistics.median(after[name]) * 1000, 1) if after[name] else None),
            )
        )
    return figures


@click.command()
@click.option("--megabytes", multiple=True, type=float, default=(25.6, 64.0), show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Where both processes are.")
@click.option(
    "--transport", "only", multiple=True, help="These alone.  [default: all of the device]"
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address for tcp.")
@click.option(
    "--through",
    default="",
    metavar="COMMAND",
    help="Starts the writer, elsewhere: 'ip netns exec b'.",
)
@click.option(
    "--layer-ms",
    type=float,
    default=None,
    help="Overlap with a prefill that computes each layer for so long.  [default: no]",
)
@click.option("--writer", "plan", type=click.Path(path_type=Path), default=None, hidden=True)
def main(
    megabytes: tuple[float, ...], repeats: int, device: str, only: tuple[str, ...], host: str,
    through: str, layer_ms: float | None, plan: Path | None,
) -> None:  # fmt: skip
    """Hand KV blocks between two processes by every transport; print times, GB/s and CPU time."""
    torch.set_num_threads(1)  # as workers that share a machine are started
    if plan is not None:
        write(msgpack.unpackb(plan.read_bytes()))
        return
    place = torch.device(device)
    names = only or (GPU_TRANSPORTS if place.type == "cuda" else CPU_TRANSPORTS)
    if layer_ms is not None:
        names = only or BY_COURIER[:2]
        if without := [name for name in names if name not in BY_COURIER]:
            raise click.UsageError(
                f"--layer-ms is for {', '.join(BY_COURIER)}; {without[0]} has no courier"
            )
    layer_s = None if layer_ms is None else layer_ms / 1000
    given = (repeats, place, names, host, through.split(), layer_s)
    figures = [f for size in megabytes for f in compare(size, *given)]
    columns = f"{'median':>11}{'spread':>20}{'GB/s':>8}{'CPU s/GB':>10}{'busiest':>9}{'after':>12}"
    print(f"{'transport':<12}{'MB':>8}{'copied':>9}{columns}")
    for f in figures:
        spread = f"{f.fastest_ms:.2f} .. {f.slowest_ms:.2f}"
        speed = f"{f.gb_per_s:.2f}" if f.gb_per_s is not None else "-"
        cpu = f"{f.cpu_s_per_gb:.2f}" if f.cpu_s_per_gb is not None else "-"
        busiest = f"{f.busiest_s_per_gb:.2f}" if f.busiest_s_per_gb is not None else "-"
        after = f"{f.after_ms:.1f} ms" if f.after_ms is not None else "-"
        print(
            f"{f.transport:<12}{f.megabytes:>8.1f}{f.moved_megabytes:>9.1f}"
            f"{f.median_ms:>8.2f} ms{spread:>20}{speed:>8}{cpu:>10}{busiest:>9}{after:>12}"
        )
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps({**machine, "figures": [asdict(figure) for figure in figures]}))


if __name__ == "__main__":
    main()
