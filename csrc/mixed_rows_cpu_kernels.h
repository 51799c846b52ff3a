// The kernels of the row-by-row operators, mixed_embedding, mixed_norm and mixed_qkv's rotation, for one instruction
// set. The including file has set the compiler's target and defines
//   CLP_ISA     name of the set: a namespace, and the suffix of the exported tables
//   CLP_WIDTH   floats of a vector
//   CLP_F16C    only where the set converts float16
// Everything is internal to the translation unit but the tables, so that no other one can pick up code that its
// processor lacks. They use no bfloat16 instructions: avx512_bf16 runs the tables of avx512.

#define CLP_INLINE_MEMBER inline __attribute__((always_inline))
#define CLP_JOIN_(a, b) a##b
#define CLP_JOIN(a, b) CLP_JOIN_(a, b)

namespace clp {
namespace CLP_ISA {
namespace {

constexpr int kWidth = CLP_WIDTH;

#include "mixed_linear_cpu_vector.h"

#include "mixed_rows_cpu_vector.h"

#include "mixed_embedding_cpu_kernels.h"

#include "mixed_norm_cpu_kernels.h"

#include "mixed_qkv_cpu_kernels.h"

}  // namespace
}  // namespace CLP_ISA

extern const EmbeddingKernels CLP_JOIN(embedding_kernels_, CLP_ISA);
const EmbeddingKernels CLP_JOIN(embedding_kernels_, CLP_ISA) = {CLP_ISA::embed, CLP_ISA::embed_grad};

extern const NormKernels CLP_JOIN(norm_kernels_, CLP_ISA);
const NormKernels CLP_JOIN(norm_kernels_, CLP_ISA) = {CLP_ISA::norm, CLP_ISA::norm_grad};

extern const RotaryKernels CLP_JOIN(rotary_kernels_, CLP_ISA);
const RotaryKernels CLP_JOIN(rotary_kernels_, CLP_ISA) = {CLP_ISA::rotate};

}  // namespace clp
