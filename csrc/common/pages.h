// Fresh memory for large outputs. A new 4 KiB page costs the kernel a fault of its own, some 0.5 us: as long as the
// arithmetic that fills it. Huge pages, where the system grants them, cost one fault for 2 MiB.
#pragma once
#include <cstddef>
#include <cstdint>

#include "parallel.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace omnimamba {

// Asks for huge pages under [begin, begin + bytes), all of which the caller is about to overwrite, and has the threads
// bring them in side by side. Changes nothing where the memory is small or the system has no such pages.
inline void claim_pages(void* begin, int64_t bytes, int threads) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t from = reinterpret_cast<uintptr_t>(begin), first = (from + page - 1) / page * page;
  const uintptr_t pages = bytes > 0 && from + bytes > first ? (from + static_cast<uintptr_t>(bytes) - first) / page : 0;
  if (pages < 8 || madvise(reinterpret_cast<void*>(first), pages * page, MADV_HUGEPAGE) != 0) return;
  parallel_for(threads, static_cast<int64_t>(pages), [&](int64_t i, int) {
    *reinterpret_cast<volatile char*>(first + static_cast<uintptr_t>(i) * page) = 0;
  });
#else
  (void)begin, (void)bytes, (void)threads;
#endif
}

}  // namespace omnimamba
