"""A KV cache in 8 bits: the error of a head, and the same bytes and tokens whoever computes."""

import ctypes
import math
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.attention import AttentionParams
from baton.engine.batch import pack
from baton.engine.cpu.build import NoCompiler
from baton.engine.cpu.kernel import NativeAttention, describe_batch, describe_layer, library
from baton.engine.device import pick_kv_dtype
from baton.engine.gather import GatherAttention
from baton.engine.narrow import MOST, head_dim, narrowed, widened
from baton.engine.pool import Pool
from baton.errors import InputError
from baton.kv.layout import INT8, KVLayout, LayerShape
from baton.kv.row import Row
from baton.local import LocalCluster, LocalOptions
from baton.params import GenerationParams
from baton.wire.messages import Emitted, Failed, Finished, Submit
from tests.patience import PATIENCE_S

CPU = torch.device("cpu")
NUMBERS = st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False, allow_subnormal=False)
HEADS = st.lists(NUMBERS, min_size=1, max_size=70)

try:
    library()
    NATIVE = ""
except NoCompiler as why:
    NATIVE = str(why)


@given(HEADS)
def test_a_number_is_off_by_half_a_scale_at_most(numbers: list[float]) -> None:
    head = torch.tensor(numbers)
    back = widened(narrowed(head), torch.float32)
    largest = float(head.abs().max())
    # Dividing and multiplying round too; below the least scale all of a head is 0.
    allowed = largest / MOST * (0.5 + 1e-4) + MOST * torch.finfo(torch.float32).tiny
    assert float((back - head).abs().max()) <= allowed


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(odd: float) -> None:
    back = widened(narrowed(torch.tensor([[1.0, odd, 3.0], [1.0, 2.0, 3.0]])), torch.float32)
    assert not back[0].isfinite().any()
    assert back[1].isfinite().all()


def test_a_token_takes_its_numbers_and_a_scale_for_each_head() -> None:
    layout = KVLayout((LayerShape(4, 64, 32),) * 2, 16, INT8)
    assert layout.block_bytes == 2 * 16 * 4 * (64 + 4 + 32 + 4)
    pool = Pool.private(layout, 3, CPU)
    assert list(pool.keys[0].shape) == [3, 16, 4, 68]
    assert (head_dim(pool.keys[0]), head_dim(pool.values[1])) == (64, 32)
    assert layout.fingerprint != replace(layout, dtype="float32").fingerprint


def test_a_gpu_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="needs a CPU, got cuda:1"):
        pick_kv_dtype(INT8, torch.bfloat16, torch.device("cuda:1"))
    with pytest.raises(InputError, match="got 'fp8'"):
        pick_kv_dtype("fp8", torch.bfloat16, CPU)


def written(
    keys: torch.Tensor, values: torch.Tensor, block_size: int, *, native: bool
) -> tuple[Pool, Row]:
    """A pool that holds one sequence: keys [tokens, kv_heads, dim] and values, in scattered blocks."""
    tokens, heads, dim = keys.shape
    shape = LayerShape(heads, dim, values.shape[2])
    blocks = -(-tokens // block_size)
    pool = Pool.private(KVLayout((shape,), block_size, INT8), blocks, CPU)
    for part in (*pool.keys, *pool.values):
        part.fill_(-1)  # as a float: not a number
    row = Row([0] * tokens, 0, list(reversed(range(blocks))))
    batch = pack([row], block_size, CPU)
    if native:
        struct = describe_batch(batch, block_size)
        layer = describe_layer(pool, 0, heads, AttentionParams(1.0), None)
        flat = keys.flatten(1).contiguous(), values.flatten(1).contiguous()
        library().baton_write_kv(
            *(layer_address(layer), layer_address(struct)),
            *(flat[0].data_ptr(), flat[0].shape[1], flat[1].data_ptr(), flat[1].shape[1], 2),
        )
    else:
        pool.write(0, batch.slots, keys, values)
    return pool, row


def layer_address(struct: object) -> int:

    return ctypes.addressof(struct)  # type: ignore[arg-type]


def case(seed: int, tokens: int, heads: int, dims: tuple[int, int]) -> list[torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(tokens, heads, dim, generator=numbers) for dim in dims)
    scale = torch.rand(tokens, heads, 1, generator=numbers) * 10
    return [keys * scale, values, torch.randn(tokens, 3 * heads, dims[0], generator=numbers)]


@pytest.mark.skipif(NATIVE != "", reason=NATIVE)
@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(1, 150),
    st.integers(1, 3),
    st.tuples(st.sampled_from([1, 16, 24, 64, 80]), st.sampled_from([12, 16, 33, 64])),
    st.integers(1, 20),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(1, 90)),
)
def test_native_code_writes_the_same_bytes_and_attends_to_them(
    seed: int,
    tokens: int,
    heads: int,
    dims: tuple[int, int],
    block_size: int,
    chunk: int,
    window: int | None,
) -> None:
    keys, values, query = case(seed, tokens, heads, dims)
    keys[0, 0] = 0.0
    pool, row = written(keys, values, block_size, native=True)
    plain, _ = written(keys, values, block_size, native=False)
    for ours, theirs in zip(pool.slabs[:-1], plain.slabs[:-1], strict=True):
        assert torch.equal(ours, theirs)
    params = AttentionParams(dims[0] ** -0.5, window)
    expected = GatherAttention(pack([row], block_size, CPU), block_size)(query, pool, 0, params)
    whole = NativeAttention(pack([row], block_size, CPU), block_size, 2)(query, pool, 0, params)
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=2e-5)
    parts = []
    for at in range(0, tokens, chunk):
        some = Row(row.token_ids[at : at + chunk], at, row.blocks)
        kernel = NativeAttention(pack([some], block_size, CPU), block_size, 3)
        parts.append(kernel(query[at : at + chunk], pool, 0, params))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.skipif(NATIVE != "", reason=NATIVE)
@pytest.mark.parametrize("odd", [math.nan, math.inf, 1e-42, 3e38])
def test_native_code_writes_the_same_odd_bytes(odd: float) -> None:
    keys, values, _ = case(1, 3, 2, (16, 16))
    keys[1, 1, 5], values[2, 0] = odd, 0.0
    values[2, 0, 3] = odd
    pool, plain = (written(keys, values, 4, native=native)[0] for native in (True, False))
    ours, theirs = pool.slabs[0].view(-1, 20), plain.slabs[0].view(-1, 20)
    assert torch.equal(ours[:, :16], theirs[:, :16])
    scales = [each[:, 16:].contiguous().view(torch.float32) for each in (ours, theirs)]
    torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True)


PROMPTS = ("In the future", "Once upon a time there was " * 30, "A peaceful village")


def answers(*, prefills: int, company: bool) -> list[str]:
    """Greedy answers of the bundled model over an int8 pool, together or one after another."""
    options = LocalOptions("demo", device="cpu", prefills=prefills, kv_cache_dtype=INT8)
    with closing(LocalCluster(replace(options, max_num_batched_tokens=48))) as cluster:
        assert cluster.info().kv_dtype == INT8
        found: dict[str, str] = {}
        for batch in [PROMPTS] if company else [[each] for each in PROMPTS]:
            for prompt in batch:
                cluster.submit(Submit(prompt[:20], prompt, GenerationParams(max_new_tokens=12)))
            running = len(batch)
            while running:
                for message in cluster.poll(PATIENCE_S):
                    assert not isinstance(message, Failed)
                    running -= isinstance(message, Finished)
                    if isinstance(message, Emitted):
                        found[message.request] = found.get(message.request, "") + message.text
    return [found[prompt[:20]] for prompt in PROMPTS]


@pytest.mark.skipif(NATIVE != "", reason=NATIVE)
def test_the_same_tokens_from_both_roles_alone_and_in_a_batch() -> None:
    expected = answers(prefills=1, company=True)
    assert answers(prefills=0, company=True) == expected
    assert answers(prefills=1, company=False) == expected
    assert all(expected)
