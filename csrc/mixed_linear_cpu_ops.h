// What the CPU operators of mixed_linear share: tensors to plain pointers, scratch memory, threads, torch's product.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <functional>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_call.h"
#include "cpu_gemm.h"
#include "mixed_linear_cpu_plan.h"

namespace clp {

using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// Runs body(begin, end) over [0, size) in torch's thread pool; on the calling thread alone where all of it, `size`
// items of `work` multiply-adds (or bytes of memory), is not worth waking others: that costs a few microseconds.
template <typename Body>
void parallel(int64_t size, int64_t work, const Body& body) {
  constexpr int64_t kGrain = 200000;
  const int64_t grain = kGrain / (work > 0 ? work : 1) + 1;
  if (size <= grain || num_threads() == 1) {
    if (size > 0) body(int64_t{0}, size);
    return;
  }
  torch::stable::parallel_for(0, size, grain, body);
}

// The tensor itself where it is contiguous: asking the dispatcher costs a microsecond.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Floats from torch's allocator, which counts them; on a cache line's boundary, not initialised. Null for a size of 0.
class Scratch {
 public:
  explicit Scratch(int64_t size = 0);
  float* get() const { return data_; }

 private:
  std::optional<Tensor> tensor_;
  float* data_ = nullptr;
};

// The same for each thread of a parallel section. Few lie in the object itself: a tensor costs a small call a third of a
// microsecond.
class ThreadScratch {
 public:
  explicit ThreadScratch(int64_t size)
      : size_(ceil_div(size, 16) * 16), threads_(num_threads()), all_(is_small() ? 0 : size_ * threads_) {}
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;
  float* get() const {
    if (size_ == 0) return nullptr;
    uint32_t thread = 0;
    TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
    return (is_small() ? const_cast<float*>(few_) : all_.get()) + thread * size_;
  }

 private:
  static constexpr int64_t kFew = 4096;
  bool is_small() const { return size_ * threads_ <= kFew; }

  int64_t size_, threads_;
  Scratch all_;
  alignas(64) float few_[kFew];
};

Dtype dtype_of(const Tensor& tensor, const char* name);

// Values of a tensor in memory.
struct Array {
  const void* data;
  Dtype dtype;

  bool is_float() const { return dtype == Dtype::f32; }
  const float* floats() const { return static_cast<const float*>(data); }
};

// `rows` as a contiguous tensor, checked to be [M, width] on the CPU.
Tensor contiguous_rows(const Tensor& rows, const char* name, int64_t M, int64_t width);

inline Array array_of(const Tensor& tensor, const char* name) {
  return {tensor.const_data_ptr(), dtype_of(tensor, name)};
}

// A small tensor of `size` elements as floats; empty for none.
std::vector<float> to_floats(const std::optional<Tensor>& tensor, const char* name, int64_t size);

// The floats of a buffer that the gradient of deltas [N, K, D] is added to, checked to be one.
float* main_grad_floats(const Tensor& main_grad, int64_t N, int64_t K, int64_t D);

const Kernels& kernels_in_use();

// Bytes of a gradient, at least, that is written past the caches: nothing reads it before all of it is there.
// mixed_linear's, 512 rows, 2048 x 2048, two Xeon threads, ms, and through the caches: bfloat16 K = 4 6.1 (9.8), float32
// K = 2 19.7 (22.8), K = 4 20.1 (28.2).
constexpr int64_t kPastCaches = 8 << 20;

constexpr int64_t kLine = 64;  // bytes of a cache's line

// The checked weights, coefficients and row map of a call; keeps contiguous copies alive where they were needed.
class MixedLinearArgs {
 public:
  // M: rows, where there is no row map.
  MixedLinearArgs(const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
                  const std::optional<Tensor>& row_map, int64_t M = 0);

  Weights weights;
  int64_t M, S;
  const float* c;            // [S, K]
  const int32_t* row_map;    // [M]

  const float* coefficients(int64_t row) const { return c + row_map[row] * weights.K; }

 private:
  std::optional<Tensor> base_, row_map_;
  Tensor deltas_, c_;
  std::vector<int32_t> made_map_;
};

// The bias terms of the forward; empty where there are none.
struct Bias {
  std::vector<float> bias, bias_deltas;

  // out[n - n0] = bias[n] + sum_k c[k] bias_deltas[n, k]
  void mix(const float* c, int64_t K, int64_t n0, int64_t n1, float* out) const;
};

// y by the own kernel: streams each for itself (mixed = false), or the mix of each segment.
void run_rows(const MixedLinearArgs& args, const Plan& plan, const Mixes& mixes, bool mixed, const Array& x,
              const Bias& bias, void* y, Dtype y_dtype);

struct TileKernels;

// Kernels that multiply tiles of bfloat16, where the instruction set in use has such; else null.
const TileKernels* tile_kernels_in_use();

// y, bfloat16 as x, by these kernels: streams each for itself.
void run_tiles(const TileKernels& kernels, const MixedLinearArgs& args, const Mixes& mixes, const Array& x,
               const Bias& bias, void* y);

// One product of a sum over streams: the mix of a segment, or one stream with its coefficient on the rows.
struct Term {
  Mix mix;
  int64_t row_scale;         // copy whose coefficient multiplies each row; -1: none
};

// A tile of results: places [m0, m1) in the order of work, columns [j0, j1).
struct Tile {
  int64_t m0, m1, j0, j1;
  float* data;
  int64_t step;
};

// torch's product, the own one, or tiles (bfloat16 rows, mixed).
enum class Way { torch, fused, tiles };

// out[m, j] = sum over terms of <a_m, column j of the term>; a term is [N, D], transposed for the gradient of x. Each
// segment of rows has terms of its own: segment g the terms from g * terms_each.
struct Product {
  const MixedLinearArgs& args;
  const Plan& plan;
  Array a;                   // [M, length]
  bool transposed;
  Way way;
  std::vector<Segment> segments;
  std::vector<Term> terms;
  int64_t terms_each;
  float* out;                // [M, columns], for rows in their own order; null: tiles lie in scratch memory
  std::function<void(const Tile&)> finish;  // called with each tile of final sums, by any thread; or empty
  bool is_exact = true;      // tiles: base and mix of copies not rounded as one bfloat16

  int64_t length() const { return transposed ? args.weights.N : args.weights.D; }
  int64_t columns() const { return transposed ? args.weights.D : args.weights.N; }
};

void run_product(const Product& product);
void run_fused(const Product& product);

// The gradient of the deltas, [N, K, D], and of the coefficients.
struct DeltasGradient {
  const MixedLinearArgs& args;
  const Plan& plan;
  Array dy, x;               // [M, N], [M, D]
  float* floats = nullptr;   // where the deltas' goes: float32, which is added to where `add`; or, rounded, the deltas'
  bool add = false;          // dtype; or nowhere
  void* rounded = nullptr;
  bool by_copy = false;      // one product of all rows for each copy, instead of one for each segment; no d_c
  double* d_c = nullptr;     // [S, K], added to; or null

  int64_t bytes() const { return args.weights.N * args.weights.K * args.weights.D * (floats ? 4 : 2); }
};

// In own blocks, whose bits do not depend on the threads.
void run_fused_gradient(const DeltasGradient& job);

struct TileProductKernels;

// Kernels that multiply tiles of bfloat16, as tile_kernels_in_use.
const TileProductKernels* tile_products_in_use();

// bfloat16s that a weight takes: the base's, and those of the mix of copies beside it. Alone, the mix takes two. One for
// both, where that is not to be exact and the base is one itself.
int64_t tile_parts(const Weights& weights, bool is_exact);

void run_tile_product(const TileProductKernels& kernels, const Product& product);

// Writes y, whose N columns follow x's rows. x, c and row_map are contiguous, and of any rank.
void mixed_linear_cpu_fwd(const Tensor& x, const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
                          const std::optional<Tensor>& row_map, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& bias_deltas, bool batch_invariant, bool exact_delta,
                          const Tensor& y);

// Checks that the arguments fit, and returns y [..., N]: coefficients [S, K] with a row map of x's leading sizes, or
// [..., K] whose leading sizes are the first of x's.
Tensor mixed_linear_cpu_call(const Tensor& x, const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
                             const std::optional<Tensor>& row_map, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& bias_deltas, bool batch_invariant, bool exact_delta);

Tensor mixed_linear_cpu_backward_x(const Tensor& dy, const std::optional<Tensor>& base, const Tensor& deltas,
                                   const Tensor& c, const Tensor& row_map, bool batch_invariant, bool exact_delta);

// The gradients of the deltas [N, K, D] and of the coefficients [S, K]; an empty tensor for one that is not needed.
// Where main_grad is given, the deltas' gradient is added to it in float32, and the tensor returned for it is empty.
std::tuple<Tensor, Tensor> mixed_linear_cpu_backward_deltas(const Tensor& dy, const Tensor& x, const Tensor& deltas,
                                                            const Tensor& c, const Tensor& row_map, bool needs_deltas,
                                                            bool needs_coefficients,
                                                            const std::optional<Tensor>& main_grad,
                                                            bool batch_invariant);

}  // namespace clp
