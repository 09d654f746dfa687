// See parts.h.
#include "attention.h"
#include "parts.h"

const baton::AttentionPart baton::attention_f32 = {
    attention_scratch_bytes, attend<float>, write_kv<float>};
