// Fresh memory for large outputs. A new page costs the system a fault, some 0.5 us for 4 KiB: as long as the arithmetic
// that fills it. Asked for in pieces, each a large page where the system has one, the pages of a piece come in one call,
// and the threads bring them in side by side.
#pragma once
#include <cstddef>
#include <cstdint>

#include "parallel.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace omnimamba {

// Brings in the pages under [begin, begin + bytes), all of which the caller is about to overwrite. Changes nothing where
// the memory is small or the system cannot (Linux before 5.14, others).
inline void claim_pages(void* begin, int64_t bytes, int threads) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers do not name
  constexpr uintptr_t piece = uintptr_t{2} << 20;
  const uintptr_t from = reinterpret_cast<uintptr_t>(begin), first = (from + piece - 1) / piece * piece;
  const uintptr_t pieces =
      bytes > 0 && from + bytes > first ? (from + static_cast<uintptr_t>(bytes) - first) / piece : 0;
  if (pieces < 8) return;
  madvise(reinterpret_cast<void*>(first), pieces * piece, MADV_HUGEPAGE);
  parallel_for(threads, static_cast<int64_t>(pieces), [&](int64_t i, int) {
    madvise(reinterpret_cast<void*>(first + static_cast<uintptr_t>(i) * piece), piece, kPopulateWrite);
  });
#else
  (void)begin, (void)bytes, (void)threads;
#endif
}

}  // namespace omnimamba
