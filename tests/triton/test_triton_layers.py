"""The Triton kernels for every kind of layer that families have, in each dtype (`make test-triton`)."""

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

from baton.engine.attention import AttentionParams
from baton.engine.cuda.graphs import GraphRunner
from baton.engine.cuda.select import fastest
from baton.kv.layout import LayerShape
from baton.package import ROOT
from tests.torch.families import FAMILIES
from tests.triton.conftest import WITHOUT

kit: Any = pytest.importorskip("tests.triton.kit", reason=WITHOUT, exc_type=ModuleNotFoundError)
attention: Any = pytest.importorskip("baton.engine.cuda.triton_attention", reason=WITHOUT)
checks: Any = pytest.importorskip("baton.engine.cuda.triton_check", reason=WITHOUT)

# (heads, KV heads, key and value dimensions) of models, their heads fewer
SHAPES = {
    "gpt2": (2, 2, 64, 64),
    "qwen2, 7 to a group": (14, 2, 64, 64),
    "falcon, 71 to a group": (71, 1, 64, 64),
    "pythia": (2, 2, 80, 80),
    "phi3": (2, 1, 96, 96),
    "granite": (4, 1, 112, 112),
    "deepseek_v3": (2, 2, 192, 128),
    "gemma2": (4, 2, 256, 256),
    "gemma4": (4, 1, 512, 512),
    "odd": (3, 1, 20, 6),
}
PECULIARITIES = {
    "plain": {},
    "window": dict(window=9),
    "window of one": dict(window=1),
    "softcap": dict(softcap=5.0),
    "sinks": dict(sinks=True),
    "all": dict(window=9, softcap=5.0, sinks=True),
}
ALLOWED = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}


def layer_of(name: str, **peculiar: Any) -> Any:
    heads, kv_heads, key_dim, value_dim = SHAPES[name]
    if peculiar.pop("sinks", False):
        peculiar["sinks"] = torch.randn(heads, generator=torch.Generator().manual_seed(2))
    params = AttentionParams(key_dim**-0.5, **peculiar)
    return checks.Layer(heads, LayerShape(kv_heads, key_dim, value_dim), params)


def mixed() -> Any:
    """The case with rows of all kinds."""
    return next(each for each in checks.cases(kit.PAGE, kit.TINY) if each.name == "a mixed batch")


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_in_every_dtype(name: str, dtype: str, device: torch.device) -> None:
    assert kit.setting(device, dtype).error_of(mixed(), layer_of(name)) < ALLOWED[dtype]


@pytest.mark.parametrize("name", PECULIARITIES)
def test_every_peculiarity_in_every_launch(name: str, device: torch.device) -> None:
    layer = layer_of("qwen2, 7 to a group", **PECULIARITIES[name])
    for case in checks.cases(kit.PAGE, kit.TINY):
        assert kit.setting(device).error_of(case, layer) < 2e-6, case.name


def test_the_tuning_that_serves(device: torch.device) -> None:
    usual = checks.Setting(16, "float32", device)
    for case in checks.cases(16, usual.tuning):
        assert usual.error_of(case, layer_of("phi3", window=300)) < 4e-6, case.name


def test_a_block_of_one_token(device: torch.device) -> None:
    for case in checks.cases(1, kit.TINY):
        one = checks.Setting(1, "float32", device, kit.TINY)
        assert one.error_of(case, kit.PLAIN) < 2e-6, case.name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_over_them(family: str, device: torch.device) -> None:
    from tests.torch.test_graphs import LENGTHS, STEPS, Play

    slow, layout = kit.plain_on(family, device)
    make = partial(kit.recorder, device)
    way = ("Triton", lambda: checks.with_triton(slow, layout, make, kit.TINY))
    fast = fastest(slow, layout, [way])
    assert isinstance(fast, GraphRunner), fast.backend
    one, two = Play(slow, layout, LENGTHS), Play(fast, layout, LENGTHS)
    torch.testing.assert_close(two.step(STEPS[0]), one.step(STEPS[0]), atol=2e-4, rtol=0)
    rows, theirs = two.rows((0, 1)), one.rows((0, 1))
    torch.testing.assert_close(
        fast.plain.run(two.pool, rows), slow.run(one.pool, theirs), atol=2e-4, rtol=0
    )


def run(module: str, *options: str) -> str:
    """The output of a script of this folder."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.triton.{module}", *options],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, env=environment(),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def environment() -> dict[str, str]:
    """Without the interpreter, in which nothing is compiled."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.timeout(1300)
def test_every_mutation_is_seen_by_the_check() -> None:
    assert "NOT SEEN" not in run("mutations")


@pytest.mark.timeout(1300)
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_they_compile_for_cards_that_are_not_here(arch: int) -> None:
    """No register is spilled, shared memory suffices, and products use the matrix units."""
    shapes = ["qwen2-0.5b", "gpt-oss", "deepseek"]
    lines = run("compiled", "--arch", str(arch), *(f"--shape={each}" for each in shapes))
    assert len(lines.splitlines()) == 6 * len(shapes)
    for line in lines.splitlines():
        assert "   0 B spilled" in line
        assert "MMA" in line or "reduce" in line
        shared = int(line.partition(" B shared")[0].split()[-1])
        assert shared <= int(line.split(" of ")[1].split()[0]) << 10, line
    assert "HGMMA" in lines or arch < 90


def test_the_benchmarks_section_runs_through(device: torch.device) -> None:
    from tools.benchmarks.gpu import quick
    from tools.benchmarks.gpu_triton import Shape
    from tools.benchmarks.gpu_triton import attention as section

    found = dict(section(quick(device), {"tiny": Shape(4, LayerShape(2, 16, 16))}))
    assert len(found) == 2 * 2 + 2 + 2 * 7
    for name, cell in found.items():
        assert cell.get("ms", 0) > 0, (name, cell)
