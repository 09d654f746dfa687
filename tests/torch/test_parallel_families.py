"""Divided among two ranks a model says what it says whole: many families, each with what is peculiar
about it, and the checks at load that see to it."""

import copy
from pathlib import Path

import pytest
import torch

from baton.engine.pool import Pool
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from baton.engine.selftest import in_torch
from baton.errors import InputError, ModelError
from baton.kv.row import Logits, Row
from baton.model_files import resolve_model
from baton.parallel import plan
from baton.parallel.boot import Booted, boot_rank
from baton.parallel.plan import COLUMNS, plan_sharding
from baton.parallel.ranks import Ranks
from baton.parallel.shard import shard
from tests.torch.families import make_model, save_checkpoint
from tests.torch.ranks_here import CPU, together

BLOCK, LENGTH = 8, 10
PROMPT = [(17 * i + 3) % 311 + 1 for i in range(21)]
TABLE = [4, 1, 3, 0, 2]
DIVIDED = ("gpt2", "llama", "qwen2", "qwen3", "gemma2", "gpt_neox", "mixtral", "nemotron")


def said(runner: Runner, pool: Pool) -> tuple[list[int], torch.Tensor]:
    """A greedy continuation in a pool that held rubbish before, and the logits of each of its steps."""
    for each in (*pool.keys, *pool.values):
        each.fill_(float("nan"))
    runner.fill(pool, [Row(PROMPT[:13], 0, TABLE)])
    tokens, steps = list(PROMPT), []
    start = 13
    while len(tokens) < len(PROMPT) + LENGTH:
        logits = runner.run(pool, [Row(tokens[start:], start, TABLE, Logits.LAST)])
        steps.append(logits.clone())
        start = len(tokens)
        tokens.append(int(logits.argmax()))
    return tokens, torch.cat(steps)


@pytest.mark.parametrize("family", DIVIDED)
def test_two_ranks_say_what_one_says(family: str) -> None:
    model = make_model(family)
    layout = discover_layout(model, BLOCK, torch.float32)
    tokens, logits = said(Runner(model), Pool.private(layout, 5, CPU))
    parts = [copy.deepcopy(model), copy.deepcopy(model)]

    def rank(ranks: Ranks) -> tuple[list[int], torch.Tensor, int]:
        mine = parts[ranks.rank]
        shard(mine, plan_sharding(mine, 2, family), ranks)
        runner, part = in_torch(mine, torch.float32, BLOCK)
        held = sum(weight.numel() for weight in mine.parameters())
        found = said(runner, Pool.private(part, 5, CPU))
        assert part.block_bytes * 2 == layout.block_bytes
        return *found, held

    whole = sum(weight.numel() for weight in model.parameters())
    for ours, theirs, held in together(rank):
        assert ours == tokens
        torch.testing.assert_close(theirs, logits, atol=1e-4, rtol=0)
        assert held < 0.8 * whole


def booted(name: str, dtype: str = "float32") -> list[Booted]:
    files = resolve_model(name)
    return together(lambda ranks: boot_rank(files, ranks, dtype=dtype, block_size=16))


def test_a_plan_that_does_not_fit_the_code_is_found_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values side by side, cut as if they were one matrix."""
    name = str(save_checkpoint("gpt2", tmp_path / "model"))
    first, second = booted(name)
    assert first.layout == second.layout
    assert first.runner.backend == "in torch, 2 ranks"
    wrong = plan.OURS["gpt2"] | {"h.*.attn.c_attn": COLUMNS}
    monkeypatch.setitem(plan.OURS, "gpt2", wrong)
    with pytest.raises(ModelError, match=r"in a forward divided among 2 ranks our logits differ"):
        booted(name)


def test_quantised_weights_are_not_divided() -> None:
    with pytest.raises(
        InputError, match="--dtype int8 and --tensor-parallel-size do not go together"
    ):
        booted("demo", "int8")
