// The matrix products of the LoRA linear layer by the matrix units, from operands of one 16-bit type:
//
//   c[i, j] = sum_k a[i, k] b[k, j] + bias[j] + sum_r low[i, r] up[r, j]          (dropout on the last term: gpu.h)
//
// Shapes: a (m, k) and b (k, n), each contiguous along k or along its other dimension, in packs of 16 bytes; c (m, n).
// Plan: a block owns a tile of c, its warps a grid of smaller ones in registers. Stages of 32 of the depth wait in shared
//   memory, the next ones on their way; pieces of 16 bytes are XORed with their row, so that load_matrices meets no bank
//   twice, in both layouts. The depth is longer by the adapters' part, which comes first, while the first stages are on their
//   way: low goes as two bfloat16 parts, 16 bits of it, side by side along the depth, and up as one or, of another type, two.
// Traffic: a once for every tile's width of columns, b once for every tile's height of rows, mostly from L2; c once.
#include "../common/math.cuh"
#include "matmul.cuh"

namespace omnimamba {

// M x N of c by WARPS_M x WARPS_N warps. It is part of the kernel's name, which NVRTC must find: no anonymous namespace.
template <int M_, int N_, int WARPS_M_, int WARPS_N_>
struct Matmul16Tile {
  static constexpr int DEPTH = 32, M = M_, N = N_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_,
                       THREADS = WARPS_M * WARPS_N * WARP;
  static constexpr int MT = M / WARPS_M / 16, NT = N / WARPS_N / 8;  // products of a warp
  static constexpr int STAGE = (M + N) * DEPTH * 2;                  // bytes
  static_assert(NT % 2 == 0);
};

namespace {

using Large = Matmul16Tile<128, 128, 2, 4>;
using Small = Matmul16Tile<64, 64, 2, 2>;

constexpr int DEPTH = Large::DEPTH, STAGES = 4, RANKS = 16;

// Where 8 neighbours lie, in bytes: of row mn from depth k on, or MN_MAJOR of depth k from row mn on.
template <bool MN_MAJOR, int EXTENT>
OM_DEVICE int place(int mn, int k) {
  return MN_MAJOR ? k * EXTENT * 2 + (mn / 8 ^ (k & 7)) * 16 : mn * DEPTH * 2 + (k / 8 ^ (mn >> 1 & 3)) * 16;
}

// This thread's pieces of one operand's stages.
template <bool MN_MAJOR, int EXTENT, int THREADS>
struct Pieces {
  static constexpr int COUNT = EXTENT * DEPTH / 8 / THREADS;
  const uint16_t* from[COUNT];
  int to[COUNT], k[COUNT];  // k: beyond K where there is no such row
  int64_t step;

  OM_DEVICE Pieces(const View& v, int64_t mn_stride, int64_t k_stride, int64_t first, int64_t extent)
      : step(DEPTH * k_stride) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const int e = static_cast<int>(threadIdx.x) + i * THREADS;
      const int mn = MN_MAJOR ? e % (EXTENT / 8) * 8 : e / (DEPTH / 8);
      const int depth = MN_MAJOR ? e / (EXTENT / 8) : e % (DEPTH / 8) * 8;
      from[i] = static_cast<const uint16_t*>(v.data) + (first + mn) * mn_stride + depth * k_stride;
      to[i] = place<MN_MAJOR, EXTENT>(mn, depth);
      k[i] = first + mn < extent ? depth : 1 << 30;
    }
  }
  // Starts the copies of the next stage; `left` is how much of the depth it has.
  OM_DEVICE void next(unsigned char* stage, int left) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      copy_async<16>(stage + to[i], from[i], k[i] < left);
      from[i] += step;
    }
  }
};

// Four 8 x 8 matrices: rows mn .. mn + 15, depths k .. k + 15, in the order of an A fragment or of two B fragments.
template <bool MN_MAJOR, int EXTENT, bool IS_A>
OM_DEVICE void load_fragment(uint32_t (&out)[4], const unsigned char* stage, int mn, int k) {
  const int j = lane_id() / 8, r = lane_id() % 8;
  const int mn_block = (IS_A ? j % 2 : j / 2) * 8, k_block = (IS_A ? j / 2 : j % 2) * 8;
  const int at = MN_MAJOR ? place<true, EXTENT>(mn + mn_block, k + k_block + r)
                          : place<false, EXTENT>(mn + mn_block + r, k + k_block);
  load_matrices<MN_MAJOR>(out, stage + at);
}

template <class TILE>
using Accumulators = float[TILE::MT][TILE::NT][4];

// acc += A B over 16 of the depth, from k_a of the stage's a and k_b of its b.
template <class T, class TILE, bool A_MN, bool B_MN>
OM_DEVICE void multiply(Accumulators<TILE>& acc, const unsigned char* stage, int k_a, int k_b) {
  const int m = warp_id() / TILE::WARPS_N * TILE::MT * 16, n = warp_id() % TILE::WARPS_N * TILE::NT * 8;
  uint32_t a[TILE::MT][4], b[TILE::NT / 2][4];
#pragma unroll
  for (int i = 0; i < TILE::MT; i++) load_fragment<A_MN, TILE::M, true>(a[i], stage, m + 16 * i, k_a);
#pragma unroll
  for (int j = 0; j < TILE::NT / 2; j++)
    load_fragment<B_MN, TILE::N, false>(b[j], stage + TILE::M * DEPTH * 2, n + 16 * j, k_b);
#pragma unroll
  for (int i = 0; i < TILE::MT; i++)
#pragma unroll
    for (int j = 0; j < TILE::NT; j++) {
      const uint32_t right[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
      mma<T>(acc[i][j], a[i], right);
    }
}

// Writes v as two bfloat16 parts, at depths r and 16 + r of a row.
OM_DEVICE void put_parts(unsigned char* operand, int row, int r, float v) {
  const bf16 high = from_float<bf16>(v);
  const float rest = v - to_float(high);
  auto put = [&](int k, bf16 part) {
    store_pack(reinterpret_cast<bf16*>(operand + place<false, 0>(row, k) + k % 8 * 2), part);
  };
  put(r, high);
  put(RANKS + r, from_float<bf16>(rest == rest ? rest : 0.0f));
}

// acc = low up, by way of one stage.
template <class TILE>
OM_DEVICE void add_low(Accumulators<TILE>& acc, const LoraMatmulParams& p, unsigned char* stage, int64_t row,
                       int64_t column) {
  const int64_t ranks = p.tasks * p.rank;
  const bool exact = p.up.dtype == DType::BF16;  // up is its first part
#pragma unroll 1
  for (int64_t first = 0; first < ranks; first += RANKS) {
    sync_block();
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < (TILE::M + TILE::N) * RANKS; e += TILE::THREADS) {
      const int i = e / RANKS, r = e % RANKS;
      const auto rank = static_cast<uint32_t>(first + r), each = static_cast<uint32_t>(p.rank);
      float v = 0.0f;
      if (i < TILE::M) {
        if (row + i < p.m && rank < ranks) v = *p.low.at<float>(row + i, rank);
      } else if (column + i - TILE::M < p.n && rank < ranks) {
        v = float_at(p.up, rank / each, rank % each, column + i - TILE::M);
      }
      put_parts(stage, i, r, v);  // the rows of b lie behind those of a
    }
    sync_block();
#pragma unroll 1
    for (int part = 0; part < (exact ? 2 : 4); part++)
      multiply<bf16, TILE, false, false>(acc, stage, part % 2 * RANKS, part / 2 * RANKS);
  }
}

// body(i, j, e, row, column) for each accumulator and where it lies in c.
template <class TILE, class Body>
OM_DEVICE void for_each(int64_t row, int64_t column, Body&& body) {
  row += warp_id() / TILE::WARPS_N * TILE::MT * 16, column += warp_id() % TILE::WARPS_N * TILE::NT * 8;
#pragma unroll
  for (int i = 0; i < TILE::MT; i++)
#pragma unroll
    for (int j = 0; j < TILE::NT; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const Place at = fragment::c(lane_id(), e);
        body(i, j, e, row + 16 * i + at.row, column + 8 * j + at.column);
      }
}

template <class TC, class TILE>
OM_DEVICE void store_tile(const Accumulators<TILE>& acc, const LoraMatmulParams& p, int64_t row, int64_t column) {
  const bool pairs = p.n % 2 == 0;  // c is contiguous and a lane has two neighbours
  for_each<TILE>(row, column, [&](int i, int j, int e, int64_t y, int64_t x) {
    if (y >= p.m || x >= p.n) return;
    TC* to = p.c.at<TC>(y, x);
    if (!pairs) {
      *to = from_float<TC>(acc[i][j][e]);
    } else if (e % 2 == 0) {
      const float both[2] = {acc[i][j][e], acc[i][j][e + 1]};
      store_floats(to, both);
    }
  });
}

template <class T, class TILE, bool A_MN, bool B_MN>
__global__ void __launch_bounds__(TILE::THREADS, TILE::THREADS == 256 ? 2 : 4)
    matmul16_kernel(const __grid_constant__ LoraMatmulParams p) {
  OM_SHARED_DYNAMIC(stages);
  const Place tile = tile_of(blockIdx.x, ceil_div(p.m, TILE::M), ceil_div(p.n, TILE::N));
  const int64_t row = static_cast<int64_t>(tile.row) * TILE::M, column = static_cast<int64_t>(tile.column) * TILE::N;
  Pieces<A_MN, TILE::M, TILE::THREADS> a(p.a, A_MN ? 1 : p.a.stride[0], A_MN ? p.a.stride[1] : 1, row, p.m);
  Pieces<B_MN, TILE::N, TILE::THREADS> b(p.b, B_MN ? 1 : p.b.stride[1], B_MN ? p.b.stride[0] : 1, column, p.n);
  const int depth = static_cast<int>(p.k), steps = (depth + DEPTH - 1) / DEPTH;
  int issued = 0;
  auto issue = [&](int stage) {
    if (issued < steps) {
      unsigned char* to = stages + stage * TILE::STAGE;
      a.next(to, depth - issued * DEPTH);
      b.next(to + TILE::M * DEPTH * 2, depth - issued * DEPTH);
      issued++;
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; stage++) issue(stage);

  Accumulators<TILE> acc = {};
  if (p.low) {
    add_low<TILE>(acc, p, stages + (STAGES - 1) * TILE::STAGE, row, column);
    if (p.dropout) {
      const float scale = reciprocal(p.keep);
      for_each<TILE>(row, column, [&](int i, int j, int e, int64_t y, int64_t x) {
        acc[i][j][e] = kept(p, y, x, p.n) ? acc[i][j][e] * scale : 0.0f;
      });
    }
  }
#pragma unroll 1
  for (int s = 0; s < steps; s++) {
    copy_async_wait<STAGES - 2>();
    sync_block();
    issue((s + STAGES - 1) % STAGES);  // its last readers have passed the barrier
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) multiply<T, TILE, A_MN, B_MN>(acc, stages + s % STAGES * TILE::STAGE, k, k);
  }
  copy_async_wait<0>();

  if (p.bias)
    for_each<TILE>(row, column, [&](int i, int j, int e, int64_t, int64_t x) {
      if (x < p.n) acc[i][j][e] += float_at(p.bias, x);
    });
  switch (p.c.dtype) {
    case DType::BF16: return store_tile<bf16, TILE>(acc, p, row, column);
    case DType::F16: return store_tile<f16, TILE>(acc, p, row, column);
    default: return store_tile<float, TILE>(acc, p, row, column);
  }
}

}  // namespace

#if !defined(__CUDACC_RTC__)

namespace {

template <class T, class TILE, bool A_MN, bool B_MN>
void run(const LoraMatmulParams& p) {
  launch<matmul16_kernel<T, TILE, A_MN, B_MN>>(
      {grid(ceil_div(p.m, TILE::M) * ceil_div(p.n, TILE::N)), TILE::THREADS, p.stream, STAGES * TILE::STAGE}, p);
}

// Whether an operand of this extent can be read in packs: along k, or along its other dimension.
bool packs_along(const View& v, int along, int64_t length) {
  View other = v;
  other.stride[0] = v.stride[1 - along];
  return v.stride[along] == 1 && length % 8 == 0 && packs(other, 1, 2, 16);
}

}  // namespace

bool matmul_16(const LoraMatmulParams& p) {
  if (p.a.dtype == DType::F32 || p.a.dtype != p.b.dtype || p.k == 0 || p.k >= 1 << 30) return false;
  const bool a_k = packs_along(p.a, 1, p.k), a_m = packs_along(p.a, 0, p.m);
  const bool b_k = packs_along(p.b, 0, p.k), b_n = packs_along(p.b, 1, p.n);
  if (!(a_k || a_m) || !(b_k || b_n) || (!a_k && !b_n)) return false;
  const bool large = ceil_div(p.m, Large::M) * ceil_div(p.n, Large::N) >= 128;
  auto with_tile = [&](auto type, auto tile) {
    using T = decltype(type);
    using TILE = decltype(tile);
    if (a_k && b_k)
      run<T, TILE, false, false>(p);
    else if (a_k)
      run<T, TILE, false, true>(p);
    else
      run<T, TILE, true, true>(p);
  };
  auto with_type = [&](auto type) { large ? with_tile(type, Large{}) : with_tile(type, Small{}); };
  p.a.dtype == DType::BF16 ? with_type(bf16{}) : with_type(f16{});
  return true;
}

#endif

}  // namespace omnimamba
