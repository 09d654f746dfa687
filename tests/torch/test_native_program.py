"""Compiled models: the same logits as transformers, the same bits in any company."""

import ctypes
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from baton.engine.boot import boot
from baton.engine.cpu.build import NoCompiler, build, program_sources
from baton.engine.cpu.capture import TOKENS, capture
from baton.engine.cpu.compile import compile_model
from baton.engine.cpu.forward import NativeRunner
from baton.engine.cpu.layout import pack_spans
from baton.engine.cpu.lower import lower
from baton.engine.cpu.program import Program, declare
from baton.engine.cpu.structures import TYPES
from baton.engine.cpu.values import Base, Space, dense, loops, reshaped
from baton.engine.errors import CompileError
from baton.engine.pool import Pool
from baton.engine.probe import discover_layout
from baton.engine.selftest import self_test
from baton.kv.row import Logits, Row
from baton.model_files import resolve_model
from tests.torch.families import FAMILIES, VOCABULARY, make_model
from tests.torch.test_engine_parity import (
    BLOCK,
    Case,
    block_tables,
    case,
    dirty_pool,
    run_in_chunks,
)

NATIVE = list(FAMILIES)
WEIGHTS = [torch.float32, torch.bfloat16, torch.int8, torch.qint8]


@cache
def library() -> ctypes.CDLL:
    try:
        return declare(build(program_sources(TYPES, TYPES[:2]), "program"))
    except NoCompiler as error:
        pytest.skip(f"no native code here: {error}")


@cache
def native_case(family: str, weights: torch.dtype = torch.float32) -> Case:
    it = case(family)
    cache_dtype = torch.float32 if weights == torch.float32 else torch.bfloat16
    layout = discover_layout(it.model, BLOCK, cache_dtype)
    with tempfile.TemporaryFile() as file:
        compile_model(file, library(), it.model, layout, weights)
        runner = NativeRunner(Program(library(), file))
    return replace(it, runner=runner, layout=layout)


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize(
    ("chunks", "late"),
    [
        ((1, 1, 1), (0, 0, 0)),
        ((7, 7, 7), (0, 0, 0)),
        ((99, 99, 99), (0, 0, 0)),
        ((1, 99, 7), (0, 5, 3)),
    ],
    ids=["one token at a time", "chunks of 7", "whole", "prefill joins decode"],
)
def test_logits_are_those_of_the_plain_model(
    family: str, chunks: Sequence[int], late: Sequence[int]
) -> None:
    found = run_in_chunks(native_case(family), chunks, late)
    for ours, theirs in zip(found, case(family).expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


COMPANY = (((1, 1, 1), (0, 0, 0)), ((5, 7, 3), (2, 0, 1)), ((1, 99, 7), (0, 5, 3)))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "gpt_oss"])
def test_the_bits_do_not_depend_on_the_company(family: str, weights: torch.dtype) -> None:
    """Whole, in chunks, one by one, late, on any number of threads: every logit, bit for bit. Each way
    with one number of threads, which turns round from case to case."""
    it = native_case(family, weights)
    whole = run_in_chunks(it, (99, 99, 99), (0, 0, 0))
    turn = NATIVE.index(family) + WEIGHTS.index(weights)
    before = torch.get_num_threads()
    try:
        for i, (chunks, late) in enumerate(COMPANY):
            torch.set_num_threads(1 + (i + turn) % 3)
            for ours, alone in zip(run_in_chunks(it, chunks, late), whole, strict=True):
                assert torch.equal(ours, alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("family", NATIVE)
def test_behind_the_last_attention_only_rows_that_need_logits_are_computed(family: str) -> None:
    levels = lower(capture(case(family).model)).levels
    last = max(i for i, level in enumerate(levels) if level.attends)
    assert not any(level.rows[Space.TOKENS] for level in levels[last + 1 :])
    products = [product for level in levels[last + 1 :] for product in level.products]
    assert products
    assert all(product.to.space is Space.LOGIT_ROWS for product in products)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2"])
def test_one_row_of_logits_has_the_bits_it_has_among_all(family: str, weights: torch.dtype) -> None:
    it = native_case(family, weights)
    ids = [(7 * i + 3) % VOCABULARY for i in range(21)]
    pool = Pool.private(it.layout, it.layout.blocks_for(len(ids)), it.runner.device)
    blocks = list(range(it.layout.blocks_for(len(ids))))
    all_ = it.runner.run(pool, [Row(ids, 0, blocks, Logits.ALL)]).clone()
    one = it.runner.run(pool, [Row(ids, 0, blocks, Logits.LAST)])
    assert torch.equal(one[0], all_[-1])


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        (family, weights)
        for i, family in enumerate(NATIVE)
        for weights in (WEIGHTS[0], WEIGHTS[1 + i % 3])
    ],
    ids=str,
)
def test_the_self_test_accepts_it(family: str, weights: torch.dtype) -> None:
    """In full width, and in one of the others."""
    it = native_case(family, weights)
    self_test(it.runner, it.model, it.layout, weights=weights)


@pytest.mark.parametrize("family", NATIVE)
def test_a_filled_cache_continues_like_one_that_was_run(family: str) -> None:
    it = native_case(family)
    pool, tables = dirty_pool(it.layout), block_tables(it.layout, it.texts)
    rows = [Row(text[:-1], 0, table) for text, table in zip(it.texts, tables, strict=True)]
    it.runner.fill(pool, rows)
    last = [
        Row(text[-1:], len(text) - 1, table, Logits.LAST)
        for text, table in zip(it.texts, tables, strict=True)
    ]
    theirs = torch.stack([expected[-1] for expected in it.expected])
    torch.testing.assert_close(it.runner.run(pool, last), theirs, atol=1e-4, rtol=0)


def test_after_layer_finds_the_layer_written_and_the_next_one_not() -> None:
    it = native_case("gpt2")
    pool = dirty_pool(it.layout)
    seen: list[tuple[int, list[bool]]] = []

    def after_layer(layer: int) -> None:
        seen.append((layer, [bool(keys[5].isfinite().all()) for keys in pool.keys]))

    it.runner.fill(pool, [Row(it.texts[0][:BLOCK], 0, [5])], after_layer)
    assert seen == [(0, [True, False]), (1, [True, True])]


def test_a_forward_touches_no_block_but_its_own() -> None:
    it = native_case("qwen2")
    pool = dirty_pool(it.layout)
    it.runner.fill(pool, [Row(it.texts[0][:6], 0, [9, 4, 11])])
    written = pool.values[1].isfinite().all(-1).all(-1)
    assert written.sum() == 6
    assert written[9].all()
    assert written[4, :2].all()


def test_one_broken_sequence_does_not_spoil_its_neighbours() -> None:
    """A pool that holds NaN under one row: that row's logits only are not finite."""
    it = native_case("llama")
    pool = dirty_pool(it.layout)
    a, b, _ = block_tables(it.layout, it.texts)
    rows = [Row([3], 4, a, Logits.LAST), Row(it.texts[1][:5], 0, b, Logits.LAST)]
    logits = it.runner.run(pool, rows)
    assert not logits[0].isfinite().any()
    torch.testing.assert_close(logits[1], it.expected[1][4], atol=1e-4, rtol=0)


def test_experts_of_their_own_kind_are_not_compiled_and_it_says_so() -> None:
    model = make_model("mixtral")
    for module in model.modules():
        if hasattr(module, "is_transposed"):  # what transformers' interface gives its experts
            del module.is_transposed
            module.forward = lambda rows, places, scores: rows * scores.nonzero().shape[0]
    layout = discover_layout(model, BLOCK, torch.float32)
    with tempfile.TemporaryFile() as file, pytest.raises(CompileError, match="of its own kind"):
        compile_model(file, library(), model, layout, torch.float32)


def test_float16_runs_in_torch_and_says_why() -> None:
    boot_ = boot(resolve_model("demo"), device="cpu", dtype="float16", block_size=BLOCK)
    assert boot_.runner.backend == "in torch, not compiled: float16 has no native matrix product"
    pool = Pool.private(boot_.layout, 2, boot_.device)
    assert boot_.runner.run(pool, [Row([5, 6, 7], 0, [0], Logits.LAST)]).isfinite().all()


def test_a_wrong_program_is_not_used() -> None:
    """The self-test of compiling runs the model itself: here another one."""
    model = make_model("llama")
    layout = discover_layout(model, BLOCK, torch.float32)
    forward = type(model).forward
    calls = []

    def changed(self: torch.nn.Module, *args: object, **given: object) -> object:
        output = forward(self, *args, **given)
        calls.append(1)
        if len(calls) == 1:  # the traced one
            output.logits = output.logits * 1.5
        return output

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as file:
        patch.setattr(type(model), "forward", changed)
        with pytest.raises(CompileError, match="self-test"):
            compile_model(file, library(), model, layout, torch.float32)


def test_no_size_of_a_model_is_taken_for_its_tokens() -> None:
    assert all(TOKENS not in p.shape for f in NATIVE for p in case(f).model.parameters())
    assert VOCABULARY != TOKENS


# ---- the small arithmetic underneath


def test_values_that_live_at_once_never_share_space() -> None:
    numbers = random.Random(5)
    for _ in range(50):
        spans = []
        for _ in range(30):
            first = numbers.randrange(20)
            base = Base(Space.TOKENS, numbers.randrange(1, 100), first)
            spans.append((base, first, first + numbers.randrange(6)))
        places, total = pack_spans(spans)
        for i, (a, first, last) in enumerate(spans):
            assert places[a] % 16 == 0
            assert places[a] + a.width <= total
            for b, other_first, other_last in spans[:i]:
                if first <= other_last and other_first <= last:
                    apart = places[a] + a.width <= places[b] or places[b] + b.width <= places[a]
                    assert apart


@pytest.mark.parametrize("seed", range(40))
def test_a_reshape_is_what_torch_does(seed: int) -> None:
    from baton.engine.cpu.values import Value

    numbers = random.Random(seed)
    tensor = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    order = numbers.sample(range(4), 4)
    view = tensor.permute(order)
    base = Base(Space.TOKENS, 120, 0)
    value = Value(base, 0, tuple(view.shape), tuple(view.stride()), 0)
    for shape in ((120,), (6, 20), (2, 60), (24, 5), (2, 3, 20), (1, 6, 4, 5, 1), (5, 4, 3, 2)):
        seen = reshaped(value, (), shape, 0)
        if seen is not None:
            ours = torch.as_strided(tensor, shape, seen.strides)
            assert torch.equal(ours, view.reshape(shape))
        else:
            with pytest.raises(RuntimeError):
                view.view(shape)


def test_loops_walk_every_element_once() -> None:
    shape = (2, 3, 4, 5)
    strides = dense(shape), (0, 20, 5, 1), (60, 0, 1, 4)
    rounds, (outer, inner), steps = loops(shape, *strides)
    found = [
        tuple(extra[k] + o * steps[k][0] + i * steps[k][1] for k in range(3))
        for extra in rounds
        for o in range(outer)
        for i in range(inner)
    ]
    wanted = [
        tuple(a * s[0] + b * s[1] + c * s[2] + d * s[3] for s in strides)
        for a in range(2)
        for b in range(3)
        for c in range(4)
        for d in range(5)
    ]
    assert sorted(found) == sorted(wanted)


def test_pools_of_bf16_hold_bf16() -> None:
    it = native_case("gpt2", torch.bfloat16)
    pool = Pool.private(it.layout, 8, torch.device("cpu"))
    it.runner.fill(pool, [Row(it.texts[0][:6], 0, [1, 2])])
    assert pool.keys[0].dtype == torch.bfloat16
    assert pool.keys[0][1].float().abs().sum() > 0
