// One vector type for every instruction set, written with the vector extensions of GCC and Clang.
// vf holds W floats. The compiler's flags choose W: 16 with AVX-512, 8 with AVX2, 4 elsewhere (SSE2, NEON).
// a * b + c contracts to a fused multiply-add where the target has one (-ffp-contract=fast).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace omnimamba {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));  // W halves, as bits

#ifndef OM_INLINE
#define OM_INLINE inline __attribute__((always_inline))
#endif

OM_INLINE vf splat(float a) { return a - vf{}; }
OM_INLINE vi splat_int(int32_t a) { return a - vi{}; }

// ---- memory: load and store W values of a storage type; *_part touches only the first n ----

OM_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
OM_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

OM_INLINE vf from_bits(vh h, bf16) { return (vf)(__builtin_convertvector(h, vu) << 16); }

// Rounds to nearest even; a NaN stays a NaN.
OM_INLINE vh to_bits(vf v, bf16) {
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector(v != v ? quiet : rounded, vh);
}

#if defined(__AVX512F__)
OM_INLINE vf from_bits(vh h, f16) { return (vf)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
OM_INLINE vh to_bits(vf v, f16) { return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
OM_INLINE vf from_bits(vh h, f16) { return (vf)_mm256_cvtph_ps((__m128i)h); }
OM_INLINE vh to_bits(vf v, f16) { return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
OM_INLINE vf from_bits(vh h, f16) { return (vf)vcvt_f32_f16((float16x4_t)h); }
OM_INLINE vh to_bits(vf v, f16) { return (vh)vcvt_f16_f32((float32x4_t)v); }
#else
// Without conversion instructions. A half's exponent is rebased by a multiplication, which also makes subnormals right.
OM_INLINE vf from_bits(vh h, f16) {
  vu u = __builtin_convertvector(h, vu);
  vu magnitude = (u & 0x7fffu) << 13;
  vf value = (vf)magnitude * splat(0x1p112f);
  vu special = (vu)((vi)magnitude >= splat_int(0x0f800000));  // inf or NaN
  vu bits = ((vu)value & ~special) | ((magnitude | 0x7f800000u) & special);
  return (vf)(bits | ((u & 0x8000u) << 16));
}
OM_INLINE vh to_bits(vf v, f16) {
  vu u = (vu)v;
  vu sign = (u >> 16) & 0x8000u;
  vu a = u & 0x7fffffffu;
  vu normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;  // rounds to nearest even
  vu tiny = (vu)((vf)a + splat(0.5f)) - 0x3f000000u;                 // below 2^-14: the adder rounds to 2^-24
  vu is_tiny = (vu)((vi)a < splat_int(113 << 23));
  vu is_big = (vu)((vi)a >= splat_int(0x477ff000));  // rounds to 65536 or is inf
  vu is_nan = (vu)((vi)a > splat_int(0x7f800000));
  vu half = (tiny & is_tiny) | (normal & ~is_tiny);
  half = (half & ~is_big) | (0x7c00u & is_big);
  half = (half & ~is_nan) | (0x7e00u & is_nan);
  return __builtin_convertvector(half | sign, vh);
}
#endif

template <class Half>
OM_INLINE vf load(const Half* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return from_bits(h, Half{});
}
template <class Half>
OM_INLINE void store(Half* p, vf v) {
  vh h = to_bits(v, Half{});
  std::memcpy(p, &h, sizeof h);
}

// Stores W values around the caches, where the target can: for lines written whole and read late. p is aligned to them.
// Other threads see them after finish_stores(), which ends each part of parallel work.
template <class T>
OM_INLINE void store_around(T* p, vf v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_stream_ps(p, (__m512)v);
  } else {
    _mm256_stream_si256((__m256i*)p, (__m256i)to_bits(v, T{}));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    _mm256_stream_ps(p, (__m256)v);
  } else {
    _mm_stream_si128((__m128i*)p, (__m128i)to_bits(v, T{}));
  }
#else
  store(p, v);
#endif
}
OM_INLINE void finish_stores() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Compilers widen bytes one by one where they are not told the instruction.
OM_INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)
  const vi wide = (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  const vi wide = (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__SSE2__)
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  const __m128i bytes = _mm_cvtsi32_si128(four), pairs = _mm_unpacklo_epi8(bytes, bytes);
  const vi wide = (vi)_mm_srai_epi32(_mm_unpacklo_epi16(pairs, pairs), 24);
#elif defined(__aarch64__)
  uint32_t four;
  std::memcpy(&four, p, sizeof four);
  const vi wide = (vi)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))));
#else
  vi wide;
  for (int i = 0; i < W; i++) wide[i] = p[i];
#endif
  return __builtin_convertvector(wide, vf);
}

template <class T>
OM_INLINE vf load_part(const T* p, int n) {
#if defined(__AVX512F__)
  const auto first = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return (vf)_mm512_maskz_loadu_ps(first, p);
  if constexpr (sizeof(T) == 2) return from_bits((vh)_mm256_maskz_loadu_epi16(first, p), T{});
#endif
  T buffer[W] = {};
  std::memcpy(static_cast<void*>(buffer), p, sizeof(T) * static_cast<size_t>(n));
  return load(buffer);
}
template <class T>
OM_INLINE void store_part(T* p, vf v, int n) {
#if defined(__AVX512F__)
  const auto first = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, first, (__m512)v);
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, first, (__m256i)to_bits(v, T{}));
#endif
  T buffer[W];
  store(buffer, v);
  std::memcpy(static_cast<void*>(p), buffer, sizeof(T) * static_cast<size_t>(n));
}

OM_INLINE float to_float(float a) { return a; }
template <class Half>
OM_INLINE float to_float(Half a) {
  vh h = {a.bits};
  return from_bits(h, Half{})[0];
}
template <class T>
OM_INLINE T from_float(float a) {
  T out;
  store_part(&out, splat(a), 1);
  return out;
}
template <>
OM_INLINE float from_float<float>(float a) {
  return a;
}

// ---- arithmetic ----

OM_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
OM_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }  // b where a is NaN
OM_INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }
// 0, 1, 2, ... W - 1.
OM_INLINE vf lane_index() {
  vf v{};
  for (int i = 0; i < W; i++) v[i] = static_cast<float>(i);
  return v;
}
OM_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }

// Adds the N lanes of a vector in a fixed order: the upper half onto the lower, and so on.
template <int N, class Vector>
OM_INLINE float sum_lanes(const Vector& v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typedef float Half __attribute__((vector_size(2 * N)));
    Half half[2];
    std::memcpy(half, &v, sizeof half);
    return sum_lanes<N / 2>(half[0] + half[1]);
  }
}
OM_INLINE float sum(vf v) { return sum_lanes<W>(v); }

// 2^k e^r = e^x with |r| <= ln 2 / 2: e^r by a polynomial of degree 6, and k, as both kinds of number.
struct ExpParts {
  vf fraction, k;
  vi whole;
};
OM_INLINE ExpParts exp_parts(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = x * splat(1.44269504f) + magic;
  vf k = shifted - magic;
  vf r = x - k * splat(0.693359375f);
  r = r - k * splat(-2.12194440e-4f);
  vf e = splat(1.9875691500e-4f);
  e = e * r + splat(1.3981999507e-3f);
  e = e * r + splat(8.3334519073e-3f);
  e = e * r + splat(4.1665795894e-2f);
  e = e * r + splat(1.6666665459e-1f);
  e = e * r + splat(5.0000001201e-1f);
  return {e * (r * r) + r + splat(1.0f), k, (vi)shifted - (vi)magic};
}

#if defined(__AVX512F__)
// The smaller and the larger of a limit and x; a NaN stays one. 2^k e^r, infinite or 0 beyond the range.
OM_INLINE vf at_most(float limit, vf x) { return (vf)_mm512_min_ps((__m512)splat(limit), (__m512)x); }
OM_INLINE vf at_least(float limit, vf x) { return (vf)_mm512_max_ps((__m512)splat(limit), (__m512)x); }
OM_INLINE vf joined(ExpParts e) { return (vf)_mm512_scalef_ps((__m512)e.fraction, (__m512)e.k); }
#else
OM_INLINE vf at_most(float limit, vf x) { return select(x > splat(limit), splat(limit), x); }
OM_INLINE vf at_least(float limit, vf x) { return select(x < splat(limit), splat(limit), x); }
OM_INLINE vf joined(ExpParts e) {
  const vi half = e.whole >> 1;
  return e.fraction * (vf)((half + 127) << 23) * (vf)((e.whole - half + 127) << 23);
}
#endif

// e^x. Error below 2 ulp; 0 under -103.98, inf over 88.73, NaN stays NaN.
OM_INLINE vf vexp(vf x) { return joined(exp_parts(at_most(89.0f, at_least(-104.0f, x)))); }

// e^x for x in [-87, 0] and below (0 there): one factor, for decays.
OM_INLINE vf vexp_decay(vf x) {
  const ExpParts e = exp_parts(at_least(-87.0f, x));
  return select(x < splat(-87.0f), vf{}, e.fraction * (vf)((e.whole + 127) << 23));
}

OM_INLINE vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + vexp(-x)); }
OM_INLINE vf silu(vf x) { return x * sigmoid(x); }

// d silu / dx = s (1 + x (1 - s)), s = sigmoid(x).
OM_INLINE vf silu_slope(vf x) {
  vf s = sigmoid(x);
  return s * (splat(1.0f) + x * (splat(1.0f) - s));
}

// ln(1 + u) for u in [0, 1]: 2 artanh(u / (2 + u)), the series to s^15 (s <= 1/3).
OM_INLINE vf log1p_unit(vf u) {
  vf s = u / (splat(2.0f) + u);
  vf q = s * s;
  vf t = splat(1.0f / 15);
  t = t * q + splat(1.0f / 13);
  t = t * q + splat(1.0f / 11);
  t = t * q + splat(1.0f / 9);
  t = t * q + splat(1.0f / 7);
  t = t * q + splat(1.0f / 5);
  t = t * q + splat(1.0f / 3);
  return splat(2.0f) * (s + s * q * t);
}

// ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|); x itself above 20, as torch has it.
OM_INLINE vf softplus(vf x) {
  vf soft = select(x > vf{}, x, vf{}) + log1p_unit(vexp(-vabs(x)));
  return select(x > splat(20.0f), x, select(x != x, x, soft));
}

// One value through a vector function: the same bits as in a full vector.
template <class F>
OM_INLINE float one(F f, float a) {
  return f(splat(a))[0];
}

}  // namespace omnimamba
