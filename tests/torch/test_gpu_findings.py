"""What a reading of the GPU's path found, each as far as it shows without a card: what torch's functions
are asked for, in which order, and what is left behind when one of them fails. Two subjects are files of
their own: test_gpu_recordings.py, test_gpu_transports.py."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, CausalVariant

import baton.engine.boot as boot_module
from baton.cluster.launch import read_worker_options
from baton.engine import gather
from baton.engine.attention import AttentionParams
from baton.engine.batch import pack
from baton.engine.boot import boot
from baton.engine.cuda import fp8
from baton.engine.cuda.fp8 import Fp8Linear, dequantized, quantize_linears
from baton.engine.device import pick_device
from baton.engine.errors import within_memory
from baton.engine.gather import GatherAttention, plan_groups, triangle
from baton.engine.pool import WORKING_BYTES, Beside, Pool, decode_pool_blocks
from baton.engine.pools import OnePool
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from baton.errors import InputError, OutOfMemory
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.row import Logits, Row
from baton.model_files import resolve_model
from baton.transfer.in_place import InPlaceExport, InPlaceLink
from baton.transfer.slabs import allocate_slabs
from decode_worker.decoding import Decoding
from decode_worker.draft import DraftModel
from decode_worker.model import Draw
from decode_worker.speculation import Wanted
from prefill_worker.filling import Filling
from prefill_worker.model import Chunk
from sampler.params import SamplingParams
from tests.torch.fake_gpu import GPU, fake_gpu
from tests.torch.families import make_model
from tests.torch.test_graphs import plain

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
LAYOUT = KVLayout((LayerShape(2, 8, 8), LayerShape(1, 8, 4)), 4, "float32")


@pytest.fixture
def sdp() -> Iterator[None]:
    """torch's choice of attention is the same afterwards."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


# ---- 1: cuDNN


@pytest.mark.usefixtures("sdp")
@pytest.mark.parametrize(("place", "enabled"), [(CUDA, False), (CPU, True)])
def test_cudnn_is_off_before_anything_runs_on_a_gpu(
    place: torch.device, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def forward(*_: object) -> Any:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        raise OutOfMemory("enough")

    monkeypatch.setattr(boot_module, "pick_device", lambda name: place)
    monkeypatch.setattr(boot_module, "pick_dtype", lambda name, device: torch.float32)
    monkeypatch.setattr(boot_module, "_forward", forward)
    with pytest.raises(OutOfMemory, match="enough"):
        boot(resolve_model("demo"), device="auto", dtype="auto", block_size=16)
    assert seen == [enabled]


# ---- 2: chunks behind others

CASES = [(3, 9, None), (5, 4, None), (4, 0, None), (3, 9, 50), (3, 9, 4), (1, 7, None)]


@pytest.mark.parametrize(("queries", "start", "window"), CASES)
def test_on_a_gpu_a_chunk_without_a_window_has_no_mask_of_bools(
    queries: int, start: int, window: int | None
) -> None:
    rows = [Row([1] * queries, start, list(range(9)))]
    (here,) = plan_groups(pack(rows, 4, CPU), 4, window)
    (there,) = plan_groups(pack(rows, 4, GPU), 4, window)
    if window == 4:
        assert there.mask is not None
        return
    assert there.mask is None
    assert there.causal is (queries > 1)
    keys = start + queries
    mask = torch.ones(queries, keys, dtype=torch.bool) if here.mask is None else here.mask[0, 0]
    mask = triangle(queries, keys, CPU) if here.causal else mask
    assert torch.equal(mask, triangle(queries, keys, CPU))


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("params", [AttentionParams(0.3), AttentionParams(0.3, softcap=5.0)])
@pytest.mark.filterwarnings("ignore")  # torch says which kernels this CPU does not have
def test_a_chunk_attends_to_the_same_in_torchs_own_form(
    flash: bool, params: AttentionParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    given = [Row([1, 2, 3], 9, [4, 0, 2]), Row([5, 6], 0, [1]), Row([7], 5, [5, 6])]
    pool = Pool.private(LAYOUT, 7, CPU)
    for views in (pool.keys, pool.values):
        for view in views:
            view.normal_()
    query = torch.randn(6, 4, 8)
    expected = GatherAttention(pack(given, 4, CPU), 4)(query, pool, 0, params)
    asked: list[Any] = []
    whole = F.scaled_dot_product_attention

    def noted(q: Any, k: Any, v: Any, mask: Any = None, **how: Any) -> torch.Tensor:
        asked.append(mask)
        return whole(q, k, v, mask, **how)

    def as_there(batch: Any, size: int, window: int | None) -> list[gather.Group]:
        return [
            gather.Group(g.rows, g.tokens, g.slots, None, causal=True)
            if len(g.tokens) // g.rows > 1 else g
            for g in plan_groups(batch, size, window)
        ]  # fmt: skip

    monkeypatch.setattr(gather, "can_use_flash_attention", lambda params: flash)
    torchs = SimpleNamespace(scaled_dot_product_attention=noted)
    monkeypatch.setattr(gather, "F", torchs)  # torch's own form asks for torch's own function
    found = GatherAttention(pack(given, 4, CPU), 4, as_there)(query, pool, 0, params)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    if params.softcap is None:
        (later,) = [each for each in asked if each is not None]
        assert isinstance(later, CausalBias) is flash
        if flash:
            assert later.variant is CausalVariant.LOWER_RIGHT
            assert (later.seq_len_q, later.seq_len_kv) == (3, 12)


# ---- 6: memory


def test_the_card_is_shared_out_whoever_loads_first() -> None:
    total, weights = 100 << 30, 10 << 30
    alone = Beside(0, 0).share(total, weights)
    pair = Beside(1, 0).share(total, weights)
    two = Beside(1, 1).share(total, weights)
    assert alone == int(total * 0.85) - (11 << 30)
    assert pair == alone - (11 << 30)
    assert 2 * two + 3 * (11 << 30) <= total * 0.85
    assert Beside(3, 3).share(20 << 30, weights) == 0


def test_the_draft_model_is_counted_for_decode_workers_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total, weights, draft = 100 << 30, 10 << 30, 3 << 30
    held = [weights]
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (90 << 30, total))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: held[0])
    pools = OnePool(LAYOUT, CUDA)  # made when the target is loaded
    held[0] += draft
    left = int(total * 0.85) - 4 * (weights + WORKING_BYTES) - 2 * draft  # 2 prefills, 2 decodes
    assert pools.blocks(None, 2**40, Beside(2, 1)) == left // 2 // sum(LAYOUT.slab_bytes(1))


def test_a_pool_beside_others_takes_its_share_and_not_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (90 << 30, 100 << 30))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 10 << 30)
    per_block = sum(LAYOUT.slab_bytes(1))
    blocks = decode_pool_blocks(LAYOUT, CUDA, None, 2**40, Beside(1, 0), 10 << 30)
    assert blocks == Beside(1, 0).share(100 << 30, 10 << 30) // per_block
    assert decode_pool_blocks(LAYOUT, CUDA, None, 2**40) == int((90 << 30) * 0.85) // per_block
    assert decode_pool_blocks(LAYOUT, CUDA, 2**20, 2**40, Beside(1, 0)) == 2**20 // per_block
    with pytest.raises(OutOfMemory, match="MiB are available"):
        decode_pool_blocks(LAYOUT, CUDA, None, 2**40, Beside(9, 9))


def test_what_torch_has_no_memory_for_is_our_error_without_its_frames() -> None:
    said = r"^cpu has no memory left for a step: CUDA out of"

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 MiB")

    with pytest.raises(OutOfMemory, match=said) as it:
        within_memory("a step", CPU, full)
    assert it.value.__context__ is None
    with pytest.raises(ValueError, match="invalid literal"):
        within_memory("a step", CPU, lambda: int("x"))
    assert within_memory("a step", CPU, lambda: 7) == 7


def test_a_draft_model_without_memory_drafts_nothing_and_computes_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner, layout = plain("gpt2")
    engine: Any = SimpleNamespace(
        layout=layout, device=CPU, runner=runner, files=SimpleNamespace(max_positions=64)
    )
    draft = DraftModel(engine, 16, context=32, chunk=8)
    wanted = [Wanted("a", [1, 2, 3, 4, 5], 2), Wanted("b", [9, 8, 7], 1)]
    expected = draft.propose(wanted)
    whole = torch.Tensor.index_copy_

    def full(*given: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "index_copy_", full)
    assert draft.propose(wanted) == [[], []]
    monkeypatch.setattr(torch.Tensor, "index_copy_", whole)
    assert len(draft._free) == 16
    assert draft.propose(wanted) == expected


def test_a_step_and_a_chunk_that_find_no_memory_say_so_and_smaller_ones_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's error comes up where keys of more than four tokens are written."""
    runner, layout = plain("gpt2")
    pools = OnePool(layout, CPU)
    engine: Any = SimpleNamespace(
        layout=layout, device=CPU, runner=runner, wait=lambda: None, pools=pools
    )
    pool = allocate_slabs(layout, 8, CPU, shared=False)
    decoding = Decoding(
        engine, pool, kinds=(), run_dir=None, bind_host=None, keys=None,
        export=lambda epoch: InPlaceExport(pool, epoch=epoch),
    )  # fmt: skip
    filling = Filling(
        engine, writer="w", transport="auto", scratch_tokens=0, keys=None,
        open_link=lambda *_: InPlaceLink(layout, pool.tensors, epoch="d/0"),
    )  # fmt: skip
    filling.attach("d", "d/0", decoding.renew_epoch("d/0"))
    grant = Grant("d", "d/0", "r#0", 1, (0, 1, 2, 3))
    decoding.expect(grant)
    whole = torch.Tensor.index_copy_

    def full(self: torch.Tensor, dim: int, index: torch.Tensor, *given: Any) -> torch.Tensor:
        if len(index) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(self, dim, index, *given)

    monkeypatch.setattr(torch.Tensor, "index_copy_", full)
    prompt, draw = [3, 1, 4, 1, 5, 9], Draw(SamplingParams(temperature=0.0), 6, ())
    with pytest.raises(OutOfMemory, match="memory left for a chunk of a prompt: CUDA out of"):
        filling.fill("d", [Chunk(grant, prompt, 0)])
    for start in (0, 3):
        filling.fill("d", [Chunk(grant, prompt[start : start + 3], start)])
    with pytest.raises(OutOfMemory, match="memory left for a decode step: CUDA out of"):
        decoding.step([Row(prompt, 0, [4, 5], Logits.LAST)], [draw])
    (drawn,) = decoding.step([Row([9], 5, [0, 1], Logits.LAST)], [draw])
    monkeypatch.setattr(torch.Tensor, "index_copy_", whole)
    (alone,) = decoding.step([Row(prompt, 0, [4, 5], Logits.LAST)], [draw])
    assert drawn == alone
    assert drawn is not None
    decoding.close()


# ---- 11: fp8


@pytest.mark.parametrize(("family", "times"), [("qwen2", 4), ("llama", 4), ("gpt2", 4)])
def test_a_layer_quantizes_each_input_once(
    family: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For q, k and v together, for the projection, for gate and up together, for down."""
    model: Any = make_model(family)
    quantize_linears(model, dequantized)
    layout = discover_layout(model, 4, torch.float32)
    pool = Pool.private(layout, 8, CPU)
    rows = [Row([3, 4, 5], 0, [0, 1], Logits.ALL), Row([7], 0, [2], Logits.LAST)]
    alone = Runner(model).run(pool, rows)
    counted: list[tuple[int, ...]] = []
    whole = fp8.quantize

    def noted(given: torch.Tensor) -> fp8.Quantized:
        counted.append(tuple(given.shape))
        return whole(given)

    monkeypatch.setattr(fp8, "quantize", noted)
    assert torch.equal(Runner(model).run(pool, rows), alone)
    assert len(counted) == times * len(layout.layers)
    for linear in [each for each in model.modules() if isinstance(each, Fp8Linear)]:
        linear.shared = fp8.Shared()  # each for itself, as a reference
    assert torch.equal(Runner(model).run(pool, rows), alone)


def test_what_is_quantized_belongs_to_its_tensor_alone() -> None:
    shared = fp8.Shared()
    rows = torch.randn(3, 32)
    first = shared.quantized(rows)
    assert shared.quantized(rows) is first
    assert shared.quantized(rows.clone()) is not first
    again = shared.quantized(rows)
    assert torch.equal(again.values.float(), first.values.float())
    del rows
    assert shared._rows is None


# ---- 13: a Mac


def test_auto_is_the_cpu_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert pick_device("auto") == CPU


def test_a_worker_is_refused_an_apple_gpu_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("baton.cluster.launch.set_up_logging", lambda name, level: None)
    given = {"parent": None, "name": None, "log_level": "warning", "keys": None, "health": None,
             "router": "ipc:///tmp/x/router.sock", "model": "demo", "device": "mps"}  # fmt: skip
    with pytest.raises(InputError, match=r"cannot use mps: .* use --device cpu"):
        read_worker_options("decode", given)


def test_the_stand_in_sees_a_look_and_every_copy() -> None:
    with fake_gpu() as copies:
        numbers = torch.ones(4).to(GPU)
        numbers.cpu()
        numbers.tolist()
        for look in (numbers.sum().item, numbers.nonzero, lambda: numbers[numbers > 0]):
            with pytest.raises(AssertionError, match="the host waits"):
                look()
    assert (len(copies.up), len(copies.down)) == (1, 2)
