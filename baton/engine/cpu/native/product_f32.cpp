// See parts.h.
#include "parts.h"

const baton::ProductPart baton::product_f32 = baton::product_part_of<baton::WeightType::f32>();
