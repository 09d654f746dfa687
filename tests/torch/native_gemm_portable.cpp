// The same with no instruction by name.
#undef __AVX__
#undef __AVX2__
#undef __AVX512F__
#undef __AVX512BF16__
#undef __AVX512VNNI__
#undef __AVXVNNI__
#include "native_gemm.cpp"
