// The LoRA linear layer with int8 weights: few rows (decode) in one pass over them; and weights made dense for many rows.
//
// Maths    as in lora_linear.h: W[o, k] = weight_scale[o, k / 64] weight[o, k].
// Plan     as in cuda.cu, a block owns 16 MT outputs, its warps share out the depth. One step of a warp is one group of 64 that
//          shares a scale: a lane reads 16 neighbours, which become x's 16-bit type in registers (exactly: 8 bits fit both) and
//          are the elements that it holds in four products; their sum is scaled once. No weight is rounded.
//          Many rows: the weights go to memory in x's type, for the product that dense ones have. Beside such a product, which is
//          bound by arithmetic, that costs little, and its tiles come as fast as they do from dense weights.
// Traffic  few rows: in * out bytes and two for each 64 of them once from memory; x and lora_A once a block from L2.
//          Dense: in * out bytes read, 2 or 4 times as many written.
#include "../common/check.h"
#include "few_rows.cuh"

namespace omnimamba {
namespace {

#if defined(OMNIMAMBA_EMULATED)
using host_gpu::bits_of;
using host_gpu::float_of;
#else
OM_DEVICE uint32_t bits_of(float a) { return __float_as_uint(a); }
OM_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
#endif

using Sixteen = Pack<uint32_t, 4>;  // 16 neighbours of int8

// Four int8 as floats: beside 2^23 a byte is the last bits of a float, which no slow conversion needs to make.
OM_DEVICE void widen(float (&out)[4], uint32_t four) {
  const uint32_t shifted = four ^ 0x80808080u;  // each + 128: none negative
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = float_of(0x4B000000u | (shifted >> 8 * i & 0xFFu)) - 8388736.0f;
}

// Sixteen int8 as 16-bit fragments, two a register.
template <class T>
OM_DEVICE void widen(uint32_t (&out)[8], const Sixteen& packed) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float v[4];
    widen(v, packed.value[j]);
#pragma unroll
    for (int h = 0; h < 2; h++)
      if constexpr (T::IS_BF16)  // its lower half is 0
        out[2 * j + h] = bits_of(v[2 * h]) >> 16 | (bits_of(v[2 * h + 1]) & 0xFFFF0000u);
      else
        out[2 * j + h] = pack_two<T>(v[2 * h], v[2 * h + 1]);
  }
}

// c += A B over the 64 depths of a group: rows g and g + 8 of A, and row g of B, in the order of the lanes' 16 neighbours.
template <class T>
OM_DEVICE void multiply_group(float (&c)[4], const uint32_t (&upper)[8], const uint32_t (&lower)[8],
                              const Eight (&b)[2]) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const uint32_t left[4] = {upper[2 * j], lower[2 * j], upper[2 * j + 1], lower[2 * j + 1]};
    const uint32_t right[2] = {b[j / 2].value[j % 2 * 2], b[j / 2].value[j % 2 * 2 + 1]};
    mma<T>(c, left, right);
  }
}

// 16 neighbours of a 16-bit type from element k of a row on, which may be absent.
template <class T>
OM_DEVICE void load_sixteen(Eight (&out)[2], const T* row, int64_t k, int64_t depth) {
#pragma unroll
  for (int i = 0; i < 2; i++) out[i] = k < depth && row ? load_pack<Eight>(row + k + 8 * i) : Eight{};
}

template <class T, int MT, int NT, bool FUSED>
__global__ void __launch_bounds__(WARPS* WARP, NT >= 4 ? 1 : 2)
    few_rows_int8_kernel(const __grid_constant__ LoraLinearParams p) {
  constexpr int TILES = MT + FUSED;
  [[maybe_unused]] constexpr int UNROLL = MT == 1 && NT <= 2 ? 2 : 1;
  OM_SHARED(float, shares, WARPS * 8 * (16 * TILES + 4));
  OM_SHARED(float, low, FUSED ? MOST_ROWS * RANKS : 1);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * 16 * MT, ranks = p.tasks * p.rank;
  const int g = lane_id() / 4;
  const T *x[NT], *lora_A[2];
  const int8_t* weights[MT][2];
#pragma unroll
  for (int n = 0; n < NT; n++) x[n] = 8 * n + g < p.rows ? p.x.at<T>(8 * n + g) : nullptr;
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const int64_t o = first + 16 * m + g + 8 * h;
      weights[m][h] = o < p.out ? p.weight.at<int8_t>(o) : nullptr;
    }
    const auto r = static_cast<uint32_t>(g + 8 * h), rank = static_cast<uint32_t>(p.rank);
    lora_A[h] = FUSED && r < ranks ? p.lora_A.at<T>(r / rank, r % rank) : nullptr;
  }
  float acc[TILES][NT][4] = {};
#pragma unroll UNROLL
  for (int64_t group = warp_id(); group * kInt8Group < p.in; group += WARPS) {
    const int64_t k = group * kInt8Group + lane_id() % 4 * 16;
    Sixteen packed[MT][2];
    float scale[MT][2];
    Eight b[NT][2], a[2][2];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        packed[m][h] = k < p.in && weights[m][h] ? load_pack<Sixteen>(weights[m][h] + k) : Sixteen{};
        scale[m][h] = weights[m][h] ? float_at(p.weight_scale, first + 16 * m + g + 8 * h, group) : 0.0f;
      }
#pragma unroll
    for (int n = 0; n < NT; n++) load_sixteen(b[n], x[n], k, p.in);
    if constexpr (FUSED) {
#pragma unroll
      for (int h = 0; h < 2; h++) load_sixteen(a[h], lora_A[h], k, p.in);
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
      uint32_t wide[2][8];
      widen<T>(wide[0], packed[m][0]);
      widen<T>(wide[1], packed[m][1]);
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float sum[4] = {};
        multiply_group<T>(sum, wide[0], wide[1], b[n]);
#pragma unroll
        for (int i = 0; i < 4; i++) acc[m][n][i] += scale[m][i / 2] * sum[i];
      }
    }
    if constexpr (FUSED) {
      uint32_t A[2][8];
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 8; i++) A[h][i] = a[h][i / 4].value[i % 4];
#pragma unroll
      for (int n = 0; n < NT; n++) multiply_group<T>(acc[MT][n], A[0], A[1], b[n]);
    }
  }
  finish_rows<MT, FUSED>(p, acc, first, shares, low);
}

// ---- dense weights ----

constexpr int THREADS = 256;

// N neighbours a thread: 16, or 1 at any address and stride.
template <int N>
__global__ void __launch_bounds__(THREADS) dequantize_kernel(const __grid_constant__ Int8WeightParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x, packs = p.in / N;
  if (i >= p.out * packs) return;
  const int64_t o = i / packs, k = i % packs * N;
  const float scale = float_at(p.weight_scale, o, k / kInt8Group);
  if constexpr (N == 1) {
    put_float(scale * static_cast<float>(*p.weight.at<int8_t>(o, k)), p.dense, o, k);
  } else {
    const auto packed = load_pack<Sixteen>(p.weight.at<int8_t>(o, k));
    float v[N];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float four[4];
      widen(four, packed.value[j]);
#pragma unroll
      for (int e = 0; e < 4; e++) v[4 * j + e] = scale * four[e];
    }
    switch (p.dense.dtype) {
      case DType::BF16: return store_floats(p.dense.at<bf16>(o, k), v);
      case DType::F16: return store_floats(p.dense.at<f16>(o, k), v);
      default: return store_floats(p.dense.at<float>(o, k), v);
    }
  }
}

}  // namespace

#if !defined(__CUDACC_RTC__)

namespace {

bool rows_of_sixteen(const View& weight, int64_t in) {
  return weight.stride[1] == 1 && in % 16 == 0 && packs(weight, 1, 1, 16);
}

template <class T, int MT, int NT>
void run_few(const LoraLinearParams& p, bool fused) {
  const Shape shape{grid(ceil_div(p.out, 16 * MT)), WARPS * WARP, p.stream};
  if (fused)
    launch<few_rows_int8_kernel<T, MT, NT, true>>(shape, p);
  else
    launch<few_rows_int8_kernel<T, MT, NT, false>>(shape, p);
}

}  // namespace

bool int8_packs(const LoraLinearParams& p) {
  return p.x.dtype != DType::F32 && rows_pack(p.x, 1, p.in) && rows_of_sixteen(p.weight, p.in);
}

void few_rows_int8(const LoraLinearParams& p, bool fused) {
  for_short_type(p.x.dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = p.out >= 32 * FULL;  // else smaller blocks fill the chip
    if (p.rows <= 8) return wide ? run_few<T, 2, 1>(p, fused) : run_few<T, 1, 1>(p, fused);
    if (p.rows <= 16) return run_few<T, 1, 2>(p, fused);
    if (p.rows <= 32) return run_few<T, 2, 4>(p, fused);
    run_few<T, 1, 8>(p, fused);
  });
}

void int8_weight_dequantize(const Int8WeightParams& p) {
  if (p.out == 0 || p.in == 0) return;
  check(p.dense && p.weight && p.weight_scale, "int8_weight_dequantize: dense, weight and weight_scale are needed");
  const bool sixteen = rows_of_sixteen(p.weight, p.in) && packs(p.dense, 1, p.dense.dtype == DType::F32 ? 4 : 2, 16);
  const Shape shape{grid(ceil_div(p.out * p.in / (sixteen ? 16 : 1), THREADS)), THREADS, p.stream};
  if (sixteen)
    launch<dequantize_kernel<16>>(shape, p);
  else
    launch<dequantize_kernel<1>>(shape, p);
}

#endif

}  // namespace omnimamba
