// Rows that the next head will touch come near while this head computes, one row a call: many at once would fill the
// queue of misses and stall the arithmetic. A call goes before each stretch of a few hundred multiply-adds.
#pragma once
#include <initializer_list>

#include "states.h"

namespace omnimamba::ssd {

class Ahead {
 public:
  // tensors: (b, l, h, p), of elements of `size` bytes; the absent ones are passed over, and the last head has no next.
  Ahead(const SsdScanParams& q, const Unit& u, int64_t size, std::initializer_list<const View*> tensors)
      : rows_(u.h + 1 < q.heads ? u.chunk.length : 0), bytes_(q.headdim * size) {
    for (const View* v : tensors) {
      if (!*v) continue;
      const int64_t first = u.b * v->stride[0] + u.chunk.start * v->stride[1] + (u.h + 1) * v->stride[2];
      streams_[count_++] = {static_cast<const char*>(v->data) + first * size, v->stride[1] * size};
    }
  }
  OM_INLINE void row() {
    if (rows_ == 0) return;
    rows_--;
    for (int i = 0; i < count_; i++) {
      for (int64_t at = 0; at < bytes_; at += 64) __builtin_prefetch(streams_[i].row + at, 0, 2);
      streams_[i].row += streams_[i].step;
    }
  }

 private:
  struct Stream {
    const char* row;
    int64_t step;
  };
  Stream streams_[3] = {};
  int rows_, count_ = 0;
  int64_t bytes_;
};

}  // namespace omnimamba::ssd
