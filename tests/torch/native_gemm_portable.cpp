// The same as a CPU without these instructions has it.
#undef __AVX512F__
#undef __AVX512BF16__
#undef __AVX512VNNI__
#include "native_gemm.cpp"
