#include "cpu_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace clp {

#ifdef __linux__

void make_pages(void* data, int64_t bytes) {
  constexpr int64_t least = 1 << 20;
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, which headers older than Linux 5.14 have not
  if (bytes < least) return;
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(data), end = first + static_cast<uintptr_t>(bytes);
  const uintptr_t begin = (first + page - 1) / page * page, size = end / page * page - begin;
  // Advice: a system that refuses it leaves the memory as it was.
  (void)madvise(reinterpret_cast<void*>(begin), size, MADV_HUGEPAGE);
  (void)madvise(reinterpret_cast<void*>(begin), size, populate_write);
}

#else

void make_pages(void*, int64_t) {}

#endif

}  // namespace clp
