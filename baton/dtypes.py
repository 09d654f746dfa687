"""Values of --dtype: for weights and computation, or for the weights only; and of --kv-cache-dtype."""

from baton.errors import InputError

INT8 = "int8"  # activations are quantized to int8 in each step, too
INT8_WEIGHT_ONLY = "int8_weight_only"  # activations stay in bf16
FP8 = "fp8"
WEIGHT_DTYPES = (INT8, INT8_WEIGHT_ONLY, FP8)
KV_DTYPES = ("auto", INT8)
"""Values of --kv-cache-dtype. auto: that of the computation, bfloat16 where only weights are narrower."""
DTYPES = ("auto", "float32", "bfloat16", "float16", *WEIGHT_DTYPES)


def refuse_narrow_kv(kv_dtype: str, ranks: int) -> None:
    """InputError for a KV cache that several ranks do not share."""
    if kv_dtype != "auto" and ranks > 1:
        raise InputError(
            f"--kv-cache-dtype {kv_dtype} and --tensor-parallel-size {ranks} do not go together yet: "
            "leave one of the two out"
        )
