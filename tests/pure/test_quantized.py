"""Quantized checkpoints by their headers alone: what is not read, or does not fit, is named in one
line."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from baton.errors import ModelError
from baton.model_files import ModelFiles, resolve_model
from baton.quantized.plan import Weight
from baton.quantized.scheme import ROW, Block, Layout, Scheme
from tests.pure.folders import model
from tests.pure.test_model_files import write_config

ANOTHER = "use the same model in bf16, fp16 or fp32"
AGAIN = "fetch the model again"
BOTH = "fetch both again from one place"
Told = tuple[str, tuple[int, ...]]
BYTES = {
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
UP = "model.layers.0.mlp.up_proj"
GPTQ: dict[str, Told] = {
    "qweight": ("I32", (8, 96)),
    "qzeros": ("I32", (2, 12)),
    "scales": ("F16", (2, 96)),
    "g_idx": ("I32", (64,)),
}
AWQ: dict[str, Told] = {
    "qweight": ("I32", (64, 12)),
    "qzeros": ("I32", (2, 12)),
    "scales": ("F16", (2, 96)),
}
PACKED: dict[str, Told] = {
    "weight_packed": ("I32", (96, 8)),
    "weight_scale": ("BF16", (96, 2)),
    "weight_shape": ("I64", (2,)),
}
FP8: dict[str, Told] = {"weight": ("F8_E4M3", (256, 100)), "weight_scale_inv": ("F32", (2, 1))}
GPTQ_TOLD: dict[str, Any] = dict(quant_method="gptq", bits=4, group_size=32)
AWQ_TOLD: dict[str, Any] = dict(quant_method="awq", bits=4, group_size=32)
FP8_TOLD: dict[str, Any] = dict(quant_method="fp8", weight_block_size=[128, 128])


def compressed(weights: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    of_weights = dict(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    group = {"targets": ["Linear"], "weights": of_weights | dict(weights or {})}
    told = dict(quant_method="compressed-tensors", format="pack-quantized")
    return told | {"config_groups": {"group_0": group}} | more


def file_of(tensors: Mapping[str, Told]) -> bytes:
    """A safetensors file of zeros."""
    header, end = dict[str, Any](), 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype]
        for each in shape:
            size *= each
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def written(
    folder: Path, settings: Any, parts: Mapping[str, Told], module: str = UP, **more: Told
) -> Path:
    """A model with one quantized matrix, and a norm."""
    model(folder)
    write_config(folder, **({} if settings is None else {"quantization_config": settings}))
    tensors = {f"{module}.{part}": each for part, each in parts.items()}
    tensors |= {"model.norm.weight": ("BF16", (64,))} | {
        key.replace("__", "."): each for key, each in more.items()
    }
    (folder / "model.safetensors").write_bytes(file_of(tensors))
    return folder


def weights_of(folder: Path) -> dict[str, Weight]:
    files: ModelFiles = resolve_model(str(folder))
    assert files.quantized is not None
    return {each.name: each for each in files.quantized.weights}


def group32(layout: Layout, **more: Any) -> Scheme:
    return Scheme(layout, 4, Block(1, 32), **more)


READ: dict[str, tuple[Any, Mapping[str, Told], Scheme, tuple[int, ...]]] = {
    "gptq": (GPTQ_TOLD, GPTQ, group32(Layout.GPTQ, zeros_less_one=True), (96, 64)),
    "gptq, v2": (
        GPTQ_TOLD | {"checkpoint_format": "gptq_v2"}, GPTQ, group32(Layout.GPTQ), (96, 64),
    ),
    "gptq, 2 bits": (
        GPTQ_TOLD | {"bits": 2, "group_size": -1},
        {"qweight": ("I32", (4, 96)), "qzeros": ("I32", (1, 6)), "scales": ("F32", (1, 96))},
        Scheme(Layout.GPTQ, 2, ROW, zeros_less_one=True), (96, 64),
    ),
    "awq": (AWQ_TOLD | {"version": "GEMM"}, AWQ, group32(Layout.AWQ), (96, 64)),
    "compressed-tensors": (compressed(), PACKED, group32(Layout.PACKED), (96, 64)),
    "compressed-tensors, the strategy untold": (
        compressed({"strategy": None}), PACKED, group32(Layout.PACKED), (96, 64),
    ),
    "compressed-tensors, act-order in turn": (
        compressed({"actorder": "weight"}), PACKED, group32(Layout.PACKED), (96, 64),
    ),
    "compressed-tensors, act-order with its index": (
        compressed({"actorder": "group"}), PACKED | {"weight_g_idx": ("I32", (64,))},
        group32(Layout.PACKED, reordered=True), (96, 64),
    ),
    "gptq, act-order": (
        GPTQ_TOLD | {"desc_act": True}, GPTQ,
        group32(Layout.GPTQ, zeros_less_one=True, reordered=True), (96, 64),
    ),
    "gptq, act-order of one group": (
        GPTQ_TOLD | {"bits": 2, "group_size": -1, "desc_act": True},
        {"qweight": ("I32", (4, 96)), "qzeros": ("I32", (1, 6)), "scales": ("F32", (1, 96))},
        Scheme(Layout.GPTQ, 2, ROW, zeros_less_one=True, reordered=True), (96, 64),
    ),
    "fp8": (FP8_TOLD, FP8, Scheme(Layout.SCALED, 8, Block(128, 128), is_float=True), (256, 100)),
    "fp8, static": (
        dict(quant_method="fp8", activation_scheme="static"),
        {"weight": ("F8_E4M3", (8, 4)), "weight_scale": ("F32", ()), "input_scale": ("F32", ())},
        Scheme(Layout.SCALED, 8, None, is_float=True), (8, 4),
    ),
    "mxfp4": (
        {"quant_method": "mxfp4"},
        {"gate_up_proj_blocks": ("U8", (3, 96, 2, 16)), "gate_up_proj_scales": ("U8", (3, 96, 2))},
        Scheme(Layout.MXFP4, 4, Block(1, 32), is_float=True), (3, 64, 96),
    ),
    "fp8, a stack": (
        FP8_TOLD,
        {"weight": ("F8_E4M3", (3, 256, 100)), "weight_scale_inv": ("F32", (3, 2, 1))},
        Scheme(Layout.SCALED, 8, Block(128, 128), is_float=True), (3, 256, 100),
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", READ)
def test_what_is_read(how: str, tmp_path: Path) -> None:
    settings, parts, scheme, shape = READ[how]
    found = weights_of(written(tmp_path / "model", settings, parts))
    name = f"{UP}.gate_up_proj" if how == "mxfp4" else f"{UP}.weight"
    assert found.keys() == {name, "model.norm.weight"}
    assert found[name].scheme == scheme
    assert found[name].shape == shape
    assert found["model.norm.weight"].scheme is None


def without(parts: Mapping[str, Told], name: str) -> dict[str, Told]:
    return {key: each for key, each in parts.items() if key != name}


@dataclass(frozen=True)
class Case:
    settings: Any
    why: str
    parts: Mapping[str, Told] = field(default_factory=dict)


def unread(settings: dict[str, Any], how: str, why: str) -> Case:
    return Case(settings, f"is quantized ({how}), and {why}: {ANOTHER}", GPTQ)


G, A, C = "gptq, 4 bits", "awq, 4 bits", "compressed-tensors"
REFUSED: dict[str, Case] = {
    # ---- settings
    "gptq, 3 bits": unread(
        GPTQ_TOLD | {"bits": 3}, "gptq, 3 bits", "bits '3' is not read (2 and 4 and 8 are)"
    ),
    "gptq, no bits": unread({"quant_method": "gptq"}, "gptq",
    "bits 'None' is not read (2 and 4 and 8 are)"), "gptq, true bits": unread(
        GPTQ_TOLD | {"bits": True}, "gptq", "bits 'True' is not read (2 and 4 and 8 are)"
    ),
    "gptq, group size 0": unread(
        GPTQ_TOLD | {"group_size": 0}, G, "group_size '0' is not read (a number of columns is, or -1)"
    ),
    "gptq, marlin": unread(
        GPTQ_TOLD | {"checkpoint_format": "marlin"}, G,
        "checkpoint_format 'marlin' is not read ('gptq' and 'gptq_v2' are)",
    ),
    "gptq, marlin of old": unread(
        GPTQ_TOLD | {"is_marlin_format": True}, G, "is_marlin_format 'True' is not read"
    ),
    "gptq, words of 64 bits": unread(
        GPTQ_TOLD | {"pack_dtype": "int64"}, G, "pack_dtype 'int64' is not read ('int32' is)"
    ),
    "gptq, an adapter": unread(
        GPTQ_TOLD | {"adapter": {"rank": 8}}, G, "adapter \"{'rank': 8}\" is not read"
    ),
    "gptq, a pattern that is none": unread(
        GPTQ_TOLD | {"dynamic": {"+:(": {"bits": 8}}}, G,
        "dynamic has '(', which is no regular expression",
    ),
    "gptq, rules that are none": unread(GPTQ_TOLD | {"dynamic": [1]}, G, "dynamic is not an object"),
    "awq, gemv": unread(AWQ_TOLD | {"version": "gemv"}, A, "version 'gemv' is not read ('gemm' is)"),
    "awq, 8 bits": unread(AWQ_TOLD | {"bits": 8}, "awq, 8 bits", "bits '8' is not read (4 is)"),
    "auto-round, another packing": unread(
        dict(quant_method="auto-round", bits=4, packing_format="auto_round:mlx"), "auto-round, 4 bits",
        "packing_format 'auto_round:mlx' is not read ('auto_round' and 'auto_round:auto_gptq' and "
        "'auto_round:gptqmodel' are)",
    ),
    "auto-round, inputs": unread(
        dict(quant_method="auto-round", bits=4, act_bits=8), "auto-round, 4 bits",
        "act_bits 8 is not read",
    ),
    "compressed-tensors, nvfp4": unread(
        compressed(format="nvfp4-pack-quantized"), C,
        "format 'nvfp4-pack-quantized' is not read ('pack-quantized' and 'int-quantized' and "
        "'float-quantized' and 'naive-quantized' and 'mixed-precision' are)",
    ),
    "compressed-tensors, 3 bits": unread(
        compressed({"num_bits": 3}), C, "num_bits '3' is not read (2 and 4 and 8 are)"
    ),
    "compressed-tensors, sparse": unread(
        compressed(sparsity_config={"format": "sparse-24-bitmask"}), C,
        "format 'sparse-24-bitmask' is not read ('dense' is)",
    ),
    "compressed-tensors, rotated": unread(
        compressed(transform_config={"config_groups": {}}), C,
        "transform_config \"{'config_groups': {}}\" is not read",
    ),
    "compressed-tensors, no groups": unread(
        compressed(config_groups={}), C, "config_groups is empty"
    ),
    "compressed-tensors, a preset": unread(
        compressed(config_groups={"W4A16": ["Linear"]}), C, "W4A16 in config_groups is not an object"
    ),
    "compressed-tensors, another strategy": unread(
        compressed({"strategy": "tensor_group"}), C,
        "strategy 'tensor_group' is not read ('tensor' and 'channel' and 'group' and 'block' are)",
    ),
    "fp8, another": unread(
        FP8_TOLD | {"fmt": "e5m2"}, "fp8", "fmt 'e5m2' is not read ('e4m3' and 'float8_e4m3fn' are)"
    ),
    "fp8, a block of one": unread(
        FP8_TOLD | {"weight_block_size": [128]}, "fp8",
        "weight_block_size '[128]' is not read (two numbers above 0 are)",
    ),
    "fp8, experts of 4 bits": unread(
        FP8_TOLD | {"expert_dtype": "fp4"}, "fp8", "expert_dtype 'fp4' is not read ('fp8' is)"
    ),
    "a method that is not read": Case(
        {"quant_method": "hqq", "nbits": 4}, f"is quantized (hqq, 4 bits): {ANOTHER}"
    ),
    "auto-round, quantized inputs of a module": unread(
        dict(quant_method="auto-round", bits=4, extra_config={UP: {"bits": 8, "act_bits": 8}}),
        "auto-round, 4 bits", "act_bits 8 is not read",
    ),
    "auto-round, other numbers of a module": unread(
        dict(
            quant_method="auto-round", bits=4, packing_format="auto_round:auto_awq",
            extra_config={UP: {"data_type": "mx_fp"}},
        ),
        "auto-round, 4 bits", "data_type 'mx_fp' is not read ('int' is)",
    ),
    "compressed-tensors, another order": unread(
        compressed({"actorder": "x"}), C,
        "actorder 'x' is not read (False and 'weight' and 'static' and True and 'group' and 'dynamic' "
        "are)",
    ),
    # ---- tensors
    **{
        f"act-order {order} without its index": Case(
            compressed({"actorder": order}),
            f"is quantized ({C}), and {UP} lacks its weight_g_idx, which tells the group of each column "
            f"where act-order is set: {AGAIN}",
            PACKED,
        )
        for order in ("group", "dynamic", "GROUP", True)
    },
    "GPTQ's act-order without its index": Case(
        GPTQ_TOLD | {"desc_act": True},
        f"is quantized ({G}), and {UP} lacks its g_idx, which tells the group of each column where "
        f"act-order is set: {AGAIN}",
        without(GPTQ, "g_idx"),
    ),
    "an index of another dtype": Case(
        compressed({"actorder": "group"}),
        f"is quantized ({C}), and {UP}.weight_g_idx holds F32 and must hold I32: {AGAIN}",
        PACKED | {"weight_g_idx": ("F32", (64,))},
    ),
    "an index of another length": Case(
        compressed({"actorder": "group"}),
        f"is quantized ({C}), and {UP}.weight_g_idx is [1] and must be [64] by its configuration: {BOTH}",
        PACKED | {"weight_g_idx": ("I32", (1,))},
    ),
    "an index that is a number": Case(
        compressed(),
        f"is quantized ({C}), and {UP}.weight_g_idx is [] and must be [64] by its configuration: {BOTH}",
        PACKED | {"weight_g_idx": ("I32", ())},
    ),
    "none is quantized": Case(
        GPTQ_TOLD,
        "is not quantized, though its configuration says so (gptq, 4 bits): none of its tensors is; "
        f"{BOTH}, or delete quantization_config from config.json",
    ),
    "no zero points": Case(
        GPTQ_TOLD, f"is quantized ({G}), and {UP} lacks its qzeros: {AGAIN}", without(GPTQ, "qzeros")
    ),
    "no scales": Case(
        FP8_TOLD, f"is quantized (fp8), and {UP}.weight lacks its scale: {AGAIN}",
        without(FP8, "weight_scale_inv"),
    ),
    "no zero points, though told": Case(
        compressed({"symmetric": False}),
        f"is quantized ({C}), and {UP} lacks its weight_zero_point: {AGAIN}", PACKED,
    ),
    "zero points, though not told": Case(
        compressed(),
        f"is quantized ({C}), and {UP}.weight_zero_point (I32) is not read: {ANOTHER}",
        PACKED | {"weight_zero_point": ("I32", (12, 2))},
    ),
    "other groups": Case(
        GPTQ_TOLD | {"group_size": 16},
        f"is quantized ({G}), and {UP}.scales is [2, 96] and must be [4, 96] by its configuration: "
        f"{BOTH}",
        GPTQ,
    ),
    "other bits": Case(
        GPTQ_TOLD | {"bits": 8},
        f"is quantized (gptq, 8 bits), and {UP}.scales is [2, 96] and must be [1, 96] by its "
        f"configuration: {BOTH}",
        GPTQ,
    ),
    "a flat qweight": Case(
        GPTQ_TOLD,
        f"is quantized ({G}), and {UP}.qweight is [768] and must be a matrix: {AGAIN}",
        GPTQ | {"qweight": ("I32", (768,))},
    ),
    "words that are none": Case(
        AWQ_TOLD, f"is quantized ({A}), and {UP}.qzeros holds I64 and must hold I32: {AGAIN}",
        AWQ | {"qzeros": ("I64", (2, 12))},
    ),
    "integers for floats": Case(
        AWQ_TOLD, f"is quantized ({A}), and {UP}.scales holds I32, which is not read: {ANOTHER}",
        AWQ | {"scales": ("I32", (2, 96))},
    ),
    "a second scale": Case(
        compressed(), f"is quantized ({C}), and {UP}.weight_global_scale (F32) is not read: {ANOTHER}",
        PACKED | {"weight_global_scale": ("F32", (1,))},
    ),
    "smoothed inputs": Case(
        AWQ_TOLD, f"is quantized ({A}), and {UP}.pre_quant_scale (F16) is not read: {ANOTHER}",
        AWQ | {"pre_quant_scale": ("F16", (64,))},
    ),
    "no scheme": Case(
        compressed(config_groups={
            "group_0": {"targets": ["re:.*down.*"], "weights": {"num_bits": 4, "group_size": 32}}
        }),
        f"is quantized ({C}), and {UP}.weight_packed holds I32, for which its configuration has no "
        f"scheme: {ANOTHER}",
        PACKED,
    ),
    "another layout": Case(
        AWQ_TOLD,
        f"is quantized ({A}), and {UP}.weight_packed holds I32, for which its configuration has no "
        f"scheme: {ANOTHER}",
        PACKED,
    ),
    "another FP8": Case(
        FP8_TOLD,
        f"is quantized (fp8), and {UP}.weight holds F8_E5M2, for which its configuration has no scheme: "
        f"{ANOTHER}",
        FP8 | {"weight": ("F8_E5M2", (256, 100))},
    ),
    "too few powers": Case(
        {"quant_method": "mxfp4"},
        f"is quantized (mxfp4), and {UP}.up_scales is [3, 96, 1] and must be [3, 96, 2] by its "
        f"configuration: {BOTH}",
        {"up_blocks": ("U8", (3, 96, 2, 16)), "up_scales": ("U8", (3, 96, 1))},
    ),
    "too few blocks": Case(
        FP8_TOLD,
        f"is quantized (fp8), and {UP}.weight_scale_inv is [1, 1] and must be [2, 1] by its "
        f"configuration: {BOTH}",
        FP8 | {"weight_scale_inv": ("F32", (1, 1))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_read_is_named_in_one_line(what: str, tmp_path: Path) -> None:
    case, folder = REFUSED[what], tmp_path / "model"
    written(folder, case.settings, case.parts)
    with pytest.raises(ModelError) as caught:
        resolve_model(str(folder))
    assert str(caught.value) == f"{folder} {case.why}"


SAME: Callable[[Path], object] = lambda folder: None  # noqa: E731


def retold(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: write_config(folder, quantization_config=GPTQ_TOLD | changes)


def elsewhere(**changes: Any) -> Callable[[Path], object]:
    """The settings stand in quantize_config.json alone."""

    def change(folder: Path) -> None:
        write_config(folder)
        (folder / "quantize_config.json").write_text(json.dumps(GPTQ_TOLD | changes))

    return change


def test_equal_fingerprints_mean_equal_weights(tmp_path: Path) -> None:
    """The same words mean other numbers under other settings, wherever these stand."""
    changes = (
        SAME,
        retold(checkpoint_format="gptq_v2"),
        elsewhere(),
        elsewhere(checkpoint_format="gptq_v2"),
    )
    found = []
    for number, change in enumerate(changes):
        folder = written(tmp_path / str(number), GPTQ_TOLD, GPTQ)
        change(folder)
        found.append(resolve_model(str(folder)).fingerprint)
    assert len(set(found)) == len(changes)


def test_settings_that_were_left_beside_a_model_in_full_width_are_not_heeded(
    tmp_path: Path,
) -> None:
    folder = model(tmp_path / "model")
    (folder / "quantize_config.json").write_text(json.dumps(GPTQ_TOLD | {"bits": 3}))
    assert resolve_model(str(folder)).quantized is None


def test_numbers_are_counted_in_full_width(tmp_path: Path) -> None:
    """So that a model that does not fit the memory is refused before its weights are read."""
    files = resolve_model(str(written(tmp_path / "model", GPTQ_TOLD, GPTQ)))
    assert files.quantized is not None
    assert files.quantized.numbers == 96 * 64 + 64


def test_experts_that_lie_apart_are_counted_twice(tmp_path: Path) -> None:
    """The memory holds them apart and joined while a model is loaded."""
    module = "model.layers.0.mlp.experts.3.up_proj"
    files = resolve_model(str(written(tmp_path / "model", GPTQ_TOLD, GPTQ, module)))
    assert files.quantized is not None
    assert files.quantized.numbers == 96 * 64 + 64
    assert files.quantized.twice == 96 * 64
    for other in (UP, "model.layers.0.mlp.experts"):
        files = resolve_model(str(written(tmp_path / other, GPTQ_TOLD, GPTQ, other)))
        assert files.quantized is not None
        assert not files.quantized.twice
