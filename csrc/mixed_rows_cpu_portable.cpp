// Kernels of the row-by-row operators in the compiler's default instruction set (SSE2 on x86-64, NEON on aarch64).
#include "mixed_embedding_cpu.h"
#include "mixed_norm_cpu.h"
#include "mixed_qkv_cpu.h"

#define CLP_ISA portable
#define CLP_WIDTH 4
#include "mixed_rows_cpu_kernels.h"
