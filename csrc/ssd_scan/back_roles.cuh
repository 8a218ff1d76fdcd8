// The scan's backward, tile by tile: what the roles of cuda_backward.cu do with a head's channels and states.
#pragma once
#include "back_terms.cuh"

namespace omnimamba::ssd {

constexpr int WARPS = MOST_THREADS / WARP;

// How the grid covers a group's heads, and what a block keeps in shared memory.
struct BackCover {
  int part_heads, parts;
  int terms;   // numbers of T that dy is the sum of: three bf16 behind a gate, else one
  int stages;  // heads whose x and dy are in shared memory
};

template <class T, int N>
struct BackLayout {
  static constexpr int BLOCKS = CHUNK<T> / 16, TILES = BLOCKS * (BLOCKS + 1) / 2,
                       TILES_A_WARP = (TILES + WARPS - 1) / WARPS;
  static constexpr int PART = N > 128 ? 32 : 64;  // channels at a time
  static constexpr int COLUMNS = PART / 16, SPANS = WARPS / COLUMNS < BLOCKS ? WARPS / COLUMNS : BLOCKS;
  static constexpr int SPAN = CHUNK<T> / SPANS;
  // More than 128 states are worked off in passes: of each half of them, each half of the positions.
  static constexpr int STATES = OWN<N>, ROWS = STATES / 16, HALVES = N / STATES, PASSES = HALVES * HALVES;
  static constexpr int REACHES = WARPS / ROWS < BLOCKS ? WARPS / ROWS : BLOCKS, REACH = CHUNK<T> / REACHES / HALVES;
  static constexpr int GROUP = CHUNK<T> * Rows<T, N>::PITCH, HEAD = CHUNK<T> * Rows<T, PART>::PITCH;
  static constexpr int SCORES = CHUNK<T> * Rows<T, CHUNK<T>>::PITCH;
  static constexpr int SUMS = N / 16 * CHUNK<T>;

  // In float32, beside the tiles of T.
  struct Small {
    StepGradient<T> gathered;
    float R[SUMS], U[SUMS], W[16];
    float steps[2][STEPS * CHUNK<T>];
    TileSums tiles[TILES];
    float dG[TILES][8][WARP];
    float scratch[WARPS][16 * OUT_PITCH];
  };
  int terms, stages;
  OM_HOST_DEVICE explicit BackLayout(const BackCover& c) : terms(c.terms), stages(c.stages) {}
  OM_HOST_DEVICE size_t bytes() const {
    return sizeof(T) * static_cast<size_t>(2 * GROUP + SCORES + (2 * stages + terms - 1) * HEAD) + sizeof(Small);
  }
  OM_DEVICE Rows<T, N> B(unsigned char* memory) const { return {reinterpret_cast<T*>(memory)}; }
  OM_DEVICE Rows<T, N> C(unsigned char* memory) const { return {B(memory).base + GROUP}; }
  OM_DEVICE Rows<T, CHUNK<T>> M(unsigned char* memory) const { return {C(memory).base + GROUP}; }
  OM_DEVICE Rows<T, PART> x(unsigned char* memory, int stage) const {
    return {M(memory).base + SCORES + 2 * stage * HEAD};
  }
  // Term 0 of dy lies where it was fetched to, the others behind the stages.
  OM_DEVICE Rows<T, PART> dy(unsigned char* memory, int stage, int term) const {
    return {x(memory, term ? stages : stage).base + (term ? term - 1 : 1) * HEAD};
  }
  OM_DEVICE Small& small(unsigned char* memory) const {
    return *reinterpret_cast<Small*>(x(memory, stages).base + (terms - 1) * HEAD);
  }
};

// What a block has in hand: a head, or PART channels of it.
struct Hand {
  int b, group, chunk, h;
  int part;       // of the group's heads
  int p0, width;  // channels
  uint64_t used;
  const float* steps;
};

// dy through the gate, as the sum of three bf16 or in its place; dz.
template <class T, int WIDTH, class Layout>
OM_DEVICE void open_gate(const SsdScanParams& q, const Layout& layout, unsigned char* memory, int stage,
                         const Hand& at) {
  const Rows<T, WIDTH> dy = layout.dy(memory, stage, 0);
  for (int i = static_cast<int>(threadIdx.x); i < CHUNK<T> * WIDTH; i += MOST_THREADS) {
    const int row = i / WIDTH, column = i % WIDTH;
    const int64_t t = int64_t{at.chunk} * CHUNK<T> + row;
    float v = to_float(*dy.at(row, column)), slope = 0.0f;
    if (column < at.width && (at.used >> row & 1)) {
      const float z = to_float(*q.z.at<T>(at.b, t, at.h, at.p0 + column));
      slope = v * to_float(*q.ungated.at<T>(at.b, t, at.h, at.p0 + column)) * silu_slope(z);
      v *= silu(z);
    }
    for (int term = 0; term < layout.terms; term++) {
      const T part = from_float<T>(v);
      *layout.dy(memory, stage, term).at(row, column) = part;
      v -= to_float(part);
    }
    if (column < at.width && t < q.length) *q.dz.at<T>(at.b, t, at.h, at.p0 + column) = from_float<T>(slope);
  }
}

// c += a times term number `term` of b; products too small to count are left out.
template <class T, int TERMS>
OM_DEVICE void multiply_term(float (&c)[4], const Left<T, TERMS>& a, const Right<T>& b, int term) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = TERMS - 1; i >= 0; i--)
      if (i + term < TERMS) mma<T>(c, a.pair[i], b.pair);
  } else {
    multiply(c, a, b);
  }
}

// The decay of each pair of a tile's accumulators.
template <class Each>
OM_DEVICE void each_decay(const float* steps, int chunk, TilePlace tile, Each&& each) {
  const float *high = steps + HIGH * chunk, *low = steps + LOW * chunk;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const Place place = fragment::c(lane_id(), i % 4);
    const int t = tile.I * 16 + place.row, s = tile.J * 16 + place.column + i / 4 * 8;
    const float L = s <= t ? power_of_two((high[t] - high[s]) + (low[t] - low[s])) : 0.0f;
    each(i / 4, i % 4, t, s, L);
  }
}

// The warp's 16 x 16 tile, transposed, to `to`: rows of it are channels from p0 on, columns positions from `row` on.
template <class T>
OM_DEVICE void store_turned(const SsdScanParams& q, const View& to, const Hand& at, int p0, int row,
                            const float (&first)[4], const float (&second)[4], float* turn) {
  float v[8];
  turn_block(v, first, second, turn);
  const int64_t t = int64_t{at.chunk} * CHUNK<T> + row + lane_id() / 2;
  if (t < q.length) put_channels<T>(to.at<T>(at.b, t, at.h), p0 + lane_id() % 2 * 8, static_cast<int>(q.headdim), v);
}

// dS, or V, of a state's 16 rows (channels) by 16 columns from memory; TURNED: columns are the rows of the block.
template <bool TURNED>
OM_DEVICE void read_state(float (&out)[8], const float* state, int p0, int n0, const SsdScanParams& q) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const Place place = fragment::a16(lane_id(), i);
    const int row = p0 + (TURNED ? place.column : place.row), column = n0 + (TURNED ? place.row : place.column);
    out[i] = row < q.headdim && column < q.state ? state[row * q.state + column] : 0.0f;
  }
}

// Of channels: dx through the state after position `last`, whose gradient lies at dS.
template <class T, int N, int SPAN>
OM_DEVICE void from_state_gradient(float (&dx)[SPAN / 8][4], const SsdScanParams& q, const Hand& at,
                                   const Rows<T, N>& B, const float* dS, int p0, int s0, int last) {
  const float *dt = at.steps + DT * CHUNK<T>, *high = at.steps + HIGH * CHUNK<T>, *low = at.steps + LOW * CHUNK<T>;
  float found[SPAN / 8][4] = {};
#pragma unroll 2
  for (int k = 0; k < N; k += 16) {
    if (k >= q.state) break;
    float v[8];
    read_state<false>(v, dS, p0, k, q);
    const Left<T, 1> left(v);
#pragma unroll
    for (int s = 0; s < SPAN / 8; s += 2) {
      Right<T> right[2];
      load_rights<false>(right, B, k, s0 + 8 * s);
      multiply(found[s], left, right[0]);
      multiply(found[s + 1], left, right[1]);
    }
  }
#pragma unroll
  for (int s = 0; s < SPAN / 8; s++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at_s = s0 + 8 * s + state_column(i);
      const float tail = at_s <= last ? power_of_two((high[last] - high[at_s]) + (low[last] - low[at_s])) : 0.0f;
      dx[s][i] += scaled(found[s][i], scaled(dt[at_s], tail));
    }
}

struct Factors {
  float scale, dot;
};

// sum += scale_t Y_t, and into dots[t] the sum over the warp's 16 states, from column n0 of `with` on, of with_t dot_t Y_t.
template <int REACH, class T, int WIDTH, class Factor>
OM_DEVICE void share_out(float (&sum)[REACH / 16][2][4], float* dots, const float (&Y)[REACH / 16][2][4],
                         const Rows<T, WIDTH>& with, int n0, int t0, Factor&& factor) {
#pragma unroll
  for (int t = 0; t < REACH / 16; t++) {
    const Block<T> block = load_block<true>(with, t0 + 16 * t, n0);
    float dot[4] = {};  // of four positions
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const Factors f = factor(t0 + 16 * t + block_column(i));
      const float y = Y[t][i / 4][i % 4];
      sum[t][i / 4][i % 4] += scaled(y, f.scale);
      dot[i / 4 * 2 + i % 2] += scaled(y * block.value(i), f.dot);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int bits = 4; bits < WARP; bits *= 2) dot[i] += shuffle_xor(dot[i], bits);
      if (lane_id() < 4) dots[t0 + 16 * t + i / 2 * 8 + lane_id() * 2 + i % 2] = dot[i];
    }
  }
}

// Of states: Y^T (the 16 states from n0 on by REACH positions) = state^T times rows^T, summed over `terms` tiles of rows.
// sum += scale_t Y_t, and into dots[t] the sum over the states of with_t dot_t Y_t. Returns <state, other>, where there is one.
template <class T, int N, int PART, int REACH, class Tile, class Factor>
OM_DEVICE float through_state(float (&sum)[REACH / 16][2][4], float* dots, const SsdScanParams& q, const Hand& at,
                              const float* state, const float* other, const Rows<T, N>& with, int n0, int t0, int terms,
                              Tile&& rows, Factor&& factor) {
  float Y[REACH / 16][2][4] = {}, W = 0.0f;
#pragma unroll 1
  for (int k = 0; k < PART; k += 16) {
    if (k >= at.width) break;
    float v[8], u[8];
    read_state<true>(v, state, at.p0 + k, n0, q);
    if (other) {
      read_state<true>(u, other, at.p0 + k, n0, q);
#pragma unroll
      for (int i = 0; i < 8; i++) W += v[i] * u[i];
    }
    const Left<T, 3> left(v);
    for (int term = 0; term < terms; term++) {
      const Rows<T, PART> tile = rows(term);
#pragma unroll
      for (int t = 0; t < REACH / 16; t++) {
        Right<T> right[2];
        load_rights<false>(right, tile, k, t0 + 16 * t);
        multiply_term(Y[t][0], left, right[0], term);
        multiply_term(Y[t][1], left, right[1], term);
      }
    }
  }
  share_out<REACH>(sum, dots, Y, with, n0, t0, factor);
  return W;
}

// dD of the warp's 16 channels.
template <class T, int PART, class Tile>
OM_DEVICE void skip_gradient(float* out, const Hand& at, const Rows<T, PART>& x, int column, int terms, Tile&& dy) {
  float sum[2] = {};
#pragma unroll 1
  for (int t = 0; t < CHUNK<T>; t += 16) {
    const Block<T> a = load_block<true>(x, t, column);
    for (int term = 0; term < terms; term++) {
      const Block<T> b = load_block<true>(dy(term), t, column);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i / 2 % 2] += a.value(i) * b.value(i);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    sum[half] += shuffle_xor(sum[half], 1);
    sum[half] += shuffle_xor(sum[half], 2);
    const int channel = column + lane_id() / 4 + 8 * half;
    if (lane_id() % 4 == 0 && channel < at.width) out[at.p0 + channel] = sum[half];
  }
}

// dx through the scores: of the warp's 16 channels and SPAN positions from s0 on.
template <class T, int SPAN, int PART>
OM_DEVICE void from_scores(float (&dx)[SPAN / 8][4], const Rows<T, PART>& dy, const Rows<T, CHUNK<T>>& M, int column,
                           int s0) {
#pragma unroll 1
  for (int k = s0; k < CHUNK<T>; k += 16) {
    const Left<T, 1> left(load_block<true>(dy, k, column));
#pragma unroll
    for (int s = 0; s < SPAN / 8; s += 2) {
      if (s0 + 8 * s > k) continue;
      Right<T> right[2];
      load_rights<true>(right, M, k, s0 + 8 * s);
      multiply(dx[s], left, right[0]);
      multiply(dx[s + 1], left, right[1]);
    }
  }
}

// dx + D dy on its way out.
template <class T, int SPAN, class Tile>
OM_DEVICE void store_dx(const SsdScanParams& q, const Hand& at, float (&dx)[SPAN / 8][4], Tile&& dy, int terms,
                        int column, int s0, float* turn) {
#pragma unroll
  for (int s = 0; s < SPAN / 8; s += 2) {
    for (int term = 0; q.D && term < terms; term++) {
      const Block<T> block = load_block<true>(dy(term), s0 + 8 * s, column);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int channel = at.p0 + column + fragment::a16(lane_id(), i).row;
        if (channel < q.headdim) dx[s + i / 4][i % 4] += *q.D.at<float>(at.h, channel) * block.value(i);
      }
    }
    store_turned<T>(q, q.dx, at, at.p0 + column, s0 + 8 * s, dx[s], dx[s + 1], turn);
  }
}

}  // namespace omnimamba::ssd
