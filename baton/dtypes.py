"""What --dtype takes: of weights and computation, or of the weights alone."""

INT8 = "int8"  # bytes, multiplied with rows that are rounded to bytes too, step by step
INT8_WEIGHT_ONLY = "int8_weight_only"  # bytes, multiplied with rows in bf16
FP8 = "fp8"
WEIGHT_DTYPES = (INT8, INT8_WEIGHT_ONLY, FP8)
DTYPES = ("auto", "float32", "bfloat16", "float16", *WEIGHT_DTYPES)
