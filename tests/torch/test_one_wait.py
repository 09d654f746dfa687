"""A step waits for the device once: one copy up, one copy down, and no look in between.

On a GPU that is not there (fake_gpu.py) for every kind of sampling; and the way that does not look gives
the tokens of the way that does."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sampler.copies
import sampler.filters
import sampler.sample
import sampler.shape
from baton.engine.batch import pack
from baton.engine.cuda.graphs import Again, GraphRunner, StaticAttention
from baton.engine.gather import GatherAttention
from baton.engine.pool import Pool
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from baton.kv.row import Logits, Row
from sampler import step as sampler_step
from sampler.copies import down, up
from sampler.params import SamplingParams
from sampler.sample import SamplingBatch
from sampler.step import step
from tests.torch.fake_gpu import GPU, fake_gpu
from tests.torch.families import make_model

VOCAB = 3000
GREEDY = SamplingParams(temperature=0.0)
KINDS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"temperature": 0.0}],
    "temperature": [{"temperature": 0.7}],
    "seeds": [{"seed": 1}, {"seed": 2, "choice": 3}],
    "top_k": [{"top_k": 40}],
    "a large top_k": [{"top_k": 900}],
    "top_p": [{"top_p": 0.9}],
    "min_p": [{"min_p": 0.1}],
    "all filters": [{"top_k": 40, "top_p": 0.9, "min_p": 0.02}, {"top_k": 900, "top_p": 0.9}],
    "penalties": [{"repetition_penalty": 1.2}, {"presence_penalty": 0.5, "frequency_penalty": 0.1}],
    "biases": [{"logit_bias": ((5, 1.0), (VOCAB + 7, 2.0))}, {"allowed_token_ids": (3, VOCAB + 9)}],
}
KINDS["mixed rows"] = [each for kinds in list(KINDS.values()) for each in kinds]


def batch_of(params: Sequence[SamplingParams], vocab: int) -> SamplingBatch:
    """With ids beyond the vocabulary wherever ids are given; every third row has a mask."""
    rows = len(params)
    seen = [[row, 2 * row, 2 * row, vocab + row] for row in range(rows)]
    return SamplingBatch.build(
        params, list(range(rows)), seen, "cpu",
        generated=[each[1:] for each in seen],
        forbidden=[(vocab + 1, 7) if row % 4 == 1 else () for row in range(rows)],
        masks=[b"\xfe\xff" * 300 if row % 3 == 2 else None for row in range(rows)],
        vocab=vocab,
    )  # fmt: skip


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_takes_one_copy_up_and_one_down(
    kind: str, logprobs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [SamplingParams(**each) for each in KINDS[kind] * 2]
    rows = len(params)
    counts = [3 if logprobs and row % 2 else -1 for row in range(rows)]
    known = [5 if logprobs and row == 1 else None for row in range(rows)]
    plain = batch_of(params, VOCAB)

    with fake_gpu() as copies:
        logits = torch.empty(rows, VOCAB, device=GPU)

        def read(tensors: Sequence[torch.Tensor]) -> list[Any]:
            return [Told(each) for each in down(tensors)]

        monkeypatch.setattr(sampler_step, "down", read)
        found = step(logits, plain, counts, known)
    assert len(found) == rows
    assert (len(copies.up), len(copies.down)) == (1, 1), copies


class Told:
    """A tensor that has come down, with numbers for those that it does not have: every row is sure."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.device.type == "cpu"
        self._shape, self._dtype = tuple(tensor.shape), tensor.dtype

    def tolist(self) -> Any:
        one: Any = {torch.bool: True, torch.int64: 1}.get(self._dtype, -1.0)
        for size in reversed(self._shape):
            one = [one] * size if not isinstance(one, list) else [list(one) for _ in range(size)]
        if isinstance(one, list) and one and isinstance(one[0], list):
            for line in one:  # of several candidates no two are equal
                line[:] = [each - place for place, each in enumerate(line)]
        return one


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
def test_a_recorded_step_of_the_model_takes_one_copy_up_and_none_down(family: str) -> None:
    real = make_model(family)
    layout = discover_layout(real, 4, torch.float32)
    rows = [Row([7], 5 + row, [2 * row, 2 * row + 1], Logits.LAST) for row in range(3)]
    there: Any = make_model(family).to(GPU)
    runner = GraphRunner(Runner(there), StaticAttention(), Again)
    pool = Pool.private(layout, 8, GPU, spare=True)
    runner.run(pool, rows)  # recorded
    with fake_gpu() as copies:
        assert runner.run(pool, rows).shape == (3, real.config.vocab_size)
    assert (len(copies.up), len(copies.down)) == (1, 0), copies
    assert runner.replayed == 2


def test_a_ragged_forward_takes_one_copy_up_and_one_for_each_group() -> None:
    rows = [Row([7], 9, [0, 1, 2], Logits.LAST), Row([5, 6, 7], 4, [3, 4], Logits.LAST)]
    with fake_gpu() as copies:
        batch = pack(rows, 4, GPU)
        kernel = GatherAttention(batch, 4)
        groups = kernel.plan(batch, 4, None)
    assert len(copies.up) == 1 + len(groups)
    assert not copies.down


# ---- the way that does not look


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing is free to read, as on a GPU; the numbers stay here."""
    for module in (sampler.sample, sampler.filters, sampler.shape):
        monkeypatch.setattr(module, "free_to_read", lambda tensor: False)


some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.6, 1.0, 1.5]),
    top_k=st.sampled_from([0, 0, 3, 40, 600]),
    top_p=st.sampled_from([0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.4]),
    allowed_token_ids=st.sampled_from([None, None, (1, 2, 3, 9, 700)]),
    seed=st.integers(0, 99),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(some_params, min_size=1, max_size=9),
    st.sampled_from([70, 500, 2000]),
    st.sampled_from([0.1, 4.0]),
    st.integers(0, 10**6),
)
def test_what_a_device_draws_unseen_is_what_the_host_draws(
    params: list[SamplingParams], vocab: int, deviation: float, seed: int
) -> None:
    """With flat rows, too, in which the narrow way is not sure."""
    noise = torch.Generator().manual_seed(seed)
    logits = deviation * torch.randn(len(params), vocab, generator=noise)
    counts = [row % 4 - 1 for row in range(len(params))]
    known = [3 if row % 5 == 4 else None for row in range(len(params))]
    expected = step(logits, batch_of(params, vocab), counts, known)
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_device(patch)
        assert step(logits, batch_of(params, vocab), counts, known) == expected
    alone = [
        step(logits[row : row + 1], only(params, row, vocab), counts[row : row + 1],
             known[row : row + 1])[0]
        for row in range(len(params))
    ]  # fmt: skip
    assert [each and each.token_id for each in alone] == [
        each and each.token_id for each in expected
    ]


def only(params: Sequence[SamplingParams], row: int, vocab: int) -> SamplingBatch:
    """The batch of one row of batch_of()."""
    seen = [row, 2 * row, 2 * row, vocab + row]
    return SamplingBatch.build(
        [params[row]], [row], [seen], "cpu", generated=[seen[1:]],
        forbidden=[(vocab + 1, 7) if row % 4 == 1 else ()],
        masks=[b"\xfe\xff" * 300 if row % 3 == 2 else None], vocab=vocab,
    )  # fmt: skip


def test_things_go_up_together_and_come_down_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the packing, which a copy from the CPU to the CPU does not need."""
    things = (
        torch.tensor([True, False, True]), None, 7,
        {"a": torch.tensor([1, -2], dtype=torch.int32), "b": torch.tensor([[0.5, 2.5]]).double()},
        batch_of([GREEDY, SamplingParams(top_p=0.5)], 50),
    )  # fmt: skip
    meta = up(things, "meta")
    assert meta[0].shape == (3,)
    assert meta[3]["b"].shape == (1, 2)
    assert meta[4].values["top_p"].dtype == torch.float64
    shares = {each.untyped_storage()._cdata for each in (meta[0], meta[3]["a"], meta[4].seed)}
    assert len(shares) == 1
    sent: list[torch.Tensor] = []

    def stay(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor)
        return tensor

    monkeypatch.setattr(sampler.copies, "pinned", stay)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self.clone())
    there = up(things, "meta")
    assert len(sent) == 1
    monkeypatch.undo()
    assert torch.equal(there[0], things[0])
    assert torch.equal(there[3]["a"], things[3]["a"])
    assert torch.equal(there[3]["b"], things[3]["b"])
    assert torch.equal(there[4].values["top_p"], things[4].values["top_p"])
    monkeypatch.setattr(sampler.copies, "free_to_read", lambda tensor: False)
    back = down([there[0], there[3]["b"], there[3]["a"]])
    expected = [things[0], things[3]["b"], things[3]["a"]]
    assert all(torch.equal(a, b) for a, b in zip(back, expected, strict=True))
