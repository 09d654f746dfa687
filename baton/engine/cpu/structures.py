"""The interface between Python and native code: the structures and codes of native/program_file.h,
rows.h, gemm_pack.h and attention_plan.h. `check_abi` compares them with those of a compiled library.
Inside a program's file, every address is an offset from its start."""

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p

import torch

from baton.engine.errors import CompileError

CODES = (
    *("copy", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid"),
    *("silu", "gelu", "gelu_tanh", "relu", "cos", "sin", "square", "cube", "pow", "add_to"),
    *(
        "times",
        "clamp",
        "expm1",
        "log1p",
        "floor",
        "above",
        "below",
        "add",
        "sub",
        "mul",
        "div",
        "max",
        "min",
        "sum",
        "mean",
        "largest",
    ),
    *("silu_mul", "gelu_mul", "gelu_tanh_mul", "where"),
    *("layer_norm", "embed_f32", "embed_bf16", "topk", "gather", "scatter"),
)
PLACES = ("none", "value", "gathered", "scratch", "constant")
NONE, VALUE, GATHERED, SCRATCH, CONSTANT = range(5)
STAGES = ("rows", "product", "write_kv", "attend", "grouped")
ROWS, PRODUCT, WRITE_KV, ATTEND, GROUPED = range(5)
KINDS = ("tokens", "logit_rows", "ids", "positions", "logits")
LOGITS = KINDS.index("logits")
WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.qint8: 3}
"""WeightType of gemm_word.h. qint8 stands for int8 weights that are multiplied by bf16 rows."""
TYPES = ("f32", "bf16", "i8", "w8", "q4", "q8")
"""The names of WeightType, and of CacheType (the first three)."""
OFFSETS = ("none", "zeros", "minima")
SCALED = (torch.int8, torch.qint8)  # 8-bit weights with a scale per channel
CACHES = {"float32": 0, "bfloat16": 1, "int8": 2}


class Operand(Structure):
    _fields_ = [
        ("place", c_int32),
        ("buffer", c_int32),
        ("offset", c_int64),
        ("outer_stride", c_int64),
        ("inner_stride", c_int64),
    ]


class Op(Structure):
    _fields_ = [
        ("code", c_int32),
        ("unused", c_int32),
        ("outer", c_int64),
        ("inner", c_int64),
        *((name, Operand) for name in ("to", "a", "b", "c")),
        ("x", c_float),
        ("y", c_float),
    ]


class BufferSpec(Structure):
    _fields_ = [("kind", c_int32), ("unused", c_int32), ("width", c_int64), ("offset", c_int64)]


class TensorRef(Structure):
    _fields_ = [("buffer", c_int64), ("offset", c_int64)]


class Stage(Structure):
    _fields_ = [
        ("kind", c_int32),
        ("of_logit_rows", c_int32),
        ("first", c_int64),
        ("count", c_int64),
        *((name, TensorRef) for name in ("a", "b", "to")),
        ("slots", c_int64),
        ("slot_stride", c_int64),
    ]


class Weight(Structure):
    _fields_ = [
        ("type", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        *((name, c_void_p) for name in ("panels", "scales", "bias")),
        ("block", c_int64),
        *((name, c_int32) for name in ("offset", "halves")),
    ]


class Table(Structure):
    _fields_ = [("data", c_void_p), ("bytes", c_int64)]


class AttentionLayer(Structure):
    _fields_ = [
        ("type", c_int32),
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("heads", "kv_heads", "key_dim", "value_dim")),
        ("scaling", c_float),
        ("window", c_int64),
        ("softcap", c_float),
        ("sinks", c_void_p),
    ]


class Spec(Structure):
    """The head of a program's file."""

    _fields_ = [
        *((name, c_int64) for name in ("ops", "stages", "buffers", "weights", "layers", "tables")),
        *((name, c_int64) for name in ("op_count", "stage_count", "buffer_count", "weight_count")),
        *((name, c_int64) for name in ("layer_count", "table_count")),
        *((name, c_int64) for name in ("token_floats", "logit_row_floats", "scratch_floats")),
        *((name, c_int64) for name in ("info", "info_bytes", "file_bytes", "checksum")),
    ]


class AttentionBatch(Structure):
    _fields_ = [
        ("sequences", c_int64),
        *((name, c_void_p) for name in ("query_offsets", "context_lengths", "block_table")),
        ("table_width", c_int64),
        ("block_size", c_int64),
        ("slots", c_void_p),
    ]


class ForwardArgs(Structure):
    """The arguments of one forward: its tokens, and memory for its values."""

    _fields_ = [
        ("tokens", c_int64),
        ("logit_count", c_int64),
        *((name, c_void_p) for name in ("ids", "positions", "logit_rows")),
        ("attention", AttentionBatch),
        *((name, c_void_p) for name in ("keys", "values", "arena", "logits", "argmax")),
    ]


ARRAYS = {"op": Op, "stage": Stage, "buffer": BufferSpec, "weight": Weight, "layer": AttentionLayer,
          "table": Table}  # fmt: skip
"""The arrays of a program's file. Spec has the offset (`ops`) and length (`op_count`) of each."""

ATTENTION = (AttentionBatch, AttentionLayer)
PROGRAM = (*ATTENTION, Operand, Op, BufferSpec, TensorRef, Stage, Weight, Table, Spec, ForwardArgs)
ENUMS: dict[str, tuple[str, ...]] = {
    "OpCode": CODES,
    "Place": PLACES,
    "StageKind": STAGES,
    "BufferKind": KINDS,
    "WeightType": TYPES,
    "Offset": OFFSETS,
}


class _AbiEntry(Structure):
    _fields_ = [("name", c_char_p), ("value", c_int64)]


def abi_of(structures: tuple[type[Structure], ...]) -> dict[str, int]:
    """Sizes, offsets and codes as declared here, by the names of native/abi.h."""
    enums = {"CacheType": TYPES[:3]} | (ENUMS if structures is PROGRAM else {})
    found = {f"{enum}.{name}": i for enum, names in enums.items() for i, name in enumerate(names)}
    for each in structures:
        found[each.__name__] = ctypes.sizeof(each)
        for name, *_ in each._fields_:
            found[f"{each.__name__}.{name}"] = getattr(each, name).offset
    return found


def check_abi(library: ctypes.CDLL, structures: tuple[type[Structure], ...]) -> ctypes.CDLL:
    """The library, if its sizes, offsets and codes equal the declarations here. CompileError with the
    first difference otherwise: a call would access the wrong memory."""
    library.baton_abi.restype = POINTER(_AbiEntry)
    entries, theirs, i = library.baton_abi(), {}, 0
    while (name := entries[i].name) is not None:
        theirs[name.decode()] = entries[i].value
        i += 1
    ours = abi_of(structures)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise CompileError(
                f"native code and structures.py disagree on {name}: {theirs.get(name)} in native "
                f"code, {ours.get(name)} in Python"
            )
    return library
