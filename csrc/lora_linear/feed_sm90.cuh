// Hopper's matrix product of the LoRA linear layer (cuda_sm90.cu): its tiles, and the warps that bring the operands.
#pragma once
#include "../common/hopper.cuh"
#include "matmul.cuh"

namespace omnimamba::sm90 {

constexpr int M = 128, N = 256, SHORT = 64, DEPTH = 64, STAGES = 4, CLUSTER = 2, RANKS = 32;
constexpr int GROUP = 4 * WARP, THREADS = 3 * GROUP, LOADERS = 3 * WARP;
constexpr int BYTES_A = M * DEPTH * 2, BYTES_B = N * DEPTH * 2, STAGE = BYTES_A + BYTES_B;
constexpr int BOX = 64 * DEPTH * 2;  // 64 rows of depth 64, or 64 of the depth by 64 rows: 8 KB
constexpr int PART = M * RANKS * 2, SHARED = STAGES * STAGE + 2 * PART + N * RANKS * 2;

struct Barriers {
  Mbarrier full[STAGES], empty[STAGES], low_full, low_empty;
};

// What all roles walk over.
struct Tiles {
  int pairs, columns, tall, wide;  // of two tiles above one another; columns of tiles; those but for a short last one

  OM_DEVICE explicit Tiles(const LoraMatmulParams& p)
      : pairs(static_cast<int>(ceil_div(p.m, CLUSTER * M))),
        columns(static_cast<int>(ceil_div(p.n, N))),
        tall(static_cast<int>(ceil_div(p.m - SHORT, CLUSTER * M))),
        wide(static_cast<int>(ceil_div(p.n - SHORT, N))) {}

  // The tile pair number t: whole ones, then a short last row of them, then a short last column.
  OM_DEVICE Place at(int t) const {
    const int in_row = t - tall * wide, in_column = t - pairs * wide;
    if (in_row < 0) return tile_of(static_cast<uint32_t>(t), tall, wide);
    return in_column < 0 ? Place{tall, in_row} : Place{in_column, wide};
  }
  // body(row, column) of this block's tiles, the same for every warp.
  template <class Body>
  OM_DEVICE void each(Body&& body) const {
#pragma unroll 1
    for (int t = static_cast<int>(blockIdx.x) / CLUSTER; t < pairs * columns;
         t += static_cast<int>(gridDim.x) / CLUSTER) {
      const Place place = at(t);
      body((place.row * CLUSTER + cluster_rank()) * M, place.column * N);
    }
  }
};

// ---- the warps that bring operands ----

template <bool MN_MAJOR, class Load>
OM_DEVICE void load_boxes(unsigned char* to, int mn, int k, Load&& load) {
  if constexpr (MN_MAJOR) {
    load(to, mn, k);
    load(to + BOX, mn + 64, k);
  } else {
    load(to, k, mn);
  }
}

// One thread: the stages of all tiles, one after the other. Half of b's box goes to both blocks of the cluster.
template <bool A_MN, bool B_MN>
OM_DEVICE void fetch(const LoraMatmulParams& p, const TensorMap& a, const TensorMap& b, unsigned char* ring,
                     Barriers& bar) {
  const int depth = static_cast<int>(p.k), half = cluster_rank();
  int step = 0;
  Tiles(p).each([&](int row, int column) {
#pragma unroll 1
    for (int k = 0; k < depth; k += DEPTH, step++) {
      const int s = step % STAGES;
      unsigned char* stage = ring + s * STAGE;
      if (step >= STAGES) mbarrier_wait(&bar.empty[s], (step / STAGES - 1) & 1);
      mbarrier_arrive_expect(&bar.full[s], STAGE);
      load_boxes<A_MN>(stage, row, k,
                       [&](unsigned char* to, int c0, int c1) { tensor_load(to, a, &bar.full[s], c0, c1); });
      load_boxes<B_MN>(stage + BYTES_A + half * BYTES_B / 2, column + half * N / 2, k,
                       [&](unsigned char* to, int c0, int c1) { tensor_load_to(3, to, b, &bar.full[s], c0, c1); });
    }
  });
}

// How the adapters' ranks come: RANKS of them and one part of up at a time.
struct Passes {
  int ranks, parts, count;

  OM_DEVICE explicit Passes(const LoraMatmulParams& p)
      : ranks(static_cast<int>(p.tasks * p.rank)),
        parts(p.up.dtype == DType::BF16 ? 1 : 2),
        count(p.low ? (ranks + RANKS - 1) / RANKS * parts : 0) {}
  OM_DEVICE int first(int pass) const { return pass / parts * RANKS; }
  // How many products of depth 16 hold what is left of the ranks.
  OM_DEVICE int products(int pass) const { return ranks - first(pass) > 16 ? 2 : 1; }
};

// Eight values as bfloat16, and what that leaves of them. An infinite one leaves nothing.
OM_DEVICE void split(const float (&v)[8], Pack<bf16, 8>& high, Pack<bf16, 8>& rest) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    high.value[i] = from_float<bf16>(v[i]);
    const float left = v[i] - to_float(high.value[i]);
    rest.value[i] = from_float<bf16>(left == left ? left : 0.0f);
  }
}

// The adapters' operands of all tiles: both parts of low, then one of up, rows of RANKS ranks each.
OM_DEVICE void fill_low(const LoraMatmulParams& p, unsigned char* low, Barriers& bar) {
  const Passes passes(p);
  const auto each = static_cast<uint32_t>(p.rank);
  int done = 0;
  Tiles(p).each([&](int row, int column) {
#pragma unroll 1
    for (int pass = 0; pass < passes.count; pass++, done++) {
      if (done > 0) mbarrier_wait(&bar.low_empty, (done - 1) & 1);
      const int first = passes.first(pass), packs = 2 * passes.products(pass);
#pragma unroll 1
      for (int e = static_cast<int>(threadIdx.x) - WARP; e < (M + N) * packs; e += LOADERS) {
        const int line = e / packs, r = e % packs * 8;
        const bool of_up = line >= M;
        const bool inside = of_up ? column + line - M < p.n : row + line < p.m;
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const auto rank = static_cast<uint32_t>(first + r + i);
          v[i] = !inside || first + r + i >= passes.ranks ? 0.0f
                 : of_up                                  ? float_at(p.up, rank / each, rank % each, column + line - M)
                                                          : *p.low.at<float>(row + line, rank);
        }
        Pack<bf16, 8> high, rest;
        split(v, high, rest);
        const uint32_t at =
            swizzled(static_cast<uint32_t>((of_up ? line - M : line) * RANKS * 2 + r * 2), Swizzle::B64);
        auto* to = reinterpret_cast<bf16*>(low + at);
        constexpr int NEXT = PART / 2;
        if (!of_up) {
          store_pack(to, high);
          store_pack(to + NEXT, rest);
        } else if (pass % passes.parts == 0) {
          store_pack(to + 2 * NEXT, high);
        } else {
          store_pack(to + 2 * NEXT, rest);
        }
      }
      async_fence();
      mbarrier_arrive(&bar.low_full);
    }
  });
}

}  // namespace omnimamba::sm90
