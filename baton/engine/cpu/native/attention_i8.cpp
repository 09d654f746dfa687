// See parts.h.
#include "attention.h"
#include "parts.h"

const baton::AttentionPart baton::attention_i8 = {
    attention_scratch_bytes, attend<i8>, write_kv<i8>};
