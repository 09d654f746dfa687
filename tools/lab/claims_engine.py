"""Claims about the engine alone, in this process: KV cache, compiling, batching. The two sides of a
comparison take turns and are compared turn by turn.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from baton.engine.boot import Engine, boot
from baton.engine.cpu.forward import NativeRunner
from baton.engine.device import DTYPES
from baton.engine.loading import load_model
from baton.engine.pool import Pool
from baton.engine.runner import Forward
from baton.engine.selftest import in_torch
from baton.errors import BatonError
from baton.kv.layout import KVLayout
from baton.kv.row import Logits, Row
from baton.model_files import ModelFiles
from baton.package import ROOT
from tools.lab.claims_findings import Result, by_rounds
from tools.lab.phrasing import number
from tools.measure.steps import DecodeSteps

BLOCK = 16
CONTEXT = 110  # tokens of a sequence before the step that is timed
BATCH = 8
STEPS = 18  # of one turn: three turns are enough for a verdict
TORCH_COMPILE_S = 60.0

Side = Callable[[], float]


def booted(files: ModelFiles, dtype: str) -> Engine:
    """An engine on the CPU, as a worker boots it."""
    return boot(files, device="cpu", dtype=dtype, block_size=BLOCK)


def turns(before: Side, after: Side, rounds: int) -> list[tuple[float, float]]:
    """Run each side once to warm up, then both in turn."""
    before(), after()
    return [(before(), after()) for _ in range(rounds)]


def kv_cache(engine: Engine, prompt: int, new: int, rounds: int) -> Result:
    """A whole answer with the cache, and with all tokens run again at every step."""
    ids = [(7 * i) % 1000 + 5 for i in range(prompt)]
    blocks = list(range(engine.layout.blocks_for(prompt + new)))
    pool = Pool.private(engine.layout, len(blocks), engine.device)
    answers: dict[bool, list[int]] = {}

    def answer(cached: bool) -> float:
        known = list(ids)
        begun = time.perf_counter()
        for i in range(new):
            start = len(known) - 1 if cached and i else 0
            row = Row(known[start:], start, blocks, Logits.LAST)
            known.append(int(engine.runner.run(pool, [row])[0].argmax()))
        took = time.perf_counter() - begun
        answers[cached] = known
        return 1e3 * took

    pairs = turns(lambda: answer(False), lambda: answer(True), rounds)
    if answers[True] != answers[False]:
        raise BatonError("the answers with and without the KV cache differ")
    definition = (
        f"{new} greedy tokens after a prompt of {prompt}, in process; same tokens both ways"
    )
    return by_rounds("kv-cache", pairs, "ms", definition, samples=new * rounds)


def decode_ms(runner: Forward, layout: KVLayout, batch: int) -> Side:
    """The time of one decode step, in ms."""
    steps = DecodeSteps(runner, layout, batch=batch, context=CONTEXT)
    return lambda: 1e3 * steps.seconds(STEPS)


def compiled(engine: Engine, files: ModelFiles, dtype: str, rounds: int) -> Result:
    """The compiled program against the same model in plain torch, as `bench step` builds both."""
    if not isinstance(engine.runner, NativeRunner):
        raise BatonError(f"{files.name} is not compiled here, it runs {engine.runner.backend}")
    if dtype not in DTYPES:
        raise BatonError(f"plain torch has no {dtype} weights to compare with")
    model = load_model(files, torch.device("cpu"), DTYPES[dtype])
    runner, layout = in_torch(model, DTYPES[dtype], BLOCK)
    ours, plain = decode_ms(engine.runner, engine.layout, 1), decode_ms(runner, layout, 1)
    definition = f"a decode step at batch 1 after {CONTEXT} tokens; before: plain torch"
    pairs = turns(plain, ours, rounds)
    return by_rounds("compiled", pairs, "ms", definition, samples=STEPS * rounds)


def batching(engine: Engine, rounds: int) -> Result:
    """Tokens/s of a full batch against those of one sequence."""
    one, many = (decode_ms(engine.runner, engine.layout, batch) for batch in (1, BATCH))
    pairs = turns(lambda: 1e3 / one(), lambda: 1e3 * BATCH / many(), rounds)
    slower = median(BATCH * before / after for before, after in pairs)
    return by_rounds(
        "batching",
        pairs,
        "tokens/s",
        f"decode steps after {CONTEXT} tokens, batch {BATCH} beside batch 1, in process",
        f"a step of {BATCH} sequences takes {number(slower)} times as long as one of a single sequence.",
        samples=STEPS * rounds,
        more_is_better=True,
    )


def torch_compile(model: str, dtype: str, rounds: int, limit_s: float = TORCH_COMPILE_S) -> Result:
    """torch.compile of the same model in plain torch, in a process and with a cache of its own
    (tools/lab/claims_torch.py). Raises BatonError if it fails or is not done in `limit_s` seconds."""
    with tempfile.TemporaryDirectory(prefix="lab-inductor-") as folder:
        own = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        own |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
        with subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tools.lab.claims_torch",
                model,
                dtype,
                str(rounds),
                str(os.getpid()),
            ],
            cwd=ROOT,
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, errors = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                raise BatonError(f"torch.compile was not done within {limit_s:g} s") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise BatonError(f"torch.compile failed: {last_line(errors) or process.returncode}")
    found = json.loads(output.splitlines()[-1])
    return by_rounds(
        "torch.compile",
        [(before, after) for before, after in found["ms"]],
        "ms",
        f"a decode step at batch 1 after {CONTEXT} tokens, transformers' model with a static cache",
        f"compiling took {number(found['compile_s'])} s; the logits differ by up to "
        f"{number(found['off'])}.",
        samples=found["steps"],
    )


def last_line(text: str) -> str:
    """The last line of a traceback."""
    lines: Sequence[str] = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
