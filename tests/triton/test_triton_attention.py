"""The Triton kernels against the gathered attention: the part that `make test` runs where triton is.

On the CPU Triton's interpreter runs the kernels, on a GPU they are compiled (conftest.py)."""

from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from baton.engine.attention import AttentionParams
from baton.engine.batch import pack
from baton.engine.cuda.graphs import GraphRunner
from baton.engine.cuda.select import fastest
from baton.engine.errors import Unsupported
from baton.kv.layout import LayerShape
from tests.triton.conftest import WITHOUT

kit: Any = pytest.importorskip("tests.triton.kit", reason=WITHOUT, exc_type=ModuleNotFoundError)
attention: Any = pytest.importorskip("baton.engine.cuda.triton_attention", reason=WITHOUT)
checks: Any = pytest.importorskip("baton.engine.cuda.triton_check", reason=WITHOUT)


# ---- what is computed


@pytest.mark.parametrize("name", ["PLAIN", "PECULIAR"])
def test_every_kind_of_launch_gives_what_gathering_gives(name: str, device: torch.device) -> None:
    setting, layer = kit.setting(device), getattr(kit, name)
    for case in checks.cases(kit.PAGE, kit.TINY):
        assert setting.error_of(case, layer) < 2e-6, case.name


def test_a_row_has_the_same_bits_whoever_else_is_there(device: torch.device) -> None:
    world = kit.World.of([(37, 1), (90, 1), (0, 1), (50, 3), (0, 20), (9, 11)], kit.PLAIN, device)
    alone = [world.attend([row])[0] for row in range(6)]
    for present in ([0, 1, 2], [2, 0], [4, 1, 0, 3], [5, 3, 2, 4]):
        for row, found in zip(present, world.attend(present), strict=True):
            assert torch.equal(found, alone[row]), (row, present)


def test_a_row_has_the_same_bits_however_wide_the_table_is(device: torch.device) -> None:
    for layer in (kit.PLAIN, kit.PECULIAR):
        world = kit.World.of([(37, 1), (2, 1), (14, 1)], layer, device)
        expected = world.attend([0, 1, 2])
        for width in (10, 16, 64):
            found = world.attend([0, 1, 2], width)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), width


def test_a_recorded_step_may_have_several_tokens_a_row(device: torch.device) -> None:
    world = kit.World.of([(37, 7), (3, 7), (14, 7)], kit.PLAIN, device)
    batch = pack(world.rows, kit.PAGE, device)
    recorded = replace(batch, starts=(), lengths=())  # as graphs.py: all is on the device
    tuning = attention.Tuning(split=16, few=8, step=16)
    query = torch.cat(list(world.queries))
    one, two = (
        attention.TritonAttention(each, kit.PAGE, tuning)(query, world.pool, 0, kit.PLAIN.params)
        for each in (batch, recorded)
    )
    assert torch.equal(one, two)


# ---- whether they are used


class Broken:
    """Kernels that compute nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda output, *given, **named: output.zero_()


def test_kernels_that_compute_something_else_are_not_used(device: torch.device) -> None:
    broken: Any = ModuleType("broken")
    broken.attend = broken.reduce = Broken()
    with pytest.raises(Unsupported, match=r"^in a decode step the results .* differ by 100.0%"):
        kit.setting(device, kernels=broken).check([kit.PLAIN])


def test_what_triton_does_not_compile_is_unsupported() -> None:
    from triton.errors import TritonError

    def refused(*given: Any, **named: Any) -> None:
        raise TritonError("out of resource: shared memory")

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return refused

    with pytest.raises(Unsupported, match="TritonError: out of resource"):
        attention.launch(Kernel(), (1,))


def test_a_model_runs_over_them_and_a_line_says_so(device: torch.device) -> None:
    from tests.torch.test_graphs import LENGTHS, STEPS, Play

    slow, layout = kit.plain_on("gpt_oss", device)  # windows in every other layer, sinks, experts
    make = partial(kit.recorder, device)
    way = ("Triton", lambda: checks.with_triton(slow, layout, make, kit.TINY))
    fast = fastest(slow, layout, [way])
    assert isinstance(fast, GraphRunner), fast.backend
    assert fast.backend == f"in torch, Triton {attention.VERSION}, CUDA graphs"
    one, two = Play(slow, layout, LENGTHS), Play(fast, layout, LENGTHS)
    for present in STEPS[:2]:
        torch.testing.assert_close(two.step(present), one.step(present), atol=1e-4, rtol=0)


def test_kinds_of_layers_are_told_apart() -> None:
    shape, sinks = LayerShape(2, 16, 16), torch.zeros(4)
    layer = checks.Layer(4, shape, AttentionParams(0.25, sinks=sinks))
    assert layer.same(checks.Layer(4, shape, AttentionParams(0.25, sinks=sinks + 1)))
    assert not layer.same(checks.Layer(4, shape, AttentionParams(0.25)))
    assert not layer.same(checks.Layer(2, shape, AttentionParams(0.25, sinks=sinks)))
    assert not layer.same(checks.Layer(4, shape, AttentionParams(0.25, window=8, sinks=sinks)))


# ---- how programs are laid out


def heads(group: int = 7, key_dim: int = 128, value_dim: int | None = None, **more: Any) -> Any:
    dtype = more.pop("dtype", torch.bfloat16)
    return attention.Heads(4 * group, 4, key_dim, value_dim or key_dim, dtype)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16, 71, 128])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (192, 128), (256, 256), (512, 512)])
@pytest.mark.parametrize("dtype", attention.DTYPES, ids=str)
def test_tiles_have_room_for_a_group_and_fit_the_card(
    group: int, dims: tuple[int, int], dtype: torch.dtype
) -> None:
    tuning = attention.Tuning()
    for choose in (attention.decode_tile, attention.prefill_tile):
        layer = heads(group, *dims, dtype=dtype)
        tile = choose(layer, tuning)
        assert 16 <= tile.step <= tuning.split
        assert tuning.split % tile.step == 0  # steps begin where splits do
        assert tile.tokens >= 1
        assert tile.tokens * group <= tile.rows
        needed = tile.step * sum(layer.padded) * dtype.itemsize
        assert tile.step == 16 or needed * tuning.buffers <= tuning.step_bytes
        registers = tile.rows * layer.padded[1] // (32 * tile.warps)
        assert registers <= 128 or (group > 64 and dims[1] > 256)


def test_a_card_with_less_shared_memory_gets_smaller_steps() -> None:
    server, desktop = attention.tuned((9, 0)), attention.tuned((8, 9))
    assert server == attention.Tuning()
    assert desktop.step_bytes < server.step_bytes


def test_every_query_is_in_one_tile_and_long_tiles_come_first() -> None:
    lengths, starts = [1, 40, 3, 17], [5, 0, 900, 100]
    found = attention.tiles_of(lengths, starts, 10, taken=lambda length: length > 16)
    assert found == [(3, 10), (3, 0), (1, 30), (1, 20), (1, 10), (1, 0)]
    assert attention.tiles_of(lengths, starts, 2, taken=lambda length: length <= 16) == [
        *[(2, 2), (2, 0), (0, 0)],
    ]


def test_a_window_limits_the_splits_however_wide_the_table_is() -> None:
    for window in (1, 7, 16, 17, 40):
        for tokens in (1, 5):
            limit = attention.splits_of(10**6, tokens, window, 16)
            touched = {
                (start + tokens - 1) // 16 - max(0, start - window + 1) // 16 + 1
                for start in range(200)
            }
            assert max(touched) == limit, (window, tokens)
    assert attention.splits_of(33, 1, None, 16) == 3
    assert attention.splits_of(20, 1, 40, 16) == 2


def test_recorded_tables_have_few_widths() -> None:
    steps = attention.TritonSteps()
    assert [steps.width([n]) for n in (1, 16, 17, 65, 1000, 2000, 2048)] == [
        *[16, 16, 64, 256, 1024, 2048, 2048]
    ]
    assert steps.width([3, 70, 1]) == 256


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(dtype=torch.float8_e4m3fn), "keys in torch.float8_e4m3fn"),
        (dict(group=256), "256 query heads to a KV head"),
        (dict(key_dim=640), "heads of 640 numbers"),
        (dict(key_dim=192, value_dim=128), ""),
    ],
)
def test_what_they_do_not_compute_is_told(given: dict[str, Any], why: str) -> None:
    assert heads(**given).unfit == why
