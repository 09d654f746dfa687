"""How long a worker says that it may be silent: longer than any of its forwards, and not much longer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.launch import PATIENCE_FLOOR_S, WorkerOptions, introduce
from baton.kv.layout import KVLayout, LayerShape
from baton.pace import CONTEXT, Pace, Prompt, Span, share_out


def patience_s(token_s: float, *, token_budget: int = 2048) -> float:
    options = WorkerOptions(
        router="ipc:///r", model="demo", device="cpu", dtype="float32", name="p.1", threads=1,
        block_size=16, max_model_len=None, max_num_batched_tokens=token_budget, drain_timeout=30.0,
        keys=None, parent=None,
    )  # fmt: skip
    layout = KVLayout((LayerShape(2, 16, 16),) * 2, 16, "float32")
    return introduce(
        options, "prefill", fingerprint="f", device="cpu", dtype="float32", layout=layout,
        token_s=token_s, how="x",
    ).patience_s  # fmt: skip


@pytest.mark.parametrize("token_budget", [256, 2048, 65_536])
def test_a_wedged_worker_is_noticed_soon_whatever_the_most_tokens_of_a_forward(
    token_budget: int,
) -> None:
    assert patience_s(0.001, token_budget=token_budget) < PATIENCE_FLOOR_S + 1.5


PROMPTS = st.builds(Prompt, st.integers(0, 3 * CONTEXT), st.integers(1, 9000), st.none())


@given(
    st.floats(1e-6, 0.1), st.lists(PROMPTS, min_size=1, max_size=5), st.integers(1, 8192)
)  # fmt: skip
def test_no_forward_is_longer_than_the_patience(
    token_s: float, prompts: list[Prompt], token_budget: int
) -> None:
    pace = Pace(forward_s=token_s, token_s=token_s)
    given = share_out(prompts, pace, token_budget=token_budget)
    chunks = [Span(prompt.start, tokens) for prompt, tokens in zip(prompts, given, strict=True)]
    took_s = pace.forward_s + sum(map(pace.chunk_s, chunks))
    assert took_s <= patience_s(token_s, token_budget=token_budget)
