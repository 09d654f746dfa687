// The same as a CPU has it that multiplies two bf16 at once, and as fast as floats; and bytes as one with AVX-512
// but no VNNI.
#undef __AVX512FP16__
#undef __AVX512VNNI__
#include "native_gemm.cpp"
