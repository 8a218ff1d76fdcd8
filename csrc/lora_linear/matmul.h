// A matrix product in float32 from operands of any float type and strides: c = start + a b.
//
// Shapes   a (m, k), b (k, n), c (m, n) with rows contiguous, float32 or, with amx, any float type; start (m, n) float32
//          with rows contiguous, absent or c itself.
// Plan     k in blocks of kMatmulDepth. For each, all of a is unpacked to float32 panels of kTileRows rows, shared by the
//          threads; each thread then takes chunks of kMatmulColumns columns, unpacks its part of b into its own cache, and
//          runs all panels of a past it, one register tile of c at a time.
//          Each element of c is one sum in the order of k, whoever computes it: the same bits at every thread count, which
//          BLAS libraries do not give (they split k between threads where m and n are small).
//          Where the processor has matrix registers, and either operand is bf16: cpu_matmul_amx.h.
// Traffic  a and b once from memory, a's unpacked block once a chunk from cache, c once a block of k.
#pragma once
#include "common/types.h"

namespace omnimamba {

constexpr int kMatmulDepth = 256, kMatmulColumns = 128;

// Of products in matrix registers: rows of a that are cut into tiles at a time, and columns of b that a thread takes.
constexpr int kMatmulBlockRows = 512, kMatmulChunk = 256;

struct MatmulParams {
  View a, b, c, start;
  // (m + 12) kMatmulDepth + threads kMatmulDepth kMatmulColumns floats. With amx, of operands of A and B pieces (1 of bf16,
  // 2 of float16, 3 of float32), C = 1 where both are bf16 and else 2, and R = m rounded up to 32, at most
  // kMatmulBlockRows / C: R (k rounded up to 32) A / 2 floats, and for each thread kMatmulChunk (C R + 256 B).
  View workspace;
  int64_t m = 0, n = 0, k = 0;
  bool amx = false;  // in matrix registers: may_use_tiles() says that they are there
  int threads = 1;
};

void matmul(const MatmulParams& p);

}  // namespace omnimamba
