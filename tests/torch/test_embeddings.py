"""Hidden states and embeddings: those of transformers, however the model is computed and cut."""

import pytest
import torch

from baton.kv.row import Row
from prefill_worker.pooled import Pooled
from tests.torch.families import make_model
from tests.torch.test_engine_parity import Case, block_tables, case, dirty_pool
from tests.torch.test_native_program import native_case

ENDS = ("gpt2", "llama", "gemma2", "gpt_neox", "opt", "nanochat", "mixtral", "phi3")
"""They differ in what stands between the last layer and the logits."""


def hidden(it: Case, cut: int) -> list[torch.Tensor]:
    """Of all texts: the first `cut` tokens of each in one forward, the others in the next."""
    pool, tables = dirty_pool(it.layout), block_tables(it.layout, it.texts)
    parts: list[list[torch.Tensor]] = [[] for _ in it.texts]
    for first, last in ((0, cut), (cut, 1000)):
        here = [i for i, text in enumerate(it.texts) if len(text) > first]
        rows = [Row(it.texts[i][first:last], first, tables[i]) for i in here]
        found = it.runner.hidden(pool, rows).clone().split([len(row.token_ids) for row in rows])
        for i, each in zip(here, found, strict=True):
            parts[i].append(each)
    return [torch.cat(each) for each in parts]


@pytest.mark.parametrize("family", ENDS)
def test_hidden_states_are_those_of_transformers_after_the_final_norm(family: str) -> None:
    reference = make_model(family)
    reference.set_attn_implementation("eager")
    it, native = case(family), native_case(family)
    with torch.inference_mode():
        wanted = [
            reference.base_model(torch.tensor([text]), use_cache=False).last_hidden_state[0]
            for text in it.texts
        ]
    for plain, compiled, right in zip(hidden(it, 3), hidden(native, 3), wanted, strict=True):
        torch.testing.assert_close(plain, right, atol=1e-4, rtol=1e-3)
        # A factor before the lm_head is a part of its input; an embedding has length 1 in any case.
        alike = torch.nn.functional.cosine_similarity(compiled, right)
        assert alike.min() > 0.99999


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_is_pooled_of_any_chunks_and_has_length_1(pooling: str) -> None:
    states = torch.randn(11, 16, generator=torch.Generator().manual_seed(3))
    wanted = states.mean(0) if pooling == "mean" else states[-1]
    wanted = wanted / wanted.norm()
    for size in (1, 4, 11):
        pooled = Pooled(pooling)
        for part in states.split(size):
            pooled.keep(pooled.after(part))
        found = torch.frombuffer(bytearray(pooled.vector), dtype=torch.float32)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
