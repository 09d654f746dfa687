"""Claims about memory: bytes of weights and KV, exact; and beside them the resident memory (RSS) of a
decode worker's process that has answered a request.
"""

from pathlib import Path

from baton.engine.boot import Engine
from baton.engine.cpu.forward import NativeRunner
from baton.engine.runner import Runner
from baton.errors import BatonError
from baton.model_files import resolve_model
from tools.lab.claims_engine import booted
from tools.lab.claims_held import Held, rss_bytes
from tools.lab.study import Notebook
from tools.measure.split import Split, options_for, running
from tools.measure.workload import single

FULL = "float32"
PROMPT, NEW = 64, 8


def weights_of(engine: Engine) -> int:
    """As this engine holds them."""
    runner = engine.runner
    if isinstance(runner, NativeRunner):
        return runner.weight_bytes
    if isinstance(runner, Runner):
        held = [*runner.model.parameters(), *runner.model.buffers()]
        return sum(each.nbytes for each in held)
    raise BatonError(f"nobody knows the weights of an engine that runs {runner.backend}")


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
