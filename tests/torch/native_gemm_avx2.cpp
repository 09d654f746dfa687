// The same as a CPU without AVX-512 has it.
#undef __AVX512F__
#undef __AVX512BF16__
#undef __AVX512VNNI__
#undef __AVXVNNI__
#include "native_gemm.cpp"
