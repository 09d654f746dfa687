"""What a GPU session measures, each section by itself: one that fails is recorded and the rest goes on.

    benchmarks/gpu.sh                                     # on the machine with the card
    python -m benchmarks.gpu --device cpu --quick         # the same code, anywhere

Decode and prefill of the engine with random weights, as a share of the bandwidth and of the matrix rate
measured in the same run, beside transformers' own generate; then two processes on one GPU: what the
hand-over by CUDA IPC adds to the first token.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from baton.api import generate
from baton.engine.boot import Engine, boot
from baton.engine.device import describe_device, free_memory
from baton.engine.pool import Pool
from baton.errors import BatonError
from baton.kv.row import Logits, Row
from baton.model_files import resolve_model
from baton.table import table

SHAPES = ("gpt2", "qwen2-0.5b", "qwen2-7b")
BATCHES, PREFILLS, CONTEXT, BLOCK = (1, 8, 64, 256), (2048, 8192), 512, 16
REASONS = (BatonError, RuntimeError, ValueError, LookupError, OSError, AssertionError, ImportError)


def timed(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of a call, the device's work done."""
    times = []
    for _ in range(rounds + 2):
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limits(device: torch.device, dtype: torch.dtype, size: int) -> dict[str, float]:
    """Bytes read a second by a copy (half of what it moves), and multiplications of a large matmul."""
    source = torch.ones(size * size, dtype=dtype, device=device)
    target = torch.empty_like(source)
    read = 2 * source.nbytes / timed(lambda: target.copy_(source), device, 5) / 1e9
    square = torch.randn(size, size, device=device).to(dtype)
    rate = 2 * size**3 / timed(lambda: square @ square, device, 5) / 1e12
    return {"GB/s": read, "TFLOP/s": rate}


def weights_of(engine: Engine) -> float:
    """Bytes of weights in the engine's dtype, embeddings counted once."""
    config = engine.files.config
    hidden = int(config.get("hidden_size") or config["n_embd"])
    layers = int(config.get("num_hidden_layers") or config["n_layer"])
    inner = int(config.get("intermediate_size") or 4 * hidden)
    heads = int(config.get("num_attention_heads") or config["n_head"])
    kv = hidden // heads * int(config.get("num_key_value_heads") or heads)
    gates = 3 if "intermediate_size" in config else 2
    body = layers * (hidden * (2 * hidden + 2 * kv) + gates * hidden * inner)
    size = 4 if engine.dtype == "float32" else 2
    return float(size * (body + hidden * int(config["vocab_size"])))


def decode(engine: Engine, batch: int, context: int, rounds: int) -> float:
    """Seconds of one step of `batch` sequences with `context` tokens each."""
    each = engine.layout.blocks_for(context + 1)
    pool = Pool.private(engine.layout, batch * each, engine.device)
    tables = [list(range(i * each, (i + 1) * each)) for i in range(batch)]
    for blocks in tables:
        engine.runner.fill(pool, [Row([1] * context, 0, blocks)])
    rows = [Row([i], context, blocks, Logits.LAST) for i, blocks in enumerate(tables)]
    return timed(lambda: engine.runner.run(pool, rows).argmax(dim=-1), engine.device, rounds)


def prefill(engine: Engine, tokens: int, rounds: int) -> float:
    """Seconds of one prompt."""
    blocks = list(range(engine.layout.blocks_for(tokens)))
    pool = Pool.private(engine.layout, len(blocks), engine.device)
    row = Row([7] * tokens, 0, blocks)
    return timed(lambda: engine.runner.fill(pool, [row]), engine.device, rounds)


def transformers_decode(shape: str, device: torch.device, batch: int, new: int) -> float:
    """Seconds a step of transformers' generate, prefill taken out by a second, shorter run."""
    from baton.engine.loading import load_model

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(resolve_model(f"random:{shape}"), device, dtype)
    model.set_attn_implementation("sdpa")
    ids = torch.full((batch, 64), 7, device=device)

    def run(tokens: int) -> float:
        _wait(device)
        begun = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                       min_new_tokens=tokens, do_sample=False, pad_token_id=0)  # fmt: skip
        _wait(device)
        return time.perf_counter() - begun

    run(2)
    return (run(new) - run(2)) / (new - 2)


def whole(shape: str, device: str, new: int) -> dict[str, float]:
    """Seconds of `generate` through all processes, disaggregated and colocated, start included."""
    found = {}
    for name, colocated in (("P/D", False), ("colocated", True)):
        begun = time.perf_counter()
        generate(shape, "In the future", max_new_tokens=new, device=device, colocated=colocated)
        found[f"{name}, s"] = time.perf_counter() - begun
    return found


class Report:
    """Sections, and why some are missing."""

    def __init__(self) -> None:
        self.sections: dict[str, Any] = {}

    def section(self, name: str, run: Callable[[], Any]) -> Any:
        """Run it; a failure is its result."""
        begun = time.perf_counter()
        try:
            found = run()
        except REASONS as error:
            found = {"failure": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        self.sections[name] = {"found": found, "took_s": round(time.perf_counter() - begun, 1)}
        click.echo(f"{name}: {found}")
        return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--quick", is_flag=True, help="Small numbers: does it run at all?")
@click.option("--output", type=click.Path(path_type=Path), default=None)
def main(
    device: str, shapes: tuple[str, ...], rounds: int, quick: bool, output: Path | None
) -> None:
    """Engine and hand-over on a GPU."""
    place = torch.device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    batches, prefills, context = ((1, 2), (64,), 32) if quick else (BATCHES, PREFILLS, CONTEXT)
    rounds = 2 if quick else rounds
    report = Report()
    about = {"device": describe_device(place), "torch": torch.__version__}
    about["python"] = platform.python_version()
    click.echo(str(about))
    top = report.section("limits", lambda: limits(place, dtype, 512 if quick else 8192))
    lines = []
    for shape in ("demo",) if quick else shapes:
        name = shape if quick else f"random:{shape}"
        try:
            engine = boot(resolve_model(name), device=device, dtype="auto", block_size=BLOCK)
        except REASONS as error:
            report.sections[shape] = {"failure": str(error)}
            continue
        size = weights_of(engine)
        for batch in batches:
            cell = f"{shape} decode {batch}"
            found = report.section(cell, partial(decode, engine, batch, context, rounds))
            if isinstance(found, float):
                share = size / found / 1e9 / top["GB/s"] if "GB/s" in top else 0.0
                lines.append([cell, f"{1e3 * found:.2f}", f"{batch / found:,.0f}", f"{share:.0%}"])
        for tokens in prefills:
            cell = f"{shape} prefill {tokens}"
            found = report.section(cell, partial(prefill, engine, tokens, rounds))
            if isinstance(found, float):
                rate = size * tokens / found / 1e12 if dtype == torch.bfloat16 else 0.0
                share = rate / top["TFLOP/s"] if "TFLOP/s" in top else 0.0
                lines.append([cell, f"{1e3 * found:.2f}", f"{tokens / found:,.0f}", f"{share:.0%}"])
        del engine
        if not quick:
            for batch in batches[:3]:
                report.section(
                    f"{shape} transformers {batch}",
                    partial(transformers_decode, shape, place, batch, 50),
                )
    report.section("all processes", lambda: whole("demo", device, 8 if quick else 100))
    click.echo("\n" + table(["", "ms", "tokens/s", "of the limit"], lines))
    click.echo(f"free memory at the end: {free_memory(place) / 2**30:.1f} GiB")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"about": about, "sections": report.sections}, indent=1)
        (output / "gpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu")
