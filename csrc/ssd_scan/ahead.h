// Rows that a thread will touch next come near while it computes, one row a call: many at once would fill the queue of
// misses and stall the arithmetic. A call goes before each stretch of a few hundred multiply-adds.
#pragma once
#include "states.h"

namespace omnimamba::ssd {

class Ahead {
 public:
  // `rows` rows of `bytes` bytes, one every `step` bytes.
  void add(const void* first, int64_t step, int64_t bytes, int rows) {
    streams_[count_++] = {static_cast<const char*>(first), step, bytes, rows};
  }
  // A unit's rows of a tensor (b, l, h, p) of elements T; none if the tensor is absent.
  template <class T>
  void add(const View& v, const Unit& u, int64_t p) {
    constexpr int64_t size = sizeof(T);
    if (v) add(v.at<T>(u.b, u.chunk.start, u.h), v.stride[1] * size, p * size, u.chunk.length);
  }
  OM_INLINE void row() {
    for (int i = 0; i < count_; i++) {
      Stream& s = streams_[i];
      if (s.rows == 0) continue;
      s.rows--;
      for (int64_t at = 0; at < s.bytes; at += 64) __builtin_prefetch(s.row + at, 0, 2);
      s.row += s.step;
    }
  }

 private:
  struct Stream {
    const char* row;
    int64_t step, bytes;
    int rows;
  };
  Stream streams_[4];
  int count_ = 0;
};

}  // namespace omnimamba::ssd
