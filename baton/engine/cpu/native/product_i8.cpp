// See parts.h.
#include "gemm_instructions.h"
#include "parts.h"

const baton::ProductPart baton::product_i8 = baton::product_part_of<baton::WeightType::i8>();
