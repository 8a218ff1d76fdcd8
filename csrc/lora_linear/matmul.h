// A matrix product in float32 from operands of any float type and strides: c = a b, or c += a b.
//
// Shapes   a (m, k), b (k, n), c (m, n) float32 with rows contiguous.
// Plan     k in blocks of kMatmulDepth. For each, all of a is unpacked to float32 panels of kTileRows rows, shared by the
//          threads; each thread then takes chunks of kMatmulColumns columns, unpacks its part of b into its own cache, and
//          runs all panels of a past it, one register tile of c at a time.
//          Each element of c is one sum in the order of k, whoever computes it: the same bits at every thread count, which
//          BLAS libraries do not give (they split k between threads where m and n are small).
// Traffic  a and b once from memory, a's unpacked block once a chunk from cache, c once a block of k.
#pragma once
#include "common/types.h"

namespace omnimamba {

constexpr int kMatmulDepth = 256, kMatmulColumns = 128;

struct MatmulParams {
  View a, b, c;
  View workspace;  // (m + 12) kMatmulDepth + threads kMatmulDepth kMatmulColumns floats
  int64_t m = 0, n = 0, k = 0;
  bool accumulate = false;
  int threads = 1;
};

void matmul(const MatmulParams& p);

}  // namespace omnimamba
