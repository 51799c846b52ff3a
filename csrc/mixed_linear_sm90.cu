// Launcher of the Hopper kernel of mixed_linear (compute capability 9.0 alone), on the libtorch stable ABI.
//
// bfloat16 rows, a bfloat16 base or none, deltas of bfloat16 or float32, up to kMaxCopies of them. What they do not take
// is refused; clp_kernels/mixed_linear_cuda.py asks before. Its schema is in registration.cpp.
#ifndef USE_CUDA
#define USE_CUDA  // declares the CUDA entries of the stable shim, which the CPU build's headers hide
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "mixed_linear_sm90.cuh"

namespace clp::sm90 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxCopies = 4, kMaxSize = INT32_MAX, kMaxGridY = 65535;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

decltype(&cuTensorMapEncodeTiled) find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
  STD_TORCH_CHECK(function != nullptr, "mixed_linear (cuda): the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// Describes a tensor to the copy engine, innermost dimension first. Boxes are 128 bytes wide; outside is zero.
CUtensorMap describe_tensor(const char* name, const Tensor& tensor, std::initializer_list<int> dims,
                            std::initializer_list<uint32_t> box) {
  static const auto encode = find_encoder();
  const bool is_float = tensor.scalar_type() == ScalarType::Float;
  const uint64_t size = is_float ? 4 : 2;
  const auto rank = static_cast<uint32_t>(dims.size());
  cuuint64_t sizes[3], strides[2];
  const uint32_t steps[3] = {1, 1, 1};
  int i = 0;
  for (const int dim : dims) {
    sizes[i] = tensor.size(dim);
    if (i > 0) strides[i - 1] = tensor.stride(dim) * size;
    ++i;
  }
  STD_TORCH_CHECK(tensor.stride(*dims.begin()) == 1, "mixed_linear (cuda): the last dimension of ", name,
                  " must be contiguous");
  CUtensorMap map;
  const CUresult result =
      encode(&map, is_float ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank,
             const_cast<void*>(tensor.const_data_ptr()), sizes, strides, box.begin(), steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "mixed_linear (cuda): ", name,
                  " must begin at a multiple of 16 bytes and have strides of such (cuTensorMapEncodeTiled: ",
                  static_cast<int>(result), "); use backend='triton'");
  return map;
}

// Once for each kernel and device; no stream operation, so that it may happen under a graph's capture.
template <auto KERNEL, int BYTES>
void allow_shared_memory(int device) {
  constexpr int kDevices = 64;
  static std::atomic<bool> is_set[kDevices];
  if (device < kDevices && is_set[device].load()) return;
  STD_CUDA_CHECK(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
  if (device < kDevices) is_set[device].store(true);
}

// Blocks along one dimension: an even number, for clusters of two.
unsigned count_blocks(int64_t size, int64_t tile) { return static_cast<unsigned>((size + 2 * tile - 1) / (2 * tile) * 2); }

struct Product {
  CUtensorMap a, base, deltas;
  SegmentArguments arguments;
  int device;
  cudaStream_t stream;
  bool has_base, exact, transposed;
};

template <typename W, int K, bool HAS_BASE, bool EXACT, bool TRANSPOSED>
void launch_product(const Product& p) {
  constexpr auto kKernel = mixed_linear_segments<W, K, HAS_BASE, EXACT, TRANSPOSED>;
  constexpr int kBytes = sizeof(Shared<Rings<W, K, HAS_BASE, EXACT>>);
  allow_shared_memory<kKernel, kBytes>(p.device);
  const dim3 grid(count_blocks(p.arguments.M, kTileRows), count_blocks(p.arguments.O, kTileOuts));
  kKernel<<<grid, kThreads, kBytes, p.stream>>>(p.a, p.base, p.deltas, p.arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename W, int K, bool HAS_BASE, bool EXACT>
void launch_direction(const Product& p) {
  if (p.transposed) return launch_product<W, K, HAS_BASE, EXACT, true>(p);
  launch_product<W, K, HAS_BASE, EXACT, false>(p);
}

template <typename W, int K>
void launch_form(const Product& p) {
  if (p.has_base && p.exact) return launch_direction<W, K, true, true>(p);
  if (p.has_base) return launch_direction<W, K, true, false>(p);
  if (p.exact) return launch_direction<W, K, false, true>(p);
  launch_direction<W, K, false, false>(p);
}

template <typename W>
void launch_copies(const Product& p, int64_t K) {
  if (K == 1) return launch_form<W, 1>(p);
  if (K == 2) return launch_form<W, 2>(p);
  if (K == 3) return launch_form<W, 3>(p);
  launch_form<W, 4>(p);
}

void check_rows(const char* name, const Tensor& rows) {
  STD_TORCH_CHECK(rows.is_cuda() && rows.dim() == 2 && rows.scalar_type() == ScalarType::BFloat16,
                  "mixed_linear (cuda): ", name, " must be a bfloat16 CUDA matrix");
  STD_TORCH_CHECK(rows.size(0) <= kMaxSize && rows.size(1) <= kMaxSize, "mixed_linear (cuda): ", name,
                  " has more than 2^31 - 1 rows or columns: use backend='triton'");
}

void check_weightings(const Tensor& coefficients, const Tensor& row_map, int64_t M, int64_t K) {
  STD_TORCH_CHECK(coefficients.is_cuda() && coefficients.scalar_type() == ScalarType::Float && coefficients.dim() == 2 &&
                      coefficients.size(1) == K,
                  "mixed_linear (cuda): coefficients must be a float32 CUDA tensor [S, ", K, "]");
  STD_TORCH_CHECK(row_map.is_cuda() && row_map.scalar_type() == ScalarType::Int && row_map.dim() == 1 &&
                      row_map.size(0) == M,
                  "mixed_linear (cuda): row_map must be an int32 CUDA tensor of ", M, " rows");
}

void check_weight(const char* name, const Tensor& weight, const Tensor& rows, bool takes_float) {
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(weight.is_cuda() && weight.get_device_index() == rows.get_device_index(), "mixed_linear (cuda): ", name,
                  " must be on device cuda:", rows.get_device_index());
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || (takes_float && dtype == ScalarType::Float), "mixed_linear (cuda): ",
                  name, " must be bfloat16", takes_float ? " or float32" : "");
}

std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor, ScalarType dtype) {
  if (!tensor.has_value()) return std::nullopt;
  return torch::stable::contiguous(torch::stable::to(*tensor, dtype));
}

// The op clp::mixed_linear_sm90_product: a (base + sum_k c_k delta_k)^T + bias terms, or without ^T and bias.
Tensor mixed_linear_sm90_product(Tensor a, std::optional<Tensor> base, Tensor deltas, Tensor coefficients,
                                 Tensor row_map, std::optional<Tensor> bias, std::optional<Tensor> bias_deltas,
                                 bool transposed, bool exact_delta) {
  check_rows("x", a);
  check_weight("deltas", deltas, a, true);
  STD_TORCH_CHECK(deltas.dim() == 3 && deltas.size(transposed ? 0 : 2) == a.size(1),
                  "mixed_linear (cuda): deltas must be [N, K, D] beside rows of ", a.size(1));
  const int64_t N = deltas.size(0), K = deltas.size(1), D = deltas.size(2), M = a.size(0);
  STD_TORCH_CHECK(K >= 1 && K <= kMaxCopies, "mixed_linear (cuda): ", K, " copies; the Hopper kernel takes 1 to ",
                  kMaxCopies);
  if (base.has_value()) {
    check_weight("base", *base, a, false);
    STD_TORCH_CHECK(base->dim() == 2 && base->size(0) == N && base->size(1) == D, "mixed_linear (cuda): base must be [", N,
                    ", ", D, "] beside these deltas");
  }
  check_weightings(coefficients, row_map, M, K);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const int64_t O = transposed ? D : N;
  STD_TORCH_CHECK(!bias.has_value() || (bias->is_cuda() && bias->numel() == O), "mixed_linear (cuda): bias must be a CUDA ",
                  "tensor [", O, "]");
  STD_TORCH_CHECK(!bias_deltas.has_value() || (bias_deltas->is_cuda() && bias_deltas->numel() == O * K),
                  "mixed_linear (cuda): bias_deltas must be a CUDA tensor [", O, ", ", K, "]");
  STD_TORCH_CHECK((O + kTileOuts - 1) / kTileOuts < kMaxGridY, "mixed_linear (cuda): ", O,
                  " outputs exceed the grid: use backend='triton'");
  Tensor out = torch::stable::new_empty(a, {M, O});
  if (out.numel() == 0) return out;
  const bool is_float = deltas.scalar_type() == ScalarType::Float;
  bias = as_contiguous(bias, ScalarType::BFloat16);
  bias_deltas = as_contiguous(bias_deltas, deltas.scalar_type());
  Product p;
  p.a = describe_tensor(transposed ? "dy" : "x", a, {1, 0}, {kTileReduced, kTileRows / kClusterOuts});
  p.deltas = describe_tensor("deltas", deltas, {2, 1, 0}, {is_float ? 32u : 64u, 1, 64});
  p.base = base.has_value() ? describe_tensor("base", *base, {1, 0}, {64, 64}) : p.a;
  p.arguments = {static_cast<const float*>(coefficients.const_data_ptr()),
                 static_cast<const int32_t*>(row_map.const_data_ptr()),
                 bias.has_value() ? bias->const_data_ptr() : nullptr,
                 bias_deltas.has_value() ? bias_deltas->const_data_ptr() : nullptr,
                 out.mutable_data_ptr(),
                 static_cast<int>(M),
                 static_cast<int>(O),
                 static_cast<int>(a.size(1)),
                 static_cast<int>(coefficients.stride(0)),
                 static_cast<int>(coefficients.stride(1)),
                 static_cast<int>(row_map.stride(0))};
  p.device = a.get_device_index();
  p.stream = current_stream(a);
  p.has_base = base.has_value(), p.exact = exact_delta, p.transposed = transposed;
  if (is_float)
    launch_copies<float>(p, K);
  else
    launch_copies<Row>(p, K);
  return out;
}

}  // namespace
}  // namespace clp::sm90

STABLE_TORCH_LIBRARY_IMPL(clp, CUDA, library) {
  library.impl("mixed_linear_sm90_product", TORCH_BOX(&clp::sm90::mixed_linear_sm90_product));
}
