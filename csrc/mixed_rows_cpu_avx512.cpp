// Kernels of the row-by-row operators for AVX-512 (F, BW, VL); run only where the processor has it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "mixed_embedding_cpu.h"
#include "mixed_norm_cpu.h"
#include "mixed_qkv_cpu.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx2,fma,f16c")
#endif

#define CLP_ISA avx512
#define CLP_WIDTH 16
#define CLP_F16C
#include "mixed_rows_cpu_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
