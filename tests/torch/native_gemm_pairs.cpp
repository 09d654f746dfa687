// The same as a CPU has it that multiplies two bf16 at once, and as fast as floats.
#undef __AVX512FP16__
#include "native_gemm.cpp"
