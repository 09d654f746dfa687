"""The questions of a session on a lent GPU, one command each; tools/benchmarks/gpu_first.sh asks them.

    python -m tools.benchmarks.gpu_probe --device cuda:0 there
    python -m tools.benchmarks.gpu_probe --device cpu --quick model    # the same code, anywhere

The last line printed is JSON. A question that fails in part says so and goes on.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from baton.engine.attention import AttentionParams
from baton.engine.batch import pack
from baton.engine.boot import boot
from baton.engine.cuda.graphs import GraphRunner
from baton.engine.device import describe_device, free_memory, pick_device
from baton.engine.gather import GatherAttention
from baton.engine.pool import Pool
from baton.errors import BatonError, InputError
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.row import Logits, Row
from baton.model_files import resolve_model
from baton.package import ROOT
from baton.topology import Topology
from sampler.params import SamplingParams
from sampler.sample import SamplingBatch
from sampler.step import step as sample_step
from tools.benchmarks.gpu_sections import BLOCK, attempt, timed
from tools.measure.slo import Slo, summarise
from tools.measure.split import PD, Split, options_for, running
from tools.measure.workload import mixed

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    device: torch.device
    model: str
    batches: tuple[int, ...]
    contexts: tuple[int, ...]  # of decode steps
    chunk: tuple[int, int]  # queries, keys
    heads: tuple[int, int, int]  # query heads, key heads, numbers of a head
    rounds: int
    prompt: int  # of the long prompts beside streams
    streams: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def full(device: torch.device) -> Sizes:
    """On a card: the shape of Qwen2-0.5B."""
    return Sizes(device, "random:qwen2-0.5b", (1, 64, 256), (512, 513), (2048, 8192), (14, 2, 64), 20,
                 8192, 8)  # fmt: skip


def small(device: torch.device) -> Sizes:
    """To see that it runs."""
    return Sizes(device, "demo", (1, 2), (32, 33), (8, 24), (4, 2, 16), 2, 64, 2)


def there(sizes: Sizes) -> Found:
    """What this machine has."""
    cuda = torch.backends.cuda
    for command in (["nvidia-smi"], ["nvidia-smi", "topo", "-m"], ["df", "-h", "/dev/shm"]):
        if shutil.which(command[0]):
            click.echo(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    return {
        "device": describe_device(sizes.device),
        "free GiB": free_memory(sizes.device) / 2**30,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if sizes.device.type == "cuda" else None,
        "sdp": {name: getattr(cuda, f"{name}_sdp_enabled")()
                for name in ("flash", "mem_efficient", "cudnn", "math")},
        "mps": shutil.which("nvidia-cuda-mps-control"),
        "alloc": os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF")),
        "ptrace": _read("/proc/sys/kernel/yama/ptrace_scope"),
    }  # fmt: skip


def sdpa(sizes: Sizes) -> Found:
    """Each backend on a chunk from the start, one behind others and a step: the first call of a new
    shape, a later one, and the error against math in fp32."""
    found: Found = {}
    queries, keys = sizes.chunk
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]  # fmt: skip
    for backend in backends:
        for name, q_len, k_len, mask in (
            ("start", queries, queries, "causal"),
            ("later", queries, keys, "lower right"),
            ("later, bools", queries, keys, "bools"),
            ("step", 1, keys, "none"),
        ):
            key, cell = attempt(f"{backend.name} {name}",
                                partial(_attended, sizes, backend, q_len, k_len, mask))  # fmt: skip
            found[key] = cell
            click.echo(f"{key}: {cell}")
    return found


def _attended(sizes: Sizes, backend: SDPBackend, queries: int, keys: int, kind: str) -> Found:
    from torch.nn.attention.bias import causal_lower_right

    heads, kv_heads, width = sizes.heads
    torch.manual_seed(0)
    made = partial(torch.randn, device=sizes.device, dtype=sizes.dtype)
    first = made(1, heads, queries, width)
    k, v = made(1, kv_heads, keys, width), made(1, kv_heads, keys, width)
    square = torch.ones(queries, keys, dtype=torch.bool, device=sizes.device).tril(keys - queries)
    mask: Any = {"bools": square, "none": None, "causal": None}.get(kind)
    if kind == "lower right":
        mask = causal_lower_right(queries, keys)

    def run(q: torch.Tensor = first) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=kind == "causal", enable_gqa=True
            )

    cold = timed(run, sizes.device, 1, warm_ups=0)
    steady = timed(run, sizes.device, sizes.rounds)
    with sdpa_kernel(SDPBackend.MATH):
        exact, keys32, values32 = first.float(), k.float(), v.float()
        seen = None if kind == "none" else square
        expected = F.scaled_dot_product_attention(exact, keys32, values32, seen, enable_gqa=True)
    error = float((run().float() - expected).abs().max())
    return {"first ms": 1e3 * cold, "ms": 1e3 * steady, "error": error}


def kernel(sizes: Sizes) -> Found:
    """The attention that boot() chose against the gathered one, alone: time, error, GB of KV a second."""
    engine = boot(
        resolve_model(sizes.model), device=str(sizes.device), dtype="auto", block_size=BLOCK
    )
    runner: Any = engine.runner
    plain = runner.plain if isinstance(runner, GraphRunner) else runner
    plan = getattr(plain, "plan_kernel", GatherAttention)
    heads, kv_heads, width = sizes.heads
    layout = KVLayout((LayerShape(kv_heads, width, width),), BLOCK, str(sizes.dtype)[6:])
    found: Found = {"how": engine.runner.backend}
    for batch in sizes.batches:
        for context in sizes.contexts:
            name, cell = attempt(
                f"{batch} x {context}",
                partial(_kernel, sizes, layout, plan, heads, batch, context),
            )
            found[name] = cell
            click.echo(f"{name}: {cell}")
    return found


def _kernel(
    sizes: Sizes, layout: KVLayout, plan: Any, heads: int, batch: int, context: int
) -> Found:
    each = layout.blocks_for(context)
    pool = Pool.private(layout, batch * each, sizes.device)
    torch.manual_seed(0)
    for views in (pool.keys, pool.values):
        views[0].normal_()
    rows = [Row([0], context - 1, list(range(i * each, (i + 1) * each)), Logits.LAST)
            for i in range(batch)]  # fmt: skip
    packed = pack(rows, BLOCK, sizes.device)
    width = layout.layers[0].key_dim
    query = torch.randn(batch, heads, width, device=sizes.device, dtype=sizes.dtype)
    params = AttentionParams(width**-0.5)
    ours, slow = plan(packed, BLOCK), GatherAttention(packed, BLOCK)
    error = (ours(query, pool, 0, params) - slow(query, pool, 0, params)).abs().max()
    times = {
        name: timed(partial(run, query, pool, 0, params), sizes.device, sizes.rounds)
        for name, run in (("chosen", ours), ("gathered", slow))
    }
    moved = batch * context * layout.block_bytes / BLOCK
    return {
        "chosen us": 1e6 * times["chosen"], "gathered us": 1e6 * times["gathered"],
        "GB/s": moved / times["chosen"] / 1e9, "error": float(error),
    }  # fmt: skip


def model(sizes: Sizes) -> Found:
    """Decode steps of a model in one process: recorded and not, greedy and sampled; operations a step."""
    engine = boot(
        resolve_model(sizes.model), device=str(sizes.device), dtype="auto", block_size=BLOCK
    )
    found: Found = {"how": engine.runner.backend}
    for batch in sizes.batches:
        for context in sizes.contexts:
            name, cell = attempt(
                f"{batch} x {context}", partial(_steps, sizes, engine, batch, context)
            )
            found[name] = cell
            click.echo(f"{name}: {cell}")
    return found


def _steps(sizes: Sizes, engine: Any, batch: int, context: int) -> Found:
    runner = engine.runner
    each = engine.layout.blocks_for(context)
    pool = Pool.private(engine.layout, batch * each, engine.device, spare=True)
    for slab in pool.slabs:
        slab.zero_()
    rows = [Row([i % 32], context - 1, list(range(i * each, (i + 1) * each)), Logits.LAST)
            for i in range(batch)]  # fmt: skip
    params = [SamplingParams(temperature=0.8, top_p=0.95, seed=i) for i in range(batch)]

    def sampled() -> None:
        logits = runner.run(pool, rows)
        built = SamplingBatch.build(
            params, [context] * batch, [()] * batch, "cpu", vocab=logits.shape[-1]
        )
        sample_step(logits, built, [-1] * batch)

    cells: dict[str, Callable[[], object]] = {
        "forward": lambda: runner.run(pool, rows),
        "greedy": lambda: runner.greedy(pool, rows),
        "sampled": sampled,
    }
    if isinstance(runner, GraphRunner):
        cells["unrecorded"] = lambda: runner.plain.run(pool, rows)
    found: Found = {f"{name} ms": 1e3 * timed(run, engine.device, sizes.rounds)
                    for name, run in cells.items()}  # fmt: skip
    found |= {f"{name} launches": launches(run, engine.device) for name, run in cells.items()}
    if isinstance(runner, GraphRunner):
        found["replayed"] = runner.replayed
        runner.forget()
    return found


def launches(run: Callable[[], object], device: torch.device) -> int:
    """Kernels and copies of one call on a GPU; operations on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        run()
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return sum(1 for event in profiled.events() if event.device_type == kind)


def beside(sizes: Sizes, *, mps: bool) -> Found:
    """Prefill and decode as two processes on one device: ITL of streams, alone and beside prompts."""
    where = (str(sizes.device),)
    split = Split(PD, colocated=False, max_num_batched_tokens=2 * sizes.prompt)
    options = options_for(split, model=sizes.model, dtype="auto", streams=sizes.streams + 4)
    options = replace(options, topology=Topology(where, where))
    found: Found = {}
    slo = Slo(1e9, 1e9)
    with started_mps() if mps else no_mps() as state, running(split, options) as arm:
        found["mps"] = state
        for name, count in (("alone", 0), ("beside prompts", 3)):
            load = mixed(streams=sizes.streams, stream_tokens=40 if sizes.rounds < 9 else 400,
                         prompt=sizes.prompt, every=0.3, count=count, seed=1, first=0.2)  # fmt: skip
            summary = summarise(arm.drive(load), slo, (0.0, 1e9))
            found[name] = {"ITL p50 ms": summary.itl_p50, "ITL p99 ms": summary.itl_p99,
                           "ITL max ms": summary.itl_max, "moved": summary.moved_bytes}  # fmt: skip
            click.echo(f"{name}: {found[name]}")
    return found


@contextmanager
def no_mps() -> Iterator[str]:
    """Processes take turns on the card."""
    yield "off"


@contextmanager
def started_mps() -> Iterator[str]:
    """NVIDIA's daemon that lets processes run on a card at the same time, if it is there: for those that
    are started within."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        yield "there is no nvidia-cuda-mps-control"
        return
    with tempfile.TemporaryDirectory() as folder:
        names = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
        os.environ.update(dict.fromkeys(names, folder))
        try:
            nothing = subprocess.DEVNULL  # the daemon would hold a pipe open
            done = subprocess.run([control, "-d"], stdin=nothing, stdout=nothing, stderr=nothing,
                                  check=False, timeout=10)  # fmt: skip
            yield "on" if done.returncode == 0 else f"refused with {done.returncode}"
        finally:
            subprocess.run([control], input="quit -t 1\n", text=True, check=False, timeout=10,
                           capture_output=True)  # fmt: skip
            for name in names:
                os.environ.pop(name, None)


OPENER = """
import json, sys, torch
share = [bytes.fromhex(each) if isinstance(each, str) else each for each in json.loads(sys.argv[1])]
torch.cuda.init()
storage = torch.UntypedStorage._new_shared_cuda(*share)
tensor = torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage)
print("sum", int(tensor.sum()))
"""


def ipc(sizes: Sizes) -> Found:
    """The smallest program that shares a GPU's memory between two processes, without any of our code."""
    if sizes.device.type != "cuda":
        return {"shared": "needs a GPU"}
    tensor = torch.ones(1 << 20, dtype=torch.uint8, device=sizes.device)
    torch.cuda.synchronize()
    share = tensor.untyped_storage()._share_cuda_()
    given = json.dumps([each.hex() if isinstance(each, bytes) else each for each in share])
    child = subprocess.run([sys.executable, "-c", OPENER, given], capture_output=True, text=True,
                           check=False, timeout=30, cwd=ROOT)  # fmt: skip
    click.echo(child.stderr)
    return {"code": child.returncode, "said": child.stdout.strip(), "expected": f"sum {1 << 20}"}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--quick", is_flag=True, help="Small sizes, to see that it runs.")
@click.option("--mps", is_flag=True, help="`beside`: with NVIDIA's multi-process service.")
@click.argument("what", type=click.Choice(["there", "sdpa", "kernel", "model", "beside", "ipc"]))
def main(device: str, quick: bool, mps: bool, what: str) -> None:
    """One question about a GPU."""
    try:
        place = pick_device(device)
    except InputError as error:
        raise click.ClickException(str(error)) from error
    sizes = small(place) if quick else full(place)
    questions: dict[str, Callable[[Sizes], Found]] = {
        "there": there, "sdpa": sdpa, "kernel": kernel, "model": model,
        "beside": partial(beside, mps=mps), "ipc": ipc,
    }  # fmt: skip
    try:
        found = questions[what](sizes)
    except BatonError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps({what: found}))


if __name__ == "__main__":
    main(prog_name="python -m tools.benchmarks.gpu_probe")
