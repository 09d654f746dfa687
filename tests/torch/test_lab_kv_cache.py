"""The experiment of the KV cache, and what a model is counted to weigh: against the real things."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baton.errors import InputError
from baton.model_files import resolve_model
from tools.lab.kv_cache import engine_for, run_experiment
from tools.lab.study import QUICK_TOKENS, Setting
from tools.measure.shape import shape_of

QUICK = Setting(output=Path("unused"), model="demo", quick=True)


def test_with_and_without_the_cache_the_same_tokens_come() -> None:
    with_, without = (run_experiment(40, use, setting=QUICK) for use in (True, False))
    assert with_["tokens"] == without["tokens"]
    assert len(with_["per_token_s"]) == len(without["per_token_s"]) == QUICK_TOKENS
    assert with_["prefill_s"] > 0
    assert without["prefill_s"] == 0
    for each in (with_, without):
        assert each["total_s"] == pytest.approx(each["prefill_s"] + sum(each["per_token_s"]))
        assert each["mean_token_s"] == pytest.approx(sum(each["per_token_s"]) / QUICK_TOKENS)


def test_kv_bytes_are_those_of_the_blocks_that_hold_tokens() -> None:
    block = engine_for("demo", "auto").layout.block_bytes
    tokens = 43 + QUICK_TOKENS - 1  # the last new token is never run
    assert tokens == 48
    found = run_experiment(43, True, setting=QUICK)
    assert (found["kv_bytes"], found["scratch_bytes"]) == (3 * block, 0)
    found = run_experiment(44, False, setting=QUICK)
    assert (found["kv_bytes"], found["scratch_bytes"]) == (0, 4 * block)


def test_a_prompt_of_one_token_needs_no_prefill() -> None:
    found = run_experiment(1, True, setting=QUICK)
    assert found["prefill_s"] == 0
    assert found["tokens"] == run_experiment(1, False, setting=QUICK)["tokens"]


@pytest.mark.parametrize("length", [0, 2304])
def test_a_prompt_that_cannot_be_is_refused(length: int) -> None:
    with pytest.raises(InputError):
        run_experiment(length, True, setting=QUICK)


@pytest.mark.parametrize("name", ["demo", "random:gpt2", "random:qwen2-0.5b", "random:qwen2-7b"])
def test_weights_are_counted_to_one_in_a_hundred(name: str) -> None:
    config = resolve_model(name).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    shape = shape_of(config)
    assert shape is not None
    assert shape.weights == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)
