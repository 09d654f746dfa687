"""Every family: our pool and attention give transformers' own logits, however tokens are cut."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from baton.engine.attention import NAME, AttentionParams, paged_attention
from baton.engine.gather import GatherAttention
from baton.engine.pool import Pool
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from baton.engine.selftest import self_test
from baton.errors import ModelError
from baton.kv.layout import KVLayout
from baton.kv.row import Logits, Row
from tests.torch.families import FAMILIES, UNFIT, VOCABULARY, make_model

CPU = torch.device("cpu")
BLOCK = 4
LENGTHS = (29, 14, 37)


@dataclass(frozen=True)
class Case:
    model: PreTrainedModel
    runner: Runner
    layout: KVLayout
    texts: list[list[int]]
    expected: list[torch.Tensor]  # [tokens, vocabulary] of each text


@cache
def case(family: str) -> Case:
    model = make_model(family)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    numbers = random.Random(7)
    texts = [[numbers.randrange(VOCABULARY) for _ in range(length)] for length in LENGTHS]
    with torch.inference_mode():
        expected = [reference(torch.tensor([text]), use_cache=False).logits[0] for text in texts]
    layout = discover_layout(model, BLOCK, torch.float32)
    return Case(model, Runner(model), layout, texts, expected)


def dirty_pool(layout: KVLayout, blocks: int = 64) -> Pool:
    """What nobody wrote is not a number: reading it would show everywhere."""
    pool = Pool.private(layout, blocks, CPU)
    for slab in pool.slabs[:-1]:
        slab.view(torch.float32).fill_(float("nan"))
    return pool


def block_tables(layout: KVLayout, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Blocks of a fragmented pool: in no order, with gaps."""
    free = random.Random(3).sample(range(64), 64)
    return [[free.pop() for _ in range(layout.blocks_for(len(text)))] for text in texts]


def run_in_chunks(case: Case, chunks: Sequence[int], late: Sequence[int]) -> list[torch.Tensor]:
    """All logits of all texts: text i in chunks of `chunks[i]`, from forward `late[i]` on."""
    pool, tables = dirty_pool(case.layout), block_tables(case.layout, case.texts)
    done = [0] * len(case.texts)
    parts: list[list[torch.Tensor]] = [[] for _ in case.texts]
    forward = 0
    while any(at < len(text) for at, text in zip(done, case.texts, strict=True)):
        ready = [
            i for i, text in enumerate(case.texts) if late[i] <= forward and done[i] < len(text)
        ]
        rows = [
            Row(case.texts[i][done[i] : done[i] + chunks[i]], done[i], tables[i], Logits.ALL)
            for i in ready
        ]
        logits = case.runner.run(pool, rows).split([len(row.token_ids) for row in rows])
        for i, row, part in zip(ready, rows, logits, strict=True):
            parts[i].append(part.clone())  # good until the next run
            done[i] = row.end
        forward += 1
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("family", FAMILIES)
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
    found = run_in_chunks(case(family), chunks, late)
    for ours, theirs in zip(found, case(family).expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [1, 40, 10**6])
@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_how_decode_rows_are_grouped_makes_no_difference(
    family: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.engine.gather.CPU_KEYS", budget)
    found = run_in_chunks(case(family), (1, 1, 1), (0, 0, 0))
    for ours, theirs in zip(found, case(family).expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_filled_cache_continues_like_one_that_was_run(family: str) -> None:
    it = case(family)
    pool, tables = dirty_pool(it.layout), block_tables(it.layout, it.texts)
    prompts = [text[:-1] for text in it.texts]
    rows = zip(prompts, tables, strict=True)
    it.runner.fill(pool, [Row(prompt, 0, table) for prompt, table in rows])
    last = [
        Row(text[-1:], len(text) - 1, table, Logits.LAST)
        for text, table in zip(it.texts, tables, strict=True)
    ]
    theirs = torch.stack([expected[-1] for expected in it.expected])
    torch.testing.assert_close(it.runner.run(pool, last), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_test_accepts_it_in_half_precision(family: str, dtype: torch.dtype) -> None:
    model = make_model(family).to(dtype)
    self_test(Runner(model), model, discover_layout(model, 16, dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_test_accepts_it(family: str) -> None:
    it = case(family)
    self_test(it.runner, it.model, it.layout)
    assert it.model.config._attn_implementation == NAME


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("mistral", {"window": None}),
        ("gemma2", {"window": None}),
        ("gemma2", {"softcap": None}),
        ("gpt_oss", {"window": None}),
        ("gpt_oss", {"sinks": None}),
        ("gemma3_text", {"scaling": 1.0}),
    ],
)
def test_what_is_peculiar_about_a_family_shows(family: str, without: dict[str, Any]) -> None:
    """Else the tests above would pass without it."""

    class Plainer(GatherAttention):
        def __call__(
            self, query: torch.Tensor, pool: Pool, layer: int, params: AttentionParams
        ) -> torch.Tensor:
            return super().__call__(query, pool, layer, replace(params, **without))

    it = case(family)
    plainer = replace(it, runner=Runner(it.model, Plainer))
    found = torch.cat(run_in_chunks(plainer, (99, 99, 99), (0, 0, 0)))
    assert (found - torch.cat(it.expected)).abs().max() > 1e-2


@pytest.mark.parametrize("family", UNFIT)
def test_what_cannot_be_served_is_refused_by_name(family: str) -> None:
    model = make_model(family, attention="eager")  # some cannot even be built with ours
    model.set_attn_implementation(NAME)
    with pytest.raises(ModelError, match=rf"(?i){family}forcausallm"):
        self_test(Runner(model), model, discover_layout(model, BLOCK, torch.float32))


def test_logits_come_for_the_rows_that_ask_in_their_order() -> None:
    it = case("llama")
    a, b, c = block_tables(it.layout, it.texts)
    rows = [
        Row(it.texts[0], 0, a, Logits.LAST),
        Row(it.texts[1], 0, b),
        Row(it.texts[2][:5], 0, c, Logits.ALL),
    ]
    logits = it.runner.run(dirty_pool(it.layout), rows)
    theirs = torch.cat([it.expected[0][-1:], it.expected[2][:5]])
    torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "deepseek_v3"])
def test_after_layer_finds_the_layer_written_and_the_next_one_not(family: str) -> None:
    it = case(family)
    pool = dirty_pool(it.layout)
    seen: list[tuple[int, list[bool]]] = []

    def after_layer(layer: int) -> None:
        seen.append((layer, [bool(keys[5].isfinite().all()) for keys in pool.keys]))

    it.runner.fill(pool, [Row(it.texts[0][:BLOCK], 0, [5])], after_layer)
    assert seen == [(0, [True, False]), (1, [True, True])]


def test_a_forward_touches_no_block_but_its_own() -> None:
    it = case("qwen2")
    pool = dirty_pool(it.layout)
    it.runner.fill(pool, [Row(it.texts[0][:6], 0, [9, 4, 11])])  # block 11 is not reached yet
    written = pool.values[1].isfinite().all(-1).all(-1)  # [blocks, block_size]
    assert written.sum() == 6
    assert written[9].all()
    assert written[4, :2].all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_bias", torch.zeros(1)),
        ("block_indices", torch.zeros(1)),
        ("indices", torch.zeros(1)),
        ("is_causal", False),
        ("dropout", 0.1),
        ("something_new", 3),
    ],
)
def test_an_argument_we_do_not_honour_is_refused(name: str, value: object) -> None:
    token = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ModelError, match=name):
        paged_attention(torch.nn.Identity(), token, token, token, None, **{name: value})  # type: ignore[arg-type]


def test_a_mask_is_refused() -> None:
    token = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ModelError, match="attention_mask"):
        paged_attention(torch.nn.Identity(), token, token, token, torch.ones(1))


def test_a_window_that_lives_only_in_the_mask_is_refused() -> None:
    model = make_model("llama")  # its attention does not look at sliding_window
    model.config.sliding_window = 8
    with pytest.raises(ModelError, match="window"):
        discover_layout(model, BLOCK, torch.float32)


def test_chunked_attention_is_refused() -> None:
    model = make_model("llama")
    model.config.attention_chunk_size = 8
    with pytest.raises(ModelError, match="chunked"):
        discover_layout(model, BLOCK, torch.float32)


@pytest.mark.parametrize("block_size", [1, 2, 4, 16, 64])
def test_the_self_test_takes_any_block_size(block_size: int) -> None:
    it = case("llama")
    self_test(it.runner, it.model, replace(it.layout, block_size=block_size))


def test_the_self_test_notices_wrong_attention() -> None:
    model = make_model("gpt_oss")
    layout = discover_layout(model, BLOCK, torch.float32)
    runner = Runner(model)
    wrong = copy.deepcopy(runner)
    wrong.model.model.layers[1].self_attn.scaling *= 1.1
    with pytest.raises(ModelError, match="GptOssForCausalLM"):
        self_test(wrong, model, layout)
