"""Values of --dtype: for weights and computation, or for the weights only."""

INT8 = "int8"  # activations are quantized to int8 in each step, too
INT8_WEIGHT_ONLY = "int8_weight_only"  # activations stay in bf16
FP8 = "fp8"
WEIGHT_DTYPES = (INT8, INT8_WEIGHT_ONLY, FP8)
DTYPES = ("auto", "float32", "bfloat16", "float16", *WEIGHT_DTYPES)
