#include "cpu_pages.h"

#include <algorithm>

#include "mixed_linear_cpu_ops.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace clp {

#ifdef __linux__

void make_pages(const Tensor& result) {
  constexpr int64_t least = 8 << 20, piece = 2 << 20;
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, which headers older than Linux 5.14 have not
  const int64_t bytes = result.numel() * static_cast<int64_t>(result.element_size());
  if (bytes < least) return;
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
  const uintptr_t last = first + static_cast<uintptr_t>(bytes);
  const uintptr_t begin = (first + page - 1) / page * page, end = last / page * page;
  // Advice: a system that refuses it leaves the memory as it was. Once for all: pieces advised by themselves stay so.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  parallel(ceil_div(static_cast<int64_t>(end - begin), piece), piece, [&](int64_t from, int64_t to) {
    const uintptr_t start = begin + from * piece, size = std::min<uintptr_t>(end - start, (to - from) * piece);
    (void)madvise(reinterpret_cast<void*>(start), size, populate_write);
  });
}

#else

void make_pages(const Tensor&) {}

#endif

}  // namespace clp
