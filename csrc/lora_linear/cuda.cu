// The LoRA linear layer for few rows (decode, up to 64), in one launch or two.
//
// Maths    as in lora_linear.h; low[i, r] = scale sum_k A[r, k] x[i, k] in the columns of row i's own task, else 0.
// Plan     a block owns 16 MT rows of the weights for all rows of x. Its warps share out the depth, 32 at a time, so that a
//          block reads rows of memory in a row; their sums are added in the order of the warps. Up to 16 ranks of all adapters
//          together are one more tile of the same product: each block computes low for itself, which costs it reads from the
//          L2 cache but no launch and no wait. More ranks, dropout or another type: lora_linear_low comes before.
//          Where types differ, or addresses do not allow accesses of 16 bytes, a warp makes two outputs of four rows
//          in float32, each lane with a share of the depth.
//          int8 weights beside 16-bit x: cuda_int8.cu.
// Traffic  the weights once from memory (in * out elements), in accesses of 16 bytes; x and lora_A once a block from L2.
// The bits of a row depend on no other row and not on how many there are.
#include "../common/check.h"
#include "few_rows.cuh"

namespace omnimamba {
namespace {

template <class T, int MT, int NT, bool FUSED>
__global__ void __launch_bounds__(WARPS* WARP, NT >= 4 ? 1 : 2)
    few_rows_kernel(const __grid_constant__ LoraLinearParams p) {
  constexpr int TILES = MT + FUSED;
  OM_SHARED(float, shares, WARPS * 8 * (16 * TILES + 4));
  OM_SHARED(float, low, FUSED ? MOST_ROWS * RANKS : 1);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * 16 * MT, ranks = p.tasks * p.rank;
  const int g = lane_id() / 4;
  const T *weights[TILES][2], *x[NT];
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const int64_t o = first + 16 * m + g + 8 * h;
      weights[m][h] = o < p.out ? p.weight.at<T>(o) : nullptr;
    }
    if constexpr (FUSED) {
      const auto r = static_cast<uint32_t>(g + 8 * h), rank = static_cast<uint32_t>(p.rank);
      weights[MT][h] = r < ranks ? p.lora_A.at<T>(r / rank, r % rank) : nullptr;
    }
  }
#pragma unroll
  for (int n = 0; n < NT; n++) x[n] = 8 * n + g < p.rows ? p.x.at<T>(8 * n + g) : nullptr;
  float acc[TILES][NT][4] = {};
  skinny_product<T, NT == 2 ? 12 : 16>(acc, weights, x, p.in, warp_id() * SKINNY_DEPTH, WARPS * SKINNY_DEPTH,
                                       [](auto&, int64_t) {});

  finish_rows<MT, FUSED>(p, acc, first, shares, low);
}

// ---- low, 16 rows of x by 8 NT ranks a block ----

template <class T, int NT, bool DROPOUT>
__global__ void __launch_bounds__(WARPS* WARP, DROPOUT ? 1 : 2) low_kernel(const __grid_constant__ LoraLinearParams p) {
  OM_SHARED(float, shares, WARPS * 8 * 20);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * 16, ranks = p.tasks * p.rank;
  const auto rank = static_cast<uint32_t>(p.rank), first_r = static_cast<uint32_t>(blockIdx.y) * 8 * NT;
  const int g = lane_id() / 4;
  const T *x[1][2], *A[NT];
#pragma unroll
  for (int h = 0; h < 2; h++) x[0][h] = first + g + 8 * h < p.rows ? p.x.at<T>(first + g + 8 * h) : nullptr;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const uint32_t r = first_r + static_cast<uint32_t>(8 * n + g);
    A[n] = r < ranks ? p.lora_A.at<T>(r / rank, r % rank) : nullptr;
  }
  float acc[1][NT][4] = {};
  auto drop = [&](auto& a, int64_t k) {
    if constexpr (DROPOUT)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 8; i++)
          if (!kept(p, first + g + 8 * h, k + i, p.in)) a[0][h].value[i / 2] &= i % 2 ? 0xffffu : 0xffff0000u;
  };
  skinny_product<T, DROPOUT ? 4 : 16>(acc, x, A, p.in, warp_id() * SKINNY_DEPTH, WARPS * SKINNY_DEPTH, drop);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    add_shares<WARPS>(acc, n, shares);
    const int e = static_cast<int>(threadIdx.x);
    const int64_t row = first + e / 8, r = first_r + 8 * n + e % 8;
    if (e < 16 * 8 && row < p.rows && r < ranks)
      *p.low.at<float>(row, r) = routed(p, row, r, shares[e % 8 * 20 + e / 8]);
  }
}

// ---- any types, any strides ----

constexpr int ANY_WARPS = 4, ANY_ROWS = 4, ANY_OUTS = 2;

// N neighbours along the depth of a row of v, from element k on; N = 1 at any stride.
template <int N>
OM_DEVICE void read(float (&out)[N], const View& v, int64_t i, int64_t j, int64_t k) {
  if constexpr (N == 1) {
    out[0] = float_at(v, i, j, k);
  } else {
    switch (v.dtype) {
      case DType::BF16: load_floats(out, v.at<bf16>(i, j, k)); break;
      case DType::F16: load_floats(out, v.at<f16>(i, j, k)); break;
      default: load_floats(out, v.at<float>(i, j, k));
    }
  }
}

// The same of a row of int8 weights, in floats.
template <int N>
OM_DEVICE void read_int8(float (&out)[N], const LoraLinearParams& p, int64_t o, int64_t k) {
  const float scale = float_at(p.weight_scale, o, k / kInt8Group);
  const auto pack = load_pack<Pack<int8_t, N>>(p.weight.at<int8_t>(o, k));
#pragma unroll
  for (int e = 0; e < N; e++) out[e] = scale * static_cast<float>(pack.value[e]);
}

// y, or low where LOW: rows blockIdx.y * rows_a_block and on, outputs by warps. x and weights as (rows, 1, in), (tasks, r, in).
template <int N, bool LOW, bool INT8>
__global__ void __launch_bounds__(ANY_WARPS* WARP, 4)
    any_rows_kernel(const __grid_constant__ LoraLinearParams p, int64_t rows_a_block) {
  const int64_t outs = LOW ? p.tasks * p.rank : p.out;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * ANY_WARPS + warp_id()) * ANY_OUTS;
  const int64_t begin = blockIdx.y * rows_a_block, left = p.rows - begin;
  const int64_t end = begin + (left < rows_a_block ? left : rows_a_block);
  if (first >= outs) return;
  View x = p.x, weights = LOW ? p.lora_A : p.weight;
  x.stride[2] = x.stride[1];
  if (!LOW) weights.stride[2] = weights.stride[1];
  int64_t i[ANY_OUTS], j[ANY_OUTS];  // the weights' row of each output
#pragma unroll
  for (int o = 0; o < ANY_OUTS; o++) {
    const auto rank = LOW ? static_cast<uint32_t>(p.rank) : 1u;
    i[o] = LOW ? static_cast<uint32_t>(first + o) / rank : first + o;
    j[o] = LOW ? static_cast<uint32_t>(first + o) % rank : 0;
  }
  for (int64_t row = begin; row < end; row += ANY_ROWS) {
    float sums[ANY_ROWS][ANY_OUTS] = {};
    for (int64_t k = lane_id() * N; k < p.in; k += WARP * N) {
      float w[ANY_OUTS][N] = {};
#pragma unroll
      for (int o = 0; o < ANY_OUTS; o++)
        if (first + o < outs) {
          if constexpr (INT8)
            read_int8(w[o], p, first + o, k);
          else
            read(w[o], weights, i[o], j[o], k);
        }
#pragma unroll
      for (int r = 0; r < ANY_ROWS; r++) {
        if (row + r >= end) continue;
        float u[N];
        read(u, x, row + r, 0, k);
#pragma unroll
        for (int e = 0; e < N; e++) {
          if (LOW && p.dropout && !kept(p, row + r, k + e, p.in)) continue;
#pragma unroll
          for (int o = 0; o < ANY_OUTS; o++) sums[r][o] += u[e] * w[o][e];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ANY_ROWS; r++)
#pragma unroll
      for (int o = 0; o < ANY_OUTS; o++) {
        const float sum = warp_sum(sums[r][o]);
        if (lane_id() != r * ANY_OUTS + o || row + r >= end || first + o >= outs) continue;
        if (LOW)
          *p.low.at<float>(row + r, first + o) = routed(p, row + r, first + o, sum);
        else
          finish(p, row + r, first + o, sum, p.low.at<float>(row + r));
      }
  }
}

}  // namespace

#if !defined(__CUDACC_RTC__)

namespace {

template <bool LOW, bool INT8 = false>
void run_any(const LoraLinearParams& p, int64_t rows_a_block) {
  const View& weights = LOW ? p.lora_A : p.weight;
  const int dimensions = LOW ? 2 : 1;
  const int64_t outs = LOW ? p.tasks * p.rank : p.out;
  auto fits = [&](const View& v, int d) {
    const int64_t size = v.dtype == DType::F32 ? 4 : v.dtype == DType::I8 ? 1 : 2;
    return v.stride[d] == 1 && packs(v, d, size, 4 * size);
  };
  const dim3 blocks = grid(ceil_div(outs, ANY_WARPS * ANY_OUTS), ceil_div(p.rows, rows_a_block));
  const Shape shape{blocks, ANY_WARPS * WARP, p.stream};
  if (p.in % 4 == 0 && fits(p.x, 1) && fits(weights, dimensions))
    launch<any_rows_kernel<4, LOW, INT8>>(shape, p, rows_a_block);
  else
    launch<any_rows_kernel<1, LOW, INT8>>(shape, p, rows_a_block);
}

bool is_short(const View& x, const View& other) { return x.dtype != DType::F32 && x.dtype == other.dtype; }

template <class T, int MT, int NT>
void run_few(const LoraLinearParams& p, bool fused) {
  const Shape shape{grid(ceil_div(p.out, 16 * MT)), WARPS * WARP, p.stream};
  if (fused)
    launch<few_rows_kernel<T, MT, NT, true>>(shape, p);
  else
    launch<few_rows_kernel<T, MT, NT, false>>(shape, p);
}

template <class T, int NT>
void run_low(const LoraLinearParams& p) {
  const Shape shape{grid(ceil_div(p.rows, 16), ceil_div(p.tasks * p.rank, 8 * NT)), WARPS * WARP, p.stream};
  if (p.dropout)
    launch<low_kernel<T, NT, true>>(shape, p);
  else
    launch<low_kernel<T, NT, false>>(shape, p);
}

bool low_packs(const LoraLinearParams& p) {
  return is_short(p.x, p.lora_A) && rows_pack(p.x, 1, p.in) && rows_pack(p.lora_A, 2, p.in);
}

}  // namespace

void lora_linear_forward(const LoraLinearParams& p) {
  if (p.rows == 0 || p.out == 0) return;
  check(p.rows <= MOST_ROWS, "x: the kernel for few rows takes at most 64");
  const bool int8 = p.weight.dtype == DType::I8;
  check(!int8 || p.in == 0 || p.weight_scale, "lora_linear: int8 weights need weight_scale");
  const bool packed =
      int8 ? int8_packs(p) : is_short(p.x, p.weight) && rows_pack(p.x, 1, p.in) && rows_pack(p.weight, 1, p.in);
  const bool fused = p.project && packed && p.tasks * p.rank <= RANKS && low_packs(p) && !p.dropout;
  if (p.project && !fused) lora_linear_low(p);
  if (!packed) return int8 ? run_any<false, true>(p, p.rows) : run_any<false>(p, p.rows);
  if (int8) return few_rows_int8(p, fused);
  for_short_type(p.x.dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = p.out >= 32 * FULL;  // else smaller blocks fill the chip
    if (p.rows <= 8) return wide ? run_few<T, 2, 1>(p, fused) : run_few<T, 1, 1>(p, fused);
    if (p.rows <= 16) return wide ? run_few<T, 2, 2>(p, fused) : run_few<T, 1, 2>(p, fused);
    if (p.rows <= 32) return run_few<T, 2, 4>(p, fused);
    run_few<T, 2, 8>(p, fused);
  });
}

void lora_linear_low(const LoraLinearParams& p) {
  const int64_t ranks = p.tasks * p.rank;
  if (p.rows == 0 || ranks == 0) return;
  if (!low_packs(p)) return run_any<true>(p, 16 * ceil_div(p.rows, 16 * 65535));
  for_short_type(p.x.dtype, [&](auto type) {
    using T = decltype(type);
    if (ranks <= 8)
      run_low<T, 1>(p);
    else if (ranks <= 16)
      run_low<T, 2>(p);
    else
      run_low<T, 4>(p);
  });
}

#endif

}  // namespace omnimamba
