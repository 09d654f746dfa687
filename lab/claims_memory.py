"""Claims about memory: bytes of weights and KV, exact; and beside them the resident memory (RSS) of a
decode worker's process that has answered a request.
"""

from dataclasses import dataclass
from pathlib import Path

from baton.engine.boot import Engine
from baton.engine.fast.forward import NativeRunner
from baton.engine.runner import Runner
from baton.errors import BatonError
from baton.model_files import resolve_model
from baton.table import amount
from lab.claims_engine import booted
from lab.claims_verdict import Result
from lab.study import Notebook
from measure.split import Split, options_for, running
from measure.workload import single

FULL = "float32"
PROMPT, NEW = 64, 8


@dataclass(frozen=True, slots=True)
class Held:
    """What a model takes in one dtype. `rss_bytes` is None where nobody could read it."""

    dtype: str
    weights: int
    kv: int  # of one sequence as long as the context
    tokens: int
    rss_bytes: int | None

    @property
    def bytes(self) -> int:
        """Weights and KV."""
        return self.weights + self.kv


def weights_of(engine: Engine) -> int:
    """As this engine holds them."""
    runner = engine.runner
    if isinstance(runner, NativeRunner):
        return runner.weight_bytes
    if isinstance(runner, Runner):
        held = [*runner.model.parameters(), *runner.model.buffers()]
        return sum(each.nbytes for each in held)
    raise BatonError(f"nobody knows the weights of an engine that runs {runner.how}")


def held(model: str, dtype: str, tokens: int, notebook: Notebook) -> Held:
    """Exact bytes from an engine here; RSS from a worker of its own. (The engine comes first: a model
    that is compiled for the first time would leave its traces in the worker's RSS.)"""
    engine = booted(resolve_model(model), dtype)
    weights = weights_of(engine)
    kv = engine.layout.blocks_for(tokens) * engine.layout.block_bytes
    del engine
    rss = None
    try:
        rss = _rss_of_worker(model, dtype)
    except (BatonError, OSError) as error:
        notebook.failed(f"RSS in {dtype}", error)
    return Held(dtype, weights, kv, tokens, rss)


def _rss_of_worker(model: str, dtype: str) -> int:
    split = Split(f"colocated, {dtype}", True, 2048)
    with running(split, options_for(split, model=model, dtype=dtype, streams=1)) as arm:
        arm.drive(single(PROMPT, NEW, 1))
        return rss_bytes(Path(f"/proc/{arm.pids()['decode-0']}/status").read_text())


def rss_bytes(status: str) -> int:
    """Of /proc/PID/status."""
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise BatonError("/proc tells no VmRSS here")


def memory_result(key: str, full: Held, less: Held) -> Result:
    """How many times less."""
    definition = (
        f"weights + KV of one sequence of {full.tokens:,} tokens, "
        f"{full.dtype} to {less.dtype}; exact"
    )
    parts = (
        f"weights {amount(full.weights)} to {amount(less.weights)} "
        f"({full.weights / less.weights:.2f} times), KV {amount(full.kv)} to {amount(less.kv)} "
        f"({full.kv / less.kv:.2f} times)"
    )
    if full.rss_bytes and less.rss_bytes:
        parts += (
            f"; a decode worker's RSS {amount(full.rss_bytes)} to {amount(less.rss_bytes)} "
            f"({full.rss_bytes / less.rss_bytes:.2f} times: torch and Python are in there too)"
        )
    before, after = full.bytes / 1e6, less.bytes / 1e6
    return Result(key, (before / after,), before, after, "MB", definition, f"{parts}.")
