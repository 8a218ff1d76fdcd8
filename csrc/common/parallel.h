// Work shared by OpenMP threads. Each index is done by one thread, whatever their number, so results never depend on it.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "flush.h"
#include "simd.h"

namespace omnimamba {

// body(begin, end, thread) for contiguous parts of [0, count), one part a thread.
template <class Body>
void parallel_parts(int threads, int64_t count, Body&& body) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    FlushTinyResults flush;
    if (count > 0) body(int64_t{0}, count, 0);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  {
    FlushTinyResults flush;
    // The runtime may give fewer threads than asked for.
    int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t begin = count * me / team, end = count * (me + 1) / team;
    if (begin < end) body(begin, end, static_cast<int>(me));
    finish_stores();
  }
#else
  FlushTinyResults flush;
  body(int64_t{0}, count, 0);
#endif
}

// body(i, thread) for i in [0, count).
template <class Body>
void parallel_for(int threads, int64_t count, Body&& body) {
  parallel_parts(threads, count, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; i++) body(i, thread);
  });
}

// The same where indices cost unlike amounts or threads are not alike: each takes the next index when it is done with one.
template <class Body>
void parallel_tasks(int threads, int64_t count, Body&& body) {
  std::atomic<int64_t> next{0};
  parallel_parts(threads, std::min<int64_t>(threads, count), [&](int64_t, int64_t, int thread) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i, thread);
  });
}

}  // namespace omnimamba
