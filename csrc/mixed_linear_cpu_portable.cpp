// Kernels in the compiler's default instruction set (SSE2 on x86-64, NEON on aarch64).
#include "mixed_linear_cpu.h"

#define CLP_ISA portable
#define CLP_WIDTH 4
#define CLP_ROWS 6
#include "mixed_linear_cpu_kernels.h"
