// The kernels of mixed_linear_logprob for one instruction set. The including file has set the compiler's target and
// defines CLP_ISA, CLP_WIDTH and, where the set converts float16, CLP_F16C, as for mixed_linear_cpu_kernels.h; all but
// the table is internal for the same reason.

#define CLP_JOIN_(a, b) a##b
#define CLP_JOIN(a, b) CLP_JOIN_(a, b)

namespace clp::logprob {
namespace CLP_ISA {
namespace {

constexpr int kWidth = CLP_WIDTH;
static_assert(kLanes % kWidth == 0, "places are whole vectors");

#include "mixed_linear_cpu_vector.h"

#include "mixed_linear_logprob_cpu_math.h"

#include "mixed_linear_logprob_cpu_places.h"

}  // namespace
}  // namespace CLP_ISA

extern const LogprobKernels CLP_JOIN(logprob_kernels_, CLP_ISA);
const LogprobKernels CLP_JOIN(logprob_kernels_, CLP_ISA) = {
    CLP_ISA::forward,    CLP_ISA::backward, CLP_ISA::sum_tokens,
    CLP_ISA::sum_places, CLP_ISA::weigh,    CLP_ISA::evaluate};

}  // namespace clp::logprob
