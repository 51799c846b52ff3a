// The kernels of mixed_linear for one instruction set. The including file has set the compiler's target and defines
//   CLP_ISA           name of the set: a namespace, and the suffix of the exported table
//   CLP_WIDTH         floats of a vector
//   CLP_ROWS          rows of a register block of the panel product (by 2 vectors)
//   CLP_STREAM_ROWS   rows of a register block of the streaming product (by 3 streams): 4 or 8
//   CLP_DOT_BF16      only where the set multiplies pairs of bfloat16
// Everything is internal to the translation unit but the table, so that no other one can pick up code that its processor lacks.

#define CLP_INLINE_MEMBER inline __attribute__((always_inline))
#define CLP_JOIN_(a, b) a##b
#define CLP_JOIN(a, b) CLP_JOIN_(a, b)

namespace clp {
namespace CLP_ISA {
namespace {

constexpr int kWidth = CLP_WIDTH;
constexpr int kRows = CLP_ROWS;
constexpr int kStreamRows = CLP_STREAM_ROWS;

#include "mixed_linear_cpu_vector.h"

#include "mixed_linear_cpu_gemm.h"

#include "mixed_linear_cpu_grad.h"

#include "mixed_linear_cpu_stream.h"

}  // namespace
}  // namespace CLP_ISA

extern const Kernels CLP_JOIN(kernels_, CLP_ISA);
const Kernels CLP_JOIN(kernels_, CLP_ISA) = {CLP_ISA::kColumns, CLP_ISA::kRows, CLP_ISA::kStreamRows,
                                             CLP_ISA::stream,   CLP_ISA::gemm,           CLP_ISA::grad};

}  // namespace clp
