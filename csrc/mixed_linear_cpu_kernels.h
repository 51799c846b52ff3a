// The kernels of mixed_linear for one instruction set. The including file has set the compiler's target and defines
//   CLP_ISA           name of the set: a namespace, and the suffix of the exported table
//   CLP_WIDTH         floats of a vector
//   CLP_ROWS          rows of weights of a register block of the product (by 2 vectors of rows of x)
//   CLP_F16C          only where the set converts float16
//   CLP_DOT_BF16      only where the set multiplies pairs of bfloat16
// Everything is internal to the translation unit but the table, so that no other one can pick up code that its
// processor lacks.

#define CLP_INLINE_MEMBER inline __attribute__((always_inline))
#define CLP_JOIN_(a, b) a##b
#define CLP_JOIN(a, b) CLP_JOIN_(a, b)

namespace clp {
namespace CLP_ISA {
namespace {

constexpr int kWidth = CLP_WIDTH;
constexpr int kRows = CLP_ROWS;
constexpr int64_t kColumns = 2 * kWidth;

#include "mixed_linear_cpu_vector.h"

#include "mixed_linear_cpu_mix.h"

#include "mixed_linear_cpu_fused_kernels.h"

#include "mixed_linear_cpu_dots.h"

#include "mixed_linear_cpu_panels.h"

#include "mixed_linear_cpu_rows.h"

}  // namespace
}  // namespace CLP_ISA

extern const Kernels CLP_JOIN(kernels_, CLP_ISA);
#ifdef CLP_DOT_BF16
#define CLP_DOTS_TAKE_BF16 true
#else
#define CLP_DOTS_TAKE_BF16 false
#endif

const Kernels CLP_JOIN(kernels_, CLP_ISA) = {
    CLP_ISA::kColumns, CLP_ISA::kRows,  CLP_ISA::kMaxDots,         CLP_DOTS_TAKE_BF16,
    CLP_ISA::widen,    CLP_ISA::narrow, CLP_ISA::even_terms_first, CLP_ISA::mix,
    CLP_ISA::pack,     CLP_ISA::rows,   CLP_ISA::mix_blocks,       CLP_ISA::stage,
    CLP_ISA::block_product, CLP_ISA::turn, CLP_ISA::grad, CLP_ISA::end_streams};

}  // namespace clp
