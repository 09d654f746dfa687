// See parts.h.
#include "attention.h"
#include "parts.h"

const baton::AttentionPart baton::attention_bf16 = {
    attention_scratch_bytes, attend<bf16>, write_kv<bf16>};
