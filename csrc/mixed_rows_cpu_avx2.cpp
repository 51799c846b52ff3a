// Kernels of the row-by-row operators for AVX2 and FMA; run only where the processor has it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "mixed_embedding_cpu.h"
#include "mixed_norm_cpu.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define CLP_ISA avx2
#define CLP_WIDTH 8
#include "mixed_rows_cpu_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
