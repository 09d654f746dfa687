// See parts.h.
#include "gemm_blocks.h"
#include "parts.h"

const baton::ProductPart baton::product_q4 = baton::product_part_of<baton::WeightType::q4>();
