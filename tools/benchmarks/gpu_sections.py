"""The sections of tools/benchmarks/gpu.py. Each yields cells: a name and a result."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from baton.engine.boot import Engine, boot
from baton.engine.cuda.graphs import GraphRunner
from baton.engine.loading import load_model
from baton.engine.pool import Pool
from baton.engine.runner import Forward
from baton.errors import BatonError
from baton.kv.row import Logits, Row
from baton.model_files import resolve_model
from baton.topology import Topology
from tools.benchmarks.disagg import unloaded
from tools.benchmarks.handover import CPU_TRANSPORTS, GPU_TRANSPORTS, compare
from tools.measure.limits import Work
from tools.measure.shape import required_shape
from tools.measure.split import Split, options_for, running

BLOCK = 16
PROMPT = 64  # tokens of the prompts that transformers continues
REASONS = (BatonError, RuntimeError, ValueError, LookupError, OSError, AssertionError, ImportError,
           TypeError, AttributeError)  # fmt: skip
Cell = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Plan:
    """The amount of work."""

    device: torch.device
    dtype: str
    batches: Sequence[int]
    prefills: Sequence[int]
    context: int  # tokens of each sequence in a decode step
    rounds: int
    new: int  # tokens that transformers writes
    matrix: int  # rows and columns of the matrix for the rate
    first_token: tuple[str, int]  # model and tokens of the prompt
    megabytes: float  # of one hand-over

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and cache."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def attempt(name: str, run: Callable[[], dict[str, Any]]) -> Cell:
    """One cell. A failure, such as too little memory for the batch, is its result."""
    try:
        return name, run()
    except REASONS as error:
        return name, {"failure": reason(error)}


def reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def timed(
    run: Callable[[], object], device: torch.device, rounds: int, *, warm_ups: int = 2
) -> float:
    """Median seconds of a call with the device's work done, after the warm-up calls."""
    times = []
    for _ in range(rounds + warm_ups):
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[warm_ups:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limits(plan: Plan) -> Iterator[Cell]:
    """Bytes moved a second by a copy, and floating point operations a second of a large product."""
    size, dtype, device = plan.matrix, plan.torch_dtype, plan.device
    source = torch.ones(4 * size * size, dtype=dtype, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / timed(lambda: target.copy_(source), device, 5)
    square = torch.randn(size, size, device=device).to(dtype)
    rate = 2 * size**3 / timed(lambda: square @ square, device, 5)
    yield "limits", {"GB/s": moved / 1e9, "TFLOP/s": rate / 1e12}


def engine(plan: Plan, model: str) -> Iterator[Cell]:
    """Decode with recorded steps and without, and prefill."""
    ours = boot(resolve_model(model), device=str(plan.device), dtype=plan.dtype, block_size=BLOCK)
    yield f"{model} how", {"how": ours.runner.backend, "dtype": ours.dtype}
    arms: list[tuple[str, Forward]] = [("", ours.runner)]
    if isinstance(ours.runner, GraphRunner):
        arms.append((" without graphs", ours.runner.plain))
    for batch in plan.batches:
        for name, runner in arms:
            step = partial(decode, ours, runner, batch, plan)
            yield attempt(f"{model} decode {batch}{name}", step)
            _drop(ours)
    for tokens in plan.prefills:
        yield attempt(f"{model} prefill {tokens}", partial(prefill, ours, tokens, plan))
        _drop(ours)


NO_WORK = Work(0.0, 0.0, 0.0)  # not counted: the cell gets no share of the limit


def cell(seconds: float, tokens: int, work: Work = NO_WORK) -> dict[str, float]:
    """Time and rate of `tokens` tokens, and the work they cannot do without (see `share` in gpu.py)."""
    moved = work.weight_bytes + work.kv_bytes
    return {"ms": 1e3 * seconds, "tokens/s": tokens / seconds, "bytes": moved, "flops": work.flops}


def work_of(ours: Engine, *, tokens: int, answers: int, cached: int, pairs: float) -> Work:
    """The least a forward of this engine moves and computes. The lm_head keeps its own dtype where the
    layers are quantized. Raises InputError for a mixture of experts."""
    head = "float32" if ours.dtype == "float32" else "bfloat16"
    return required_shape(ours.files).work(
        tokens=tokens,
        answers=answers,
        cached=cached,
        dtype=ours.dtype,
        head_dtype=head,
        pairs=pairs,
    )


def decode(ours: Engine, runner: Forward, batch: int, plan: Plan) -> dict[str, float]:
    """A step of `batch` sequences with `context` tokens each, the token chosen."""
    each = ours.layout.blocks_for(plan.context)
    pool = Pool.private(ours.layout, batch * each, ours.device, spare=True)
    for slab in pool.slabs:
        slab.zero_()  # any finite numbers will do
    tables = [list(range(i * each, (i + 1) * each)) for i in range(batch)]
    rows = [Row([i], plan.context - 1, blocks, Logits.LAST) for i, blocks in enumerate(tables)]
    seconds = timed(lambda: runner.run(pool, rows).argmax(dim=-1), ours.device, plan.rounds)
    cached = batch * plan.context
    return cell(
        seconds, batch, work_of(ours, tokens=batch, answers=batch, cached=cached, pairs=cached)
    )


def prefill(ours: Engine, tokens: int, plan: Plan) -> dict[str, float]:
    """Prefill of one prompt."""
    blocks = list(range(ours.layout.blocks_for(tokens)))
    pool = Pool.private(ours.layout, len(blocks), ours.device)
    row = Row([7] * tokens, 0, blocks)
    rounds = max(1, plan.rounds // 4)
    seconds = timed(lambda: ours.runner.fill(pool, [row]), ours.device, rounds)
    return cell(
        seconds, tokens, work_of(ours, tokens=tokens, answers=0, cached=0, pairs=tokens**2 / 2)
    )


def _drop(ours: Engine) -> None:
    """Free pool and graphs before the next cell needs the memory."""
    if isinstance(ours.runner, GraphRunner):
        ours.runner.forget()
    if ours.device.type == "cuda":
        torch.cuda.empty_cache()


def transformers(plan: Plan, model: str) -> Iterator[Cell]:
    """transformers' generate and its continuous batching, on the same weights."""
    theirs: Any = load_model(resolve_model(model), plan.device, plan.torch_dtype)
    for batch in plan.batches:
        theirs.set_attn_implementation("sdpa")
        run = partial(generate, theirs, plan, batch)
        yield attempt(f"{model} transformers generate {batch}", run)
    for batch in plan.batches:
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()  # its cache takes all free memory
        run = partial(continuous, theirs, plan, batch)
        yield attempt(f"{model} transformers continuous {batch}", run)


def generate(theirs: Any, plan: Plan, batch: int) -> dict[str, float]:
    """Time of a step: the difference between a long run and a short one, so without prefill."""
    ids = torch.full((batch, PROMPT), 7, device=plan.device)

    def run(tokens: int) -> float:
        _wait(plan.device)
        begun = time.perf_counter()
        theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                        min_new_tokens=tokens, do_sample=False, pad_token_id=0)  # fmt: skip
        _wait(plan.device)
        return time.perf_counter() - begun

    run(2)
    return cell((run(plan.new) - run(2)) / (plan.new - 2), batch)


def continuous(theirs: Any, plan: Plan, batch: int) -> dict[str, float]:
    """Time of a step of its continuous batching, from its token timestamps, so without the start-up that
    captures graphs."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=256)  # else 0.9 of the memory
    config = GenerationConfig(
        max_new_tokens=plan.new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    found = theirs.generate_batch(
        inputs=[[7 + i % 50] * PROMPT for i in range(batch)],
        generation_config=config,
        continuous_batching_config=small if plan.device.type == "cpu" else None,
        record_timestamps=True,
        progress_bar=False,
    )
    times = [each.timestamps for each in found.values() if each.timestamps]
    if len(times) < batch:
        raise RuntimeError(f"{len(times)} of {batch} requests were answered")
    last, first = max(each[-1] for each in times), max(each[0] for each in times)
    seconds = (last - first) / (min(map(len, times)) - 1)  # while all requests run
    return cell(seconds, batch)


def handover(plan: Plan) -> Iterator[Cell]:
    """KV from one process to another on the same device, by every transport."""
    names = GPU_TRANSPORTS if plan.device.type == "cuda" else CPU_TRANSPORTS[:2]
    for figure in compare(plan.megabytes, plan.rounds, plan.device, names):
        found = {
            "ms": figure.median_ms,
            "MB": figure.megabytes,
            "copied MB": figure.moved_megabytes,
        }
        yield (
            f"hand-over {figure.transport}",
            found | {"GB/s": figure.megabytes / figure.median_ms},
        )


def first_token(plan: Plan) -> Iterator[Cell]:
    """TTFT of a long prompt on an idle cluster: prefill and decode in two processes on one device, and in
    one."""
    model, prompt = plan.first_token
    place, found = (str(plan.device),), {}
    for split in (Split("P/D", False, 2 * prompt), Split("colocated", True, 2 * prompt)):
        topology = Topology(() if split.colocated else place, place, split.colocated)
        options = options_for(split, model=model, dtype=plan.dtype, streams=2)
        with running(split, replace(options, topology=topology)) as arm:
            traces = [unloaded(arm, prompt, 8) for _ in range(3)]
        found[split.name] = 1e3 * statistics.median(trace.ttft for trace in traces)
        moved, kv = traces[-1].timings.moved_bytes, traces[-1].timings.kv_bytes
        spent = 1e3 * statistics.median(trace.timings.handover_s for trace in traces)
        yield (
            f"first token {split.name}",
            {"ms": found[split.name], "hand-over ms": spent, "KV MB": kv / 1e6,
             "copied MB": moved / 1e6},
        )  # fmt: skip
    yield "first token added by the split", {"ms": found["P/D"] - found["colocated"]}
