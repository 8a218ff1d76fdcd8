// int8 weights of few rows on a CPU: through float32 everywhere, and as integers where AVX-512 VNNI runs.
//
// Maths    y[o] = sum_g s[o, g] sum_{k in g} w[o, k] x[k], g the groups of 64 that share a scale.
// Floats   w goes to float32 in registers; a group's sum is scaled once. Three instructions for 16 weights (widen,
//          convert, multiply-add): with the scale 13 for a vector of 64. A group's sum comes before its scale, and is
//          to stay below 2^128.
// Integers vpdpbusd adds four products of an unsigned and a signed byte to each of 16 int32. With 2^E above the group's
//          largest |x|, x is 2^(E - 30) X, X an integer below 2^30, written in four signed digits of 8 bits:
//          X = 2^24 d0 + 2^16 d1 + 2^8 d2 + d3. Bytes w + 128 (one flipped bit) take the unsigned place, so that each sum
//          has 128 sum(d) too much, which is subtracted by where it starts. No int32 sum overflows: 16 products stay
//          below 2^19 for a digit, 2^28 for 2^8 d0 + d1.
//          Four rows of weights, one a stream, are transposed in blocks of 16 bytes, so that a lane's four products are of
//          one row and four such blocks add up in it: what follows the products (joining digits, conversion, scale) then
//          costs once for four vectors. In all 13 + 25 R instructions for 4 x 64 weights and R rows of x: 9.5
//          for a vector of 64 weights where R is 1.
// Bound    X is rounded to the nearest integer: each x is taken within 2^-30 of its group's largest, exactly so where it
//          is above 2^-6 of it. Sums of integers are exact; from there on the arithmetic is float32, as that of floats.
//          A row with inf, NaN or a group whose largest is below 2^-47 (and not 0) goes through floats, so that
//          s 2^(E - 14), the unit of 2^8 d0 + d1, is below float32's normal numbers only where s is below 2^-66.
#pragma once
#include <algorithm>

#include "common/lanes.h"
#include "lora_linear/lora_linear.h"

namespace omnimamba {
namespace {

constexpr int STREAMS = 4;       // weight rows in one tile, each in a stream of its own
constexpr int64_t AHEAD = 4096;  // bytes from a weight in use to the one prefetched, all streams together

// One int8 weight row of each stream, with its scales `step` elements apart.
template <class TS>
struct Int8Rows {
  static constexpr int COUNT = STREAMS;
  const int8_t* w[STREAMS];
  const TS* scale[STREAMS];
  int64_t step;

  void set(const LoraLinearParams& p, int m, int64_t o) {
    w[m] = p.weight.at<int8_t>(o);
    scale[m] = p.weight_scale.at<TS>(o);
    step = p.weight_scale.stride[1];
  }
};

// ---- floats ----

// sums[r][m] = dot(x row r, weight row m), for R rows of x that lie `pitch` apart, padded with zeros to whole vectors.
template <int R, class TS>
OM_INLINE void dot_tile(const Int8Rows<TS>& rows, const float* x, int64_t pitch, int64_t in, float (*sums)[STREAMS]) {
  const int64_t whole = in / kInt8Group * kInt8Group;
  vf acc[R][STREAMS] = {};
  auto scaled = [&](const vf* part, int64_t k, int m) {
    const vf scale = splat(to_float(rows.scale[m][k / kInt8Group * rows.step]));
    for (int r = 0; r < R; r++) acc[r][m] += scale * part[r];
  };
  for (int64_t k = 0; k < whole; k += kInt8Group)
    for (int m = 0; m < STREAMS; m++) {
      __builtin_prefetch(rows.w[m] + k + AHEAD / STREAMS);
      vf part[R] = {};
      for (int64_t j = k; j < k + kInt8Group; j += W) {
        const vf w = load(rows.w[m] + j);
        for (int r = 0; r < R; r++) part[r] += w * load(x + r * pitch + j);
      }
      scaled(part, k, m);
    }
  if (whole < in)
    for (int m = 0; m < STREAMS; m++) {
      vf part[R] = {};
      for (int64_t j = whole; j < in; j += W) {  // x is padded with zeros
        const vf w = load_part(rows.w[m] + j, static_cast<int>(std::min<int64_t>(W, in - j)));
        for (int r = 0; r < R; r++) part[r] += w * load(x + r * pitch + j);
      }
      scaled(part, whole, m);
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < STREAMS; m++) sums[r][m] = sum(acc[r][m]);
}

// ---- integers ----

#if defined(__AVX512F__)
#define OM_VNNI __attribute__((target("avx512vnni")))

// 64 values of one row of x.
struct DigitGroup {
  int8_t digit[4][kInt8Group];  // the highest first
  int32_t start[2][4];          // -128 sum(2^8 d0 + d1) and -128 sum(2^8 d2 + d3), over the k with k / 4 % 4 = lane
  float unit;                   // 2^(E - 14): of 2^8 d0 + d1
  int32_t in_digits;            // of a row's last group: whether the row is in digits. Else its floats fill the front
  int32_t unused[6];
};
static_assert(sizeof(DigitGroup) == kDigitGroupFloats * sizeof(float));

inline int64_t groups_of(int64_t in) { return (in + kInt8Group - 1) / kInt8Group; }

// 128 times the sum of 4 digits, those of the four blocks of 16 added up.
OM_VNNI inline __m128i sum_digits(const int8_t* digit) {
  const __m512i each = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), _mm512_loadu_si512(digit));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(each), _mm512_extracti64x4_epi64(each, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

OM_VNNI inline void store_start(int32_t* to, const int8_t* upper, const int8_t* lower) {
  const __m128i both = _mm_add_epi32(_mm_slli_epi32(sum_digits(upper), 8), sum_digits(lower));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_sub_epi32(_mm_setzero_si128(), both));
}

// A row of x in digits. False where it has to go through floats.
template <class TX>
OM_VNNI bool split_row(const TX* x, int64_t in, DigitGroup* to) {
  constexpr int INFINITE = 0x7f800000, SMALLEST = (127 - 47) << 23;  // as bits: magnitudes compare as integers
  const __m512i carry = _mm512_set1_epi32(0x00808080);
  for (int64_t begin = 0; begin < in; begin += kInt8Group, to++) {
    __m512 value[4];
    __m512i magnitude = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) {
      const auto n = static_cast<int>(std::clamp<int64_t>(in - begin - i * W, 0, W));
      value[i] = n > 0 ? (__m512)load_some(x + begin + i * W, n) : _mm512_setzero_ps();
      magnitude = _mm512_max_epi32(magnitude, _mm512_castps_si512(_mm512_abs_ps(value[i])));
    }
    const int largest = _mm512_reduce_max_epi32(magnitude);
    if (largest >= INFINITE || (largest > 0 && largest < SMALLEST)) return false;
    const int exponent = std::max(largest, SMALLEST) >> 23;  // E + 126
    const auto factor = _mm512_castsi512_ps(_mm512_set1_epi32((127 + 30 + 126 - exponent) << 23));
    for (int i = 0; i < 4; i++) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(value[i], factor));
      __m512i digits = _mm512_xor_si512(_mm512_add_epi32(whole, carry), carry);
      for (int d = 0; d < 4; d++) {
        const __m512i one = _mm512_srli_epi32(digits, static_cast<unsigned>(24 - 8 * d));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to->digit[d] + i * W), _mm512_cvtepi32_epi8(one));
      }
    }
    store_start(to->start[0], to->digit[0], to->digit[1]);
    store_start(to->start[1], to->digit[2], to->digit[3]);
    to->unit = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((exponent - 126 - 14 + 127) << 23)));
  }
  return true;
}

// The scales of up to 16 groups of four rows, from the first that `rows` point to: those of group g at to[g % 4][g / 4].
template <class TS>
OM_INLINE void transpose_scales(const Int8Rows<TS>& rows, int64_t first, int n, float (*to)[4][4]) {
  __m512 row[STREAMS];
  for (int m = 0; m < STREAMS; m++) row[m] = (__m512)gather(rows.scale[m] + first * rows.step, rows.step, n);
  const __m512d a = (__m512d)_mm512_unpacklo_ps(row[0], row[1]), b = (__m512d)_mm512_unpacklo_ps(row[2], row[3]);
  const __m512d c = (__m512d)_mm512_unpackhi_ps(row[0], row[1]), d = (__m512d)_mm512_unpackhi_ps(row[2], row[3]);
  _mm512_storeu_ps(to[0], (__m512)_mm512_unpacklo_pd(a, b));
  _mm512_storeu_ps(to[1], (__m512)_mm512_unpackhi_pd(a, b));
  _mm512_storeu_ps(to[2], (__m512)_mm512_unpacklo_pd(c, d));
  _mm512_storeu_ps(to[3], (__m512)_mm512_unpackhi_pd(c, d));
}

// block[j] = bytes 16 j to 16 j + 15 of each row's 64, row after row, 128 added to each; the first n of a row are read.
template <class TS>
OM_INLINE void transpose_weights(const Int8Rows<TS>& rows, int64_t k, int n, __m512i* block) {
  const __m512i flip = _mm512_set1_epi8(-128);
  __m512i row[STREAMS];
  for (int m = 0; m < STREAMS; m++) {
    __builtin_prefetch(rows.w[m] + k + AHEAD / STREAMS);
    const __mmask64 first = n == kInt8Group ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
    const __m512i w =
        n == kInt8Group ? _mm512_loadu_si512(rows.w[m] + k) : _mm512_maskz_loadu_epi8(first, rows.w[m] + k);
    row[m] = _mm512_xor_si512(w, flip);
  }
  const __m512i a = _mm512_shuffle_i32x4(row[0], row[1], 0x44), b = _mm512_shuffle_i32x4(row[2], row[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(row[0], row[1], 0xee), d = _mm512_shuffle_i32x4(row[2], row[3], 0xee);
  block[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  block[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  block[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  block[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

OM_INLINE __m512i four_times(const void* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

// sum(w 2^8 upper digit) + sum(w lower digit), exactly: four of its lanes a row of weights.
OM_VNNI OM_INLINE __m512i two_digits(const __m512i* block, const int8_t* upper, const int8_t* lower,
                                     const int32_t* start) {
  __m512i high = _mm512_setzero_si512(), low = four_times(start);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    high = _mm512_dpbusd_epi32(high, block[j], four_times(upper + 16 * j));
    low = _mm512_dpbusd_epi32(low, block[j], four_times(lower + 16 * j));
  }
  return _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
}

// As dot_tile, for rows of x in digits.
template <int R, class TS>
OM_VNNI void dot_digits(const Int8Rows<TS>& rows, const DigitGroup* x, int64_t in, float (*sums)[STREAMS]) {
  const int64_t groups = groups_of(in);
  const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  __m512 upper[R] = {}, lower[R] = {};
  float scale[4][4][4];
  for (int64_t g = 0; g < groups; g++) {
    const auto at = static_cast<int>(g % 16);
    if (at == 0) transpose_scales(rows, g, static_cast<int>(std::min<int64_t>(16, groups - g)), scale);
    __m512i block[4];
    transpose_weights(rows, g * kInt8Group, static_cast<int>(std::min<int64_t>(kInt8Group, in - g * kInt8Group)),
                      block);
    const __m512 own = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(_mm_loadu_ps(scale[at % 4][at / 4])));
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const DigitGroup& group = x[r * groups + g];
      const __m512 unit = _mm512_mul_ps(own, _mm512_set1_ps(group.unit));
      const __m512i first = two_digits(block, group.digit[0], group.digit[1], group.start[0]);
      const __m512i second = two_digits(block, group.digit[2], group.digit[3], group.start[1]);
      upper[r] = _mm512_fmadd_ps(unit, _mm512_cvtepi32_ps(first), upper[r]);
      lower[r] = _mm512_fmadd_ps(unit, _mm512_cvtepi32_ps(second), lower[r]);
    }
  }
  for (int r = 0; r < R; r++) {
    float lane[STREAMS][4];
    _mm512_storeu_ps(lane, _mm512_fmadd_ps(lower[r], _mm512_set1_ps(0x1p-16f), upper[r]));
    for (int m = 0; m < STREAMS; m++) sums[r][m] = (lane[m][0] + lane[m][1]) + (lane[m][2] + lane[m][3]);
  }
}
#endif

}  // namespace
}  // namespace omnimamba
