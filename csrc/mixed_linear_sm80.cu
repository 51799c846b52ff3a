// Launcher of the CUDA decode kernel of mixed_linear (sm_80 and later), on the libtorch stable ABI.
//
// A shared object of its own, loaded beside a CUDA build of torch only; it compiles against the headers of any build of
// torch >= 2.10. Forward only. It takes any number of rows and is meant for up to 64, which one pass over the weights
// serves where rows and weights are of one 16-bit dtype. The others (float32, odd sizes) run on the scalar units, and
// every block of 8 rows reads the weights again (from L2). Its schema is in registration.cpp.
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
#include <torch/headeronly/util/shim_utils.h>

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>

#include "mixed_linear_sm80.cuh"
#include "mixed_linear_sm80_mma.cuh"

namespace clp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxGridY = 65535;

struct Operands {
  Tensor x, deltas, coefficients, row_map, y;
  std::optional<Tensor> base, bias, bias_deltas;
  cudaStream_t stream;
};

template <typename T>
const T* read_pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* read_pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? read_pointer<T>(*tensor) : nullptr;
}

dim3 find_grid(int64_t M, int64_t rows, int64_t N, int64_t features) {
  const int64_t row_blocks = (M + rows - 1) / rows, feature_blocks = (N + features - 1) / features;
  STD_TORCH_CHECK(row_blocks <= std::numeric_limits<int32_t>::max() && feature_blocks <= kMaxGridY,
                  "mixed_linear (cuda): ", M, " rows x ", N, " outputs exceed the grid (at most ", kMaxGridY * features,
                  " outputs): use backend='triton'");
  return dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(feature_blocks));
}

template <int ROWS, int FEATURES, bool ALIGNED, typename X, typename W>
void launch(const DecodeArguments<X, W>& arguments, cudaStream_t stream) {
  const dim3 grid = find_grid(arguments.M, ROWS, arguments.N, kWarps * FEATURES);
  mixed_linear_decode<ROWS, FEATURES, ALIGNED><<<grid, kLanes * kWarps, 0, stream>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class TILE, typename T>
void launch_mma(const DecodeArguments<T, T>& arguments, int device, cudaStream_t stream) {
  const dim3 grid = find_grid(arguments.M, TILE::kRows, arguments.N, TILE::kFeatures);
  // Once for each kernel and device; no stream operation, so that it may happen under a graph's capture.
  constexpr int kDevices = 64;
  static std::atomic<bool> is_set[kDevices];
  if (device >= kDevices || !is_set[device].load()) {
    const auto kernel = mixed_linear_decode_mma<T, TILE>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, TILE::kSharedBytes));
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
    if (device < kDevices) is_set[device].store(true);
  }
  mixed_linear_decode_mma<T, TILE><<<grid, kLanes * TILE::kWarps, TILE::kSharedBytes, stream>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename X, typename W>
DecodeArguments<X, W> read_arguments(const Operands& o) {
  return {read_pointer<X>(o.x),           read_pointer<X>(o.base),    read_pointer<W>(o.deltas),
          read_pointer<float>(o.coefficients), read_pointer<int32_t>(o.row_map), read_pointer<X>(o.bias),
          read_pointer<W>(o.bias_deltas), static_cast<X*>(o.y.mutable_data_ptr()),
          o.x.size(0),                    o.deltas.size(0),           o.x.size(1),
          o.deltas.size(1)};
}

template <typename X, typename W>
void launch_typed(const Operands& o) {
  const auto a = read_arguments<X, W>(o);
  // Every choice gives the same bits. 16 rows x 2 features would need 254 registers, 8 x 2 need 128 (sm_80).
  if (a.D % kChunk != 0 || !is_aligned(a.x) || !is_aligned(a.base) || !is_aligned(a.deltas)) {
    launch<4, 1, false>(a, o.stream);
  } else if (a.M == 1) {
    launch<1, 1, true>(a, o.stream);
  } else if (a.M <= 4) {
    launch<4, 1, true>(a, o.stream);
  } else {
    launch<8, 2, true>(a, o.stream);
  }
}

// Whether a layer's calls run on the tensor cores. A property of its weights, never of the rows, whose bits it decides.
bool suits_mma(const Operands& o) {
  const int64_t N = o.deltas.size(0), K = o.deltas.size(1), D = o.deltas.size(2);
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  return D % kChunk == 0 && D > 0 && K > 0 && N >= MmaMany::kFeatures && D * K <= kMax / 8 && N * K <= kMax &&
         is_aligned(o.deltas.const_data_ptr()) && (!o.base.has_value() || is_aligned(o.base->const_data_ptr()));
}

template <typename T>
void launch_one_dtype(Operands& o) {
  if (!suits_mma(o)) return launch_typed<T, T>(o);
  if (!is_aligned(o.x.const_data_ptr())) o.x = torch::stable::clone(o.x);
  const auto a = read_arguments<T, T>(o);
  const int device = o.x.get_device_index();
  // Every choice gives the same bits.
  if (a.M <= MmaFew::kRows) return launch_mma<MmaFew>(a, device, o.stream);
  if (a.M <= MmaSome::kRows) return launch_mma<MmaSome>(a, device, o.stream);
  if (a.M <= MmaMore::kRows) return launch_mma<MmaMore>(a, device, o.stream);
  launch_mma<MmaMany>(a, device, o.stream);
}

template <typename X>
void launch_16_bit(Operands& o) {
  if (o.deltas.scalar_type() == ScalarType::Float) return launch_typed<X, float>(o);
  launch_one_dtype<X>(o);
}

void check_weight(const char* name, const Tensor& weight, const Tensor& x) {
  STD_TORCH_CHECK(weight.is_cuda() && weight.get_device_index() == x.get_device_index(), "mixed_linear (cuda): ", name,
                  " must be on x's device cuda:", x.get_device_index());
  STD_TORCH_CHECK(weight.is_contiguous(), "mixed_linear (cuda): ", name,
                  " must be contiguous (it is never copied): call .contiguous() once, where it is made");
}

void check(const Operands& o) {
  STD_TORCH_CHECK(o.x.is_cuda() && o.x.dim() == 2, "mixed_linear (cuda): x must be a CUDA tensor [M, D], got ", o.x.dim(),
                  " dimensions");
  check_weight("deltas", o.deltas, o.x);
  STD_TORCH_CHECK(o.deltas.dim() == 3 && o.deltas.size(2) == o.x.size(1), "mixed_linear (cuda): deltas must be [N, K, ",
                  o.x.size(1), "] for x [M, ", o.x.size(1), "], got ", o.deltas.dim(), " dimensions, the last of ",
                  o.deltas.size(o.deltas.dim() - 1));
  STD_TORCH_CHECK(o.deltas.scalar_type() == o.x.scalar_type() || o.deltas.scalar_type() == ScalarType::Float,
                  "mixed_linear (cuda): deltas must have x's dtype or float32");
  const int64_t N = o.deltas.size(0), K = o.deltas.size(1);
  if (o.base.has_value()) {
    check_weight("base", *o.base, o.x);
    STD_TORCH_CHECK(o.base->dim() == 2 && o.base->size(0) == N && o.base->size(1) == o.x.size(1),
                    "mixed_linear (cuda): base must be [", N, ", ", o.x.size(1), "] beside these deltas");
    STD_TORCH_CHECK(o.base->scalar_type() == o.x.scalar_type(),
                    "mixed_linear (cuda): base must have x's dtype: cast it once, or use backend='triton'");
  }
  STD_TORCH_CHECK(o.coefficients.is_cuda() && o.coefficients.scalar_type() == ScalarType::Float &&
                      o.coefficients.dim() == 2 && o.coefficients.size(1) == K,
                  "mixed_linear (cuda): coefficients must be a float32 CUDA tensor [S, ", K, "]");
  STD_TORCH_CHECK(o.row_map.is_cuda() && o.row_map.scalar_type() == ScalarType::Int && o.row_map.dim() == 1 &&
                      o.row_map.size(0) == o.x.size(0),
                  "mixed_linear (cuda): row_map must be an int32 CUDA tensor of ", o.x.size(0), " rows");
  STD_TORCH_CHECK(!o.bias.has_value() || (o.bias->is_cuda() && o.bias->numel() == N),
                  "mixed_linear (cuda): bias must be a CUDA tensor [", N, "]");
  STD_TORCH_CHECK(!o.bias_deltas.has_value() || (o.bias_deltas->is_cuda() && o.bias_deltas->numel() == N * K),
                  "mixed_linear (cuda): bias_deltas must be a CUDA tensor [", N, ", ", K, "]");
}

std::optional<Tensor> as_small(const std::optional<Tensor>& tensor, ScalarType dtype) {
  if (!tensor.has_value()) return std::nullopt;
  return torch::stable::contiguous(torch::stable::to(*tensor, dtype));
}

// The op clp::mixed_linear_cuda_fwd. x, coefficients, row_map and the bias terms may be strided; they are small.
Tensor mixed_linear_cuda_fwd(Tensor x, std::optional<Tensor> base, Tensor deltas, Tensor coefficients, Tensor row_map,
                             std::optional<Tensor> bias, std::optional<Tensor> bias_deltas) {
  Operands o{x, deltas, coefficients, row_map, x, base, bias, bias_deltas, nullptr};
  check(o);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  o.stream = static_cast<cudaStream_t>(stream);
  o.x = torch::stable::contiguous(x);
  o.coefficients = torch::stable::contiguous(coefficients);
  o.row_map = torch::stable::contiguous(row_map);
  o.bias = as_small(bias, x.scalar_type());
  o.bias_deltas = as_small(bias_deltas, deltas.scalar_type());
  o.y = torch::stable::new_empty(x, {x.size(0), deltas.size(0)});
  if (o.y.numel() == 0) return o.y;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      launch_typed<float, float>(o);
      break;
    case ScalarType::BFloat16:
      launch_16_bit<__nv_bfloat16>(o);
      break;
    case ScalarType::Half:
      launch_16_bit<__half>(o);
      break;
    default:
      STD_TORCH_CHECK(false, "mixed_linear (cuda): x must be float32, bfloat16 or float16");
  }
  return o.y;
}

}  // namespace
}  // namespace clp

STABLE_TORCH_LIBRARY_IMPL(clp, CUDA, library) {
  library.impl("mixed_linear_cuda_fwd", TORCH_BOX(&clp::mixed_linear_cuda_fwd));
}
