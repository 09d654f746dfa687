"""Operations of compiled row work, in the place of an activation: the logits are those of torch."""

import tempfile
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from baton.engine.cpu.capture import capture
from baton.engine.cpu.compile import compile_model
from baton.engine.cpu.forward import NativeRunner
from baton.engine.cpu.lower import lower
from baton.engine.cpu.program import Program
from baton.engine.errors import CompileError
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from tests.torch.families import make_model
from tests.torch.test_engine_parity import BLOCK, case, run_in_chunks
from tests.torch.test_native_program import library

Rows = torch.Tensor  # [1, T, 96]


def compared(x: Rows) -> Rows:
    """At equality, too."""
    zero = x.relu()
    at_least, at_most = torch.where(zero >= 0, x, 3.0), torch.where(zero <= 0, 0.5, x)
    return at_least + at_most + torch.where(zero > 0, x, -1.0) + torch.where(zero < 0, 5.0, x)


def branch_not_taken(x: Rows) -> Rows:
    """It is not a number, and nobody may see it."""
    return torch.where(x > 0, (x - 0.1).log1p() * x.sqrt(), torch.expm1(x))


def floored(x: Rows) -> Rows:
    """49 * (1 / 49) is less than 1 in float32, so a product with the reciprocal would show."""
    return x + 0.1 * torch.floor(torch.floor(x.abs() * 64) / 49) + torch.floor(x)


def deviations(x: Rows) -> Rows:
    deviation = torch.std(x, dim=-1, keepdim=True, unbiased=False)
    return x * deviation + torch.var(x, dim=-1, keepdim=True) + torch.std(x, dim=-1, keepdim=True)


def stacked(x: Rows) -> Rows:
    """Behind the last dimension, in front of it, and in front of the rows."""
    pairs = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    halves = torch.stack([x[..., :48], x[..., 48:] * 2], dim=-2).flatten(-2)
    return pairs + halves + torch.stack([x, x * 3], dim=1)[:, 1] + torch.stack([x, x * 2], dim=0)[0]


def small_matrices(x: Rows) -> Rows:
    """Each token multiplies two matrices of its own."""
    a, b = x.view(1, -1, 24, 4), x[..., :16].reshape(1, -1, 4, 4)
    return torch.matmul(a, b.transpose(2, 3)).flatten(-2)


def reduced_elsewhere(x: Rows) -> Rows:
    """Over a dimension that is not the last, and over one in front of the rows."""
    parts = x.view(1, -1, 4, 24)
    over = parts + parts.mean(2, keepdim=True) + parts.amax(dim=(2, 3), keepdim=True)
    return over.flatten(-2) + torch.stack([x, x.square(), x.tanh()]).sum(0)


def in_place(x: Rows) -> Rows:
    y = x * 2
    y += x
    y *= x.sigmoid()
    swapped = y.new_empty(y.shape)
    swapped[..., :48].copy_(y[..., 48:])
    swapped[..., 48:].copy_(y[..., :1] - 3)  # the same number in all of them
    return swapped + x.repeat(2, 1, 1, 1)[1]


@pytest.mark.parametrize(
    "operation",
    [
        compared,
        branch_not_taken,
        floored,
        deviations,
        stacked,
        small_matrices,
        reduced_elsewhere,
        in_place,
    ],
    ids=lambda f: f.__name__,
)
def test_it_is_what_torch_computes(operation: Callable[[Rows], Rows]) -> None:
    class Activation(torch.nn.Module):
        def forward(self, x: Rows) -> Rows:
            return operation(x)

    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = Activation()
    layout = discover_layout(model, BLOCK, torch.float32)
    with tempfile.TemporaryFile() as file:
        compile_model(file, library(), model, layout, torch.float32)
        runner = NativeRunner(Program(library(), file))
    plain = replace(case("llama"), model=model, runner=Runner(model))
    chunks, late = (7, 99, 1), (0, 0, 3)
    expected = run_in_chunks(plain, chunks, late)
    for ours, theirs in zip(
        run_in_chunks(replace(plain, runner=runner), chunks, late), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_what_is_written_under_one_name_and_read_under_another_is_not_compiled() -> None:
    class Activation(torch.nn.Module):
        def forward(self, x: Rows) -> Rows:
            y = x * 2
            y[..., :48] += 1
            return y

    model = make_model("llama")
    model.model.layers[0].mlp.act_fn = Activation()
    with pytest.raises(CompileError, match="it reads a tensor again after"):
        lower(capture(model))
