// The kernel around mixed_linear_sm80_mma.cuh: a GPU's instructions for it, and a block's sum over its warps.
#pragma once

#include "mixed_linear_sm80_mma.cuh"

namespace clp {

// One thread of a warp on a GPU.
template <typename T>
struct DeviceWarp {
  static constexpr int kLanes = 1;
  uint64_t policy;
  int members;    // threads that share the ring
  uint32_t ring;  // this lane's first 16 bytes of it

  // Weights are read once per call: evict-first keeps x and the coefficients in L2.
  __device__ __forceinline__ DeviceWarp(const Words* warp_ring, int threads)
      : members(threads), ring(static_cast<uint32_t>(__cvta_generic_to_shared(warp_ring)) + threadIdx.x % 32 * 16) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("" : "+r"(ring));  // computed once, not in every step of the loop
  }
  __device__ __forceinline__ int first_lane() const { return threadIdx.x % members; }
  __device__ __forceinline__ void copy(int, int offset, const T* source, bool inside) const {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(ring + offset),
                 "l"(source), "r"(inside ? 16 : 0), "l"(policy)
                 : "memory");
  }
  // Every block reads x: no hint.
  __device__ __forceinline__ void copy_row(int, int offset, const T* source, bool inside) const {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(ring + offset), "l"(source),
                 "r"(inside ? 16 : 0)
                 : "memory");
  }
  __device__ __forceinline__ Words read(int, int offset) const {
    Words words;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words.element[0]), "=r"(words.element[1]), "=r"(words.element[2]), "=r"(words.element[3])
                 : "r"(ring + offset)
                 : "memory");
    return words;
  }
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // The warps that share their weights: what each has waited for is there for all, and the slot before is free.
  template <class TILE>
  __device__ __forceinline__ void meet() const {
    if constexpr (TILE::kMembers > 1)
      asm volatile("bar.sync %0, %1;" ::"r"(int(1 + threadIdx.x / (32 * TILE::kMembers))), "n"(32 * TILE::kMembers)
                   : "memory");
  }
  __device__ __forceinline__ void join() const { __syncwarp(); }
  template <int PENDING>
  __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
  }
  template <class TILE>
  __device__ __forceinline__ void multiply(Lane<T, TILE> (&lanes)[1], int i, int f, int v, int half) const {
    const uint32_t(&left)[4] = lanes[0].left[i][v][half];
    uint32_t right[2];
    right_operand(lanes[0], f, half, right);
    float(&sum)[4] = lanes[0].sums[i][f];
    if constexpr (std::is_same_v<T, __half>) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
    }
  }
};

__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ float read_in_cluster(const float* shared, int block) {
  float value;
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("{\n.reg .u32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\nld.shared::cluster.f32 %0, [remote];\n}"
               : "=f"(value)
               : "r"(address), "r"(block)
               : "memory");
  return value;
}

// Grid: (kCluster parts of D of each block of kRows rows, blocks of kFeatures features), so that the row blocks of one
// feature run side by side and share its weights in L2. shared_bytes() of dynamic shared memory.
template <typename T, class TILE>
__global__ void __launch_bounds__(TILE::kThreads, TILE::kBlocks)
    mixed_linear_decode_mma(const DecodeArguments<T, T> a) {
  extern __shared__ Words rings[];
  const int block = blockIdx.x % TILE::kCluster, warp = threadIdx.x / (32 * TILE::kMembers);
  const int first_row = blockIdx.x / TILE::kCluster * TILE::kRows;
  const int first_feature = find_first_feature<TILE>(a, blockIdx.y);
  const int streams = int(a.K) + (a.base != nullptr);
  DeviceWarp<T> machine(rings + warp * TILE::warp_words(streams), 32 * TILE::kMembers);
  Lane<T, TILE> lanes[1];
#if __CUDA_ARCH__ >= 900
  // Launched while the kernel before it still runs, of which it may read the results: nothing is read before this.
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
  float* shared = reinterpret_cast<float*>(rings);
  run_warp(machine, a, block * TILE::kWarps + warp, first_row, first_feature, shared, lanes);
  if constexpr (TILE::kCluster == 1) {
    __syncthreads();
    store_results<TILE>(a, threadIdx.x, TILE::kThreads, first_row, first_feature,
                        [&](int part, int i) { return shared[TILE::find_total(part, streams) + i]; });
  } else {
#if __CUDA_ARCH__ >= 900
    wait_for_cluster();
    store_results<TILE>(a, block * 32 * TILE::kWarps + threadIdx.x, 32 * TILE::kWarps * TILE::kCluster, first_row,
                        first_feature, [&](int part, int i) {
                          return read_in_cluster(shared + TILE::find_total(part, streams) + i, part / TILE::kWarps);
                        });
    wait_for_cluster();  // no block's shared memory goes before the others have read it
#endif
  }
}

}  // namespace clp
