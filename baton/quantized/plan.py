"""Plan: from the headers of the files alone, which weights the model has and what each is made of.

Which matrices are quantized is read off the tensors: lists of modules that are not (`ignore`,
modules_to_not_convert) name them as the program did that wrote the checkpoint. No torch: a checkpoint
that does not fit together is refused before a worker is started.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.checkpoints.weights import EXPERT, is_quantized, tensors_of
from baton.errors import ModelError
from baton.quantized.mxfp4 import COLUMNS
from baton.quantized.scheme import ROW, WHOLE, Block, Layout, Quantization, Scheme

WORD = 32  # bits
FULL = ("F64", "F32", "F16", "BF16")
SCALES = (*FULL, "F8_E8M0")
NARROW = ("I8", "F8_E4M3")
"""Dtypes of matrices with one number for each weight."""
BESIDE = ("input_scale", "input_zero_point", "output_scale", "output_zero_point",
          "activation_scale", "input_scale_ub")  # fmt: skip
"""What a quantized module may have for rounding what is computed, by its last letters. It is left out."""
DEFAULT_BLOCK = Block(128, 128)
"""Of FP8, where neither the configuration nor the shape of the scales says another."""
VALUES, SCALE, ZEROS, INDEX, SHAPE = "values", "scales", "zeros", "index", "shape"
PARTS: dict[Layout, dict[str, tuple[str, ...]]] = {
    Layout.GPTQ: {
        VALUES: ("qweight",), SCALE: ("scales",), ZEROS: ("qzeros",), INDEX: ("g_idx",),
    },
    Layout.AWQ: {VALUES: ("qweight",), SCALE: ("scales",), ZEROS: ("qzeros",)},
    Layout.PACKED: {
        VALUES: ("weight_packed",), SCALE: ("weight_scale",), ZEROS: ("weight_zero_point",),
        INDEX: ("weight_g_idx",), SHAPE: ("weight_shape",),
    },
    Layout.SCALED: {
        VALUES: ("",), SCALE: ("_scale", "_scale_inv"), ZEROS: ("_zero_point",), INDEX: ("_g_idx",),
    },
    Layout.MXFP4: {VALUES: ("_blocks",), SCALE: ("_scales",)},
}  # fmt: skip
"""What follows in the names of the parts: after the module's name and a dot, and for NAMED after the
weight's name."""
NAMED = (Layout.SCALED, Layout.MXFP4)

ANOTHER = "use the same model in bf16, fp16 or fp32"
AGAIN = "fetch the model again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file, by its header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of the model."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, Entry]  # by their roles; a weight in full width is its VALUES
    scheme: Scheme | None = None  # None: stored in full width


@dataclass(frozen=True, slots=True)
class Plan:
    """A quantized checkpoint that fits together."""

    about: str  # such as: gptq, 4 bits
    weights: tuple[Weight, ...]

    @property
    def numbers(self) -> int:
        """Of all weights in full width."""
        return sum(math.prod(each.shape) for each in self.weights)

    @property
    def twice(self) -> int:
        """Numbers of those weights that the memory holds twice while a model is loaded: of experts that
        lie apart in the file, and are joined to a stack in the model."""
        return sum(math.prod(each.shape) for each in self.weights if EXPERT.search(each.name))


class Misfit(Exception):
    """A tensor that does not fit the others, as the end of a sentence."""


def plan_weights(
    name: str, about: str, quantization: Quantization, headers: Iterable[tuple[Path, bytes]]
) -> Plan:
    """The weights of the model `name`. `headers`: checked ones, with their files. Raises ModelError."""
    entries = _entries(headers)
    try:
        weights = list(_weights(quantization, entries))
    except Misfit as why:
        raise ModelError(f"{name} is quantized ({about}), and {why}") from why
    if not any(each.scheme for each in weights):
        raise ModelError(
            f"{name} is not quantized, though its configuration says so ({about}): none of its tensors "
            "is; fetch both again from one place, or delete quantization_config from config.json"
        )
    return Plan(about, tuple(weights))


def _entries(headers: Iterable[tuple[Path, bytes]]) -> dict[str, Entry]:
    found = dict[str, Entry]()
    for file, header in headers:
        for name, (dtype, shape) in tensors_of(header).items():
            found[name] = Entry(name, dtype, shape, file)
    return found


def _weights(quantization: Quantization, entries: Mapping[str, Entry]) -> Iterator[Weight]:
    used, modules = set[str](), set[str]()
    for layout in quantization.layouts:
        for entry in entries.values():
            stem = _stem(layout, entry)
            if stem is None or entry.name in used:
                continue
            parts = _parts(layout, stem, entries)
            weight = _weight(quantization, layout, stem, parts)
            used.update(each.name for each in parts.values())
            modules.add(weight.name.rpartition(".")[0])
            yield weight
    for entry in entries.values():
        if entry.name in used:
            continue
        module, _, last = entry.name.rpartition(".")
        if module in modules and last != "bias":
            if last.endswith(BESIDE):
                continue
            if entry.dtype not in FULL or last.startswith(("weight_", "scale", "pre_quant")):
                raise Misfit(f"{entry.name} ({entry.dtype}) is not read: {ANOTHER}")
        _check_full(entry)
        yield Weight(entry.name, entry.shape, {VALUES: entry})


def _check_full(entry: Entry) -> None:
    """Misfit for numbers that are nothing without scales."""
    if is_quantized(entry.name, entry.dtype):
        raise Misfit(
            f"{entry.name} holds {entry.dtype}, for which its configuration has no scheme: {ANOTHER}"
        )


def _stem(layout: Layout, entry: Entry) -> str | None:
    """What the names of a matrix' parts begin with, if this tensor holds its values."""
    if layout is Layout.SCALED:
        return entry.name if entry.dtype in NARROW and len(entry.shape) > 1 else None
    ending = ("" if layout in NAMED else ".") + PARTS[layout][VALUES][0]
    return entry.name.removesuffix(ending) if entry.name.endswith(ending) else None


def _parts(layout: Layout, stem: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    dot = "" if layout in NAMED else "."
    found = dict[str, Entry]()
    for role, endings in PARTS[layout].items():
        for ending in endings:
            if (entry := entries.get(f"{stem}{dot}{ending}")) is not None:
                found.setdefault(role, entry)
    return found


def _weight(
    quantization: Quantization, layout: Layout, stem: str, parts: Mapping[str, Entry]
) -> Weight:
    module = stem.rpartition(".")[0] if layout in NAMED else stem
    scheme = quantization.scheme_of(module)
    values = parts[VALUES]
    if scheme is None or scheme.layout is not layout:
        raise Misfit(
            f"{values.name} holds {values.dtype}, for which its configuration has no scheme: {ANOTHER}"
        )
    needed = (SCALE, ZEROS) if layout in (Layout.GPTQ, Layout.AWQ) else (SCALE,)
    if not scheme.symmetric:
        needed = (SCALE, ZEROS)
    for role in needed:
        if role not in parts:
            ending = PARTS[layout][role][0]
            raise Misfit(f"{stem} lacks its {ending.strip('_')}: {AGAIN}")
    if scheme.symmetric and ZEROS in parts and (layout is Layout.PACKED or scheme.is_float):
        raise Misfit(f"{parts[ZEROS].name} ({parts[ZEROS].dtype}) is not read: {ANOTHER}")
    if parts[SCALE].dtype not in (SCALES if layout is not Layout.MXFP4 else ("U8",)):
        raise Misfit(
            f"{parts[SCALE].name} holds {parts[SCALE].dtype}, which is not read: {ANOTHER}"
        )
    name = stem if layout in NAMED else f"{stem}.weight"
    shape = _checked(scheme, parts)
    if scheme.reordered and INDEX not in parts and blocks(shape[-1], _columns(scheme)) > 1:
        ending = PARTS[layout][INDEX][0]
        raise Misfit(
            f"{stem} lacks its {ending.strip('_')}, which tells the group of each column where act-order "
            f"is set: {AGAIN}"
        )
    return Weight(name, shape, parts, scheme)


def _checked(scheme: Scheme, parts: Mapping[str, Entry]) -> tuple[int, ...]:
    """The weight's shape. Misfit if its parts do not have the shapes and dtypes that belong to it."""
    values, each = parts[VALUES], WORD // scheme.bits
    match scheme.layout:
        case Layout.GPTQ | Layout.AWQ:
            _check_matrix(values)
            by_columns = scheme.layout is Layout.GPTQ  # a word holds columns of one row
            columns = values.shape[0] * (each if by_columns else 1)
            rows = values.shape[1] * (1 if by_columns else each)
            groups = (blocks(columns, _columns(scheme)), rows)
            _check(parts[SCALE], SCALES, groups)
            _check(parts[ZEROS], ("I32",), (groups[0], blocks(rows, each)))
            if INDEX in parts:
                _check(parts[INDEX], ("I32", "I64"), (columns,))
        case Layout.PACKED:
            _check_matrix(values)
            rows, columns = values.shape[0], values.shape[1] * each
            if SHAPE in parts:
                _check(parts[SHAPE], ("I64", "I32"), (2,))
            _, groups_each = _scale_shape(scheme, parts[SCALE], (rows, columns))
            if not scheme.symmetric:
                _check(parts[ZEROS], ("I32",), (blocks(rows, each), groups_each))
            if INDEX in parts:
                length = parts[INDEX].shape[:1] or (0,)
                fits = blocks(length[0], each) == values.shape[1]  # the last word may have a rest
                _check(parts[INDEX], ("I32", "I64"), length if fits else (columns,))
        case Layout.MXFP4:
            _check(values, ("U8",), (*values.shape[:-1], COLUMNS // 2))
            if len(values.shape) != 4:
                raise Misfit(f"{values.name} is {list(values.shape)}, which is not read: {ANOTHER}")
            _check(parts[SCALE], ("U8",), values.shape[:-1])
            return values.shape[0], values.shape[2] * COLUMNS, values.shape[1]
        case Layout.SCALED:
            _check(values, ("F8_E4M3",) if scheme.is_float else ("I8",), values.shape)
            _scale_shape(scheme, parts[SCALE], values.shape)
            if ZEROS in parts:
                _check(parts[ZEROS], ("I8",), parts[SCALE].shape)
            if INDEX in parts:
                _check(parts[INDEX], ("I32", "I64"), values.shape[-1:])
            return values.shape
    return rows, columns


def _check_matrix(words: Entry) -> None:
    _check(words, ("I32",), words.shape)
    if len(words.shape) != 2:
        raise Misfit(f"{words.name} is {list(words.shape)} and must be a matrix: {AGAIN}")


def _columns(scheme: Scheme) -> int | None:
    return scheme.block.columns if scheme.block else None


def _scale_shape(scheme: Scheme, scale: Entry, shape: tuple[int, ...]) -> tuple[int, int]:
    """Row blocks and column blocks. Misfit if the scales are not as many."""
    block = block_for(scheme, scale.shape, shape)
    stack = shape[:-2]
    rows, columns = blocks(shape[-2], block.rows), blocks(shape[-1], block.columns)
    if scheme.layout is Layout.PACKED and block.columns:
        # The last word may have this many columns more than the matrix.
        spare = WORD // scheme.bits - 1
        fewer = blocks(shape[-1] - spare, block.columns)
        columns = fewer if scale.shape == (rows, fewer) else columns
    allowed = [(*stack, rows, columns)]
    if columns == 1:
        allowed.append((*stack, rows))
    if rows == columns == 1:
        allowed.append(stack)
    _check(scale, SCALES, scale.shape if scale.shape in allowed else allowed[0])
    return rows, columns


def block_for(scheme: Scheme, scales: tuple[int, ...], shape: tuple[int, ...]) -> Block:
    """The scheme's block, or where it has none what the shape of the scales says."""
    if scheme.block is not None:
        return scheme.block
    stack, rows = shape[:-2], shape[-2]
    if scales in ((*stack, rows, 1), (*stack, rows)) and rows > 1:
        return ROW
    return WHOLE if math.prod(scales) == math.prod(stack) else DEFAULT_BLOCK


def blocks(size: int, each: int | None) -> int:
    """How many of `each` cover `size`; one where `each` is None."""
    return 1 if each is None else -(-size // each)


def _check(entry: Entry, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if entry.dtype not in dtypes:
        raise Misfit(f"{entry.name} holds {entry.dtype} and must hold {dtypes[0]}: {AGAIN}")
    if entry.shape != shape:
        raise Misfit(
            f"{entry.name} is {list(entry.shape)} and must be {list(shape)} by its configuration: fetch "
            "both again from one place"
        )
