#include "cpu_features.h"

#include <atomic>
#include <stdexcept>

#include "cpu_amx.h"

#ifdef CLP_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace clp {

namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx_bf16};
constexpr int kBest = -1;
std::atomic<int> requested{kBest};

// Whether the processor multiplies tiles of bfloat16 and Linux, which is asked once for all threads, permits it.
bool has_amx() {
#ifdef CLP_AMX
  constexpr unsigned kLeaf = 7, kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx = 0;
  if (!__get_cpuid_count(kLeaf, 0, &eax, &ebx, &ecx, &edx)) return false;
  return (edx & kBf16) && (edx & kTiles) && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
#if defined(__x86_64__)
  // __builtin_cpu_supports asks cpuid, and xgetbv for what the operating system saves.
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return Isa::portable;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl")) {
    return Isa::avx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  return has_amx() ? Isa::amx_bf16 : Isa::avx512_bf16;
#else
  return Isa::portable;
#endif
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa current_isa() {
  const int isa = requested.load(std::memory_order_relaxed);
  return isa == kBest ? best_isa() : static_cast<Isa>(isa);
}

void set_isa(const std::string& name) {
  if (name == "best") {
    requested.store(kBest, std::memory_order_relaxed);
    return;
  }
  for (const Isa isa : kAll) {
    if (name != isa_name(isa)) continue;
    if (isa > best_isa()) {
      throw std::invalid_argument("this processor lacks " + name + "; its best is " + isa_name(best_isa()));
    }
    requested.store(static_cast<int>(isa), std::memory_order_relaxed);
    return;
  }
  throw std::invalid_argument("unknown instruction set '" + name +
                              "'; one of portable, avx2, avx512, avx512_bf16, amx_bf16, best");
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx_bf16:
      return "amx_bf16";
  }
  return "unknown";
}

}  // namespace clp
