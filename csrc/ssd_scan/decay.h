// The step sizes of a chunk and the decays between its positions, all from sums that begin nearby: a sum over a long
// stretch would lose the digits that a short difference needs, and exp(c_t) exp(-c_s) would overflow.
//
// In blocks of kBlock positions: within a block exp(c_t - c_s) of the difference itself; between blocks J < I the product
// of exp(c_t - c at the start of I) and exp(c at the start of I - c_s). Both are at most 1. A block's sums are two floats
// each, high and low: beside a step that nearly wipes out the state, one would lose digits of the short ones.
#pragma once
#include "pack.h"

namespace omnimamba::ssd {

// exp of less is 0 in float32, so steps may be cut here; sums then stay finite whatever dt is.
constexpr float kForgotten = -128.0f;

// A head's A, which may be -inf: what forgets all in any step, where a product with a step of 0, or with a gradient of 0,
// is still 0. A NaN stays one.
inline float finite_rate(float A) { return std::max(A, -1e30f); }

struct Decay {
  alignas(64) float dt[kRow];
  alignas(64) float local[kRow];       // c_t - c at the start of t's block,
  alignas(64) float low[kRow];         // and what its rounding left
  alignas(64) float row[kRow];         // exp(local)
  alignas(64) float from_start[kRow];  // exp(c_t)
  alignas(64) float to_end[kRow];      // exp(c_q - c_t)
  alignas(64) float weight[kRow];      // to_end dt
  float block[kChunk / kBlock];        // the sum of a over each block,
  float block_low[kChunk / kBlock];    // and what its rounding left
  float whole;                         // exp(c_q)
};

// high + low += a; low takes what high's rounding leaves.
OM_INLINE void add_to(float& high, float& low, float a) {
  const float sum = high + a, taken = sum - high;
  low += (high - (sum - taken)) + (a - taken);
  high = sum;
}

// dt[0 .. length) are the steps; zero beyond.
inline void fill_decay(const float* dt, float A, int length, Decay& d) {
  constexpr int blocks = kChunk / kBlock;
  for (int t = 0; t < kRow; t += W) store(d.dt + t, load_left(dt + t, std::min(length, kChunk) - t));
  std::fill_n(d.block, blocks, 0.0f);
  std::fill_n(d.block_low, blocks, 0.0f);
  for (int k = 0; k < kBlock; k++)
    for (int i = 0; i < blocks; i++) {  // the blocks' sums do not wait for one another
      const int t = i * kBlock + k;
      const float a = d.dt[t] * finite_rate(A);
      if (t < length) add_to(d.block[i], d.block_low[i], a < kForgotten ? kForgotten : a);  // a NaN stays one
      d.local[t] = d.block[i];
      d.low[t] = d.block_low[i];
    }
  float before = 0, all = 0;
  for (int i = 0; i < blocks; i++) all += d.block[i];
  for (int i = 0; i < blocks; i++) {
    float after = 0;
    for (int j = i + 1; j < blocks; j++) after += d.block[j];
    for (int t = i * kBlock; t < (i + 1) * kBlock; t += W) {
      vf local = load(d.local + t), low = load(d.low + t);
      vf end = vexp_decay(((splat(d.block[i]) - local) + (splat(d.block_low[i]) - low)) + splat(after));
      store(d.row + t, vexp_decay(local + low));
      store(d.from_start + t, vexp_decay((local + low) + splat(before)));
      store(d.to_end + t, end);
      store(d.weight + t, end * load(d.dt + t));
    }
    before += d.block[i];
  }
  for (int t = kChunk; t < kRow; t++)
    d.local[t] = d.low[t] = d.row[t] = d.from_start[t] = d.to_end[t] = d.weight[t] = 0;
  d.whole = one(vexp_decay, all);
}

// put(t, s, L) with L the vector of exp(c_t - c_s) for s <= t, zero for s > t, over every t < length and every vector of s
// in the blocks up to t's own.
template <class Put>
OM_INLINE void each_decay(const Decay& d, int length, Put&& put) {
  const vf lane = lane_index();
  // high + low - c_s, both counted from the start of s's block.
  const auto since = [&](float high, float low, int s) {
    return (splat(high) - load(d.local + s)) + (splat(low) - load(d.low + s));
  };
  for (int i = 0; i * kBlock < length; i++) {
    const int begin = i * kBlock, end = std::min(length, begin + kBlock);
    float gap = 0;
    for (int j = i - 1; j >= 0; gap += d.block[j--])
      for (int s = j * kBlock; s < (j + 1) * kBlock; s += W) {
        vf column = vexp_decay(since(d.block[j], d.block_low[j], s) + splat(gap));
        for (int t = begin; t < end; t++) put(t, s, column * splat(d.row[t]));
      }
    for (int t = begin; t < end; t++)
      for (int s = begin; s < begin + kBlock; s += W) {
        vi causal = lane + splat(static_cast<float>(s)) <= splat(static_cast<float>(t));
        put(t, s, s > t ? vf{} : select(causal, vexp_decay(since(d.local[t], d.low[t], s)), vf{}));
      }
  }
}

// M_ts = G_ts exp(c_t - c_s) dt_s. G may hold anything at s > t.
inline void fill_scores(const Decay& d, const float* G, int length, float* M) {
  each_decay(d, length, [&](int t, int s, vf L) {
    vf m = load(G + t * kRow + s) * (L * load(d.dt + s));
    store(M + t * kRow + s, select(L == vf{}, vf{}, m));  // a NaN decay shows
  });
}

}  // namespace omnimamba::ssd
