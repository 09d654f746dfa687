"""What Python and native code hand to each other: the structures of rows.h, gemm.h, attention.h and
program.cpp, field by field. Inside a program's file, every address is an offset from its beginning."""

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

import torch

CODES = (
    *("copy", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid"),
    *("silu", "gelu", "gelu_tanh", "relu", "cos", "sin", "square", "cube", "pow", "add_to"),
    *("times", "clamp", "add", "sub", "mul", "div", "max", "min", "sum", "mean", "largest"),
    *("silu_mul", "gelu_mul", "gelu_tanh_mul"),
    *("layer_norm", "embed_f32", "embed_bf16"),
)
NONE, VALUE, PICKED, SCRATCH, CONSTANT = range(5)
STAGES = ("rows", "product", "write_kv", "attend")
ROWS, PRODUCT, WRITE_KV, ATTEND = range(4)
KINDS = {"tokens": 0, "picks": 1, "ids": 2, "positions": 3, "logits": 4}
WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.qint8: 3}
"""WeightType of gemm_word.h; qint8 stands for bytes that meet rows in bf16."""
SCALED = (torch.int8, torch.qint8)  # bytes with a scale for each channel
CACHES = {"float32": 0, "bfloat16": 1}


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


class Buffer(Structure):
    _fields_ = [("kind", c_int32), ("unused", c_int32), ("width", c_int64), ("offset", c_int64)]


class Spot(Structure):
    _fields_ = [("buffer", c_int64), ("offset", c_int64)]


class Stage(Structure):
    _fields_ = [
        ("kind", c_int32),
        ("of_picks", c_int32),
        ("first", c_int64),
        ("count", c_int64),
        *((name, Spot) for name in ("a", "b", "to")),
    ]


class Weight(Structure):
    _fields_ = [
        ("type", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        *((name, c_void_p) for name in ("panels", "scales", "bias")),
    ]


class Layer(Structure):
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
    """The beginning of a program's file."""

    _fields_ = [
        *((name, c_int64) for name in ("ops", "stages", "buffers", "weights", "layers", "tables")),
        *((name, c_int64) for name in ("op_count", "stage_count", "buffer_count", "weight_count")),
        *((name, c_int64) for name in ("layer_count", "table_count")),
        *((name, c_int64) for name in ("token_floats", "pick_floats", "scratch_floats")),
        *((name, c_int64) for name in ("info", "info_bytes", "file_bytes")),
    ]


class AttentionBatch(Structure):
    """Of attention.h."""

    _fields_ = [
        ("sequences", c_int64),
        *((name, c_void_p) for name in ("query_offsets", "context_lengths", "block_table")),
        ("table_width", c_int64),
        ("block_size", c_int64),
        ("slots", c_void_p),
    ]


class Batch(Structure):
    """Of program.cpp: one forward's tokens, and where its values go."""

    _fields_ = [
        ("tokens", c_int64),
        ("picks", c_int64),
        *((name, c_void_p) for name in ("ids", "positions", "pick_rows")),
        ("attention", AttentionBatch),
        *((name, c_void_p) for name in ("keys", "values", "arena", "logits", "likeliest")),
    ]
