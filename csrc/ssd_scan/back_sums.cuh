// The scan's backward: what a block sums over its heads, in registers.
#pragma once
#include "back_roles.cuh"

namespace omnimamba::ssd {

// A warp's tiles on and below the diagonal: G = C B^T; and in shared memory, for registers are scarce,
// dG summed over heads.
template <class T, int N>
struct Scores {
  using Memory = BackLayout<T, N>;
  static constexpr int EACH = Memory::TILES_A_WARP;
  using Small = typename Memory::Small;
  float G[EACH][2][4];

  template <class Body>
  OM_DEVICE static void each_tile(Body&& body) {
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (warp_id() + i * WARPS < Memory::TILES) body(i, tile_place(warp_id() + i * WARPS));
  }

  // An element of dG that this lane alone has.
  OM_DEVICE static float& dG(Small& small, TilePlace tile, int i) {
    return small.dG[tile_number(tile.I, tile.J)][i][lane_id()];
  }

  OM_DEVICE void start(Small& small, const Rows<T, N>& B, const Rows<T, N>& C) {
#pragma unroll
    for (int i = 0; i < EACH * 8; i++) G[i / 8][i / 4 % 2][i % 4] = 0.0f;
    each_tile([&](int i, TilePlace tile) {
#pragma unroll
      for (int j = 0; j < 8; j++) dG(small, tile, j) = 0.0f;
#pragma unroll 1
      for (int k = 0; k < N; k += 16) {
        Right<T> right[2];
        load_rights<false>(right, B, k, tile.J * 16);
        const Left<T, 1> left(load_block<false>(C, tile.I * 16, k));
        multiply(G[i][0], left, right[0]);
        multiply(G[i][1], left, right[1]);
      }
    });
  }

  // M of a head.
  OM_DEVICE void write(const Rows<T, CHUNK<T>>& M, const float* steps) const {
    each_tile([&](int i, TilePlace tile) {
      each_decay(steps, CHUNK<T>, tile, [&](int j, int k, int t, int s, float L) {
        *M.at(t, s) = from_float<T>(scaled(G[i][j][k], scaled(steps[DT * CHUNK<T> + s], L)));
      });
    });
  }

  // dM of some channels of a head: what they add to the sums over T, and to dG.
  template <int PART, class Tile>
  OM_DEVICE void add(Small& small, const Rows<T, PART>& x, Tile&& dy, int terms, int width, const float* steps,
                     bool begins) {
    const float* dt = steps + DT * CHUNK<T>;
    each_tile([&](int i, TilePlace tile) {
      float dM[2][4] = {};
#pragma unroll 1
      for (int k = 0; k < width; k += 16) {
        Right<T> right[2];
        load_rights<false>(right, x, k, tile.J * 16);
        for (int term = 0; term < terms; term++) {
          const Left<T, 1> left(load_block<false>(dy(term), tile.I * 16, k));
          multiply(dM[0], left, right[0]);
          multiply(dM[1], left, right[1]);
        }
      }
      each_decay(steps, CHUNK<T>, tile, [&](int j, int k, int, int s, float L) {
        const float dML = scaled(dM[j][k], L);
        dG(small, tile, 4 * j + k) += scaled(dt[s], dML);
        dM[j][k] = scaled(G[i][j][k], dML);
      });
      sum_tile(dM, tile.I == tile.J, begins, dt + tile.J * 16, small.scratch[warp_id()],
               small.tiles[tile_number(tile.I, tile.J)]);
    });
  }

  OM_DEVICE void write_gradient(Small& small, const Rows<T, CHUNK<T>>& out) const {
    each_tile([&](int, TilePlace tile) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const Place place = fragment::c(lane_id(), j % 4);
        *out.at(tile.I * 16 + place.row, tile.J * 16 + place.column + j / 4 * 8) = from_float<T>(dG(small, tile, j));
      }
    });
  }
};

// dB and dC of a warp's 16 states and REACH positions, summed over heads.
template <class T, int N>
struct StateSums {
  using Memory = BackLayout<T, N>;
  static constexpr int REACH = Memory::REACH, HALVES = Memory::HALVES, PASSES = Memory::PASSES, ROWS = Memory::ROWS;
  using Sum = float[REACH / 16][2][4];
  Sum dB, dC;

  OM_DEVICE static int first_state(int pass) { return pass % HALVES * Memory::STATES + warp_id() % ROWS * 16; }
  OM_DEVICE static int first_position(int pass) { return (pass / HALVES * Memory::REACHES + warp_id() / ROWS) * REACH; }
  OM_DEVICE static bool works(const SsdScanParams& q, int pass) {
    return warp_id() < ROWS * Memory::REACHES && first_state(pass) < q.state;
  }

  // each(element, its place in the workspace): of dB, which = 0, or dC, 1
  template <class Each>
  OM_DEVICE static void each_place(Sum& sum, int which, const SsdScanParams& q, const Hand& at, int pass, Each&& each) {
    const int64_t row = q.groups * q.state, first = int64_t{at.chunk} * CHUNK<T> + first_position(pass);
    float* out = q.workspace.at<float>() + ((int64_t{2} * at.part + which) * q.batch + at.b) * q.length * row +
                 first * row + at.group * q.state + first_state(pass);
    const auto states = static_cast<int>(q.state) - first_state(pass);
    const int64_t positions = q.length - first;
#pragma unroll
    for (int t = 0; t < REACH / 16; t++) {
      sync_warp();  // else the compiler would hold all addresses at a time
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const Place place = fragment::a16(lane_id(), i);
        const int position = 16 * t + place.column;
        if (place.row < states && position < positions) each(sum[t][i / 4][i % 4], out + position * row + place.row);
      }
    }
  }
  // body(sum) adds to dB or dC: in registers, or where there are passes to what is in memory, `first` of all.
  template <class Body>
  OM_DEVICE static void add_to(Sum& kept, int which, const SsdScanParams& q, const Hand& at, int pass, bool first,
                               Body&& body) {
    if constexpr (PASSES == 1) {
      body(kept);
    } else {
      Sum sum;
      clear(sum);
      body(sum);
      each_place(sum, which, q, at, pass, [first](float v, float* here) { *here = first ? v : *here + v; });
    }
  }
  OM_DEVICE static void clear(Sum& sum) {
#pragma unroll
    for (int i = 0; i < REACH / 2; i++) sum[i / 8][i / 4 % 2][i % 4] = 0.0f;
  }
  OM_DEVICE void clear() {
    clear(dB);
    clear(dC);
  }

  // What comes through the state after position `last`, whose gradient lies at dS, and (`own`) through the one before.
  template <int PART, class Tile>
  OM_DEVICE void add(const SsdScanParams& q, const Hand& at, typename Memory::Small& small, const Rows<T, N>& B,
                     const Rows<T, N>& C, const Rows<T, PART>& x, Tile&& dy, int terms, const float* S, const float* dS,
                     int last, bool own, bool first) {
    const float *dt = at.steps + DT * CHUNK<T>, *carry = at.steps + CARRY * CHUNK<T>;
    const float *high = at.steps + HIGH * CHUNK<T>, *low = at.steps + LOW * CHUNK<T>;
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
      if (!works(q, pass)) continue;
      const int n0 = first_state(pass), t0 = first_position(pass);
      if (own)
        add_to(dC, 1, q, at, pass, first, [&](Sum& sum) {
          through_state<T, N, PART, REACH>(sum, small.R + n0 / 16 * CHUNK<T>, q, at, S, nullptr, C, n0, t0, terms, dy,
                                           [&](int t) { return Factors{carry[t], carry[t]}; });
        });
      float W = 0.0f;
      add_to(dB, 0, q, at, pass, first, [&](Sum& sum) {
        W = through_state<T, N, PART, REACH>(
            sum, small.U + n0 / 16 * CHUNK<T>, q, at, dS, t0 == 0 ? S : nullptr, B, n0, t0, 1, [&](int) { return x; },
            [&](int s) {
              const float tail = s <= last ? power_of_two((high[last] - high[s]) + (low[last] - low[s])) : 0.0f;
              return Factors{scaled(dt[s], tail), tail};
            });
      });
      if (t0 == 0) {
        const float sum = warp_sum(W);
        if (lane_id() == 0) small.W[n0 / 16] = scaled(sum, carry[last]);
      }
    }
  }

  // And through the scores: their gradients dG.
  OM_DEVICE void finish(const SsdScanParams& q, const Hand& at, const Rows<T, N>& B, const Rows<T, N>& C,
                        const Rows<T, CHUNK<T>>& dG) {
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
      if (!works(q, pass)) continue;
      const int n0 = first_state(pass), t0 = first_position(pass);
      add_to(dC, 1, q, at, pass, false, [&](Sum& sum) {
#pragma unroll 1
        for (int k = 0; k < t0 + REACH; k += 16) {
          const Left<T, 1> left(load_block<true>(B, k, n0));
#pragma unroll
          for (int t = 0; t < REACH / 16; t++) {
            if (k > t0 + 16 * t) continue;
            Right<T> right[2];
            load_rights<false>(right, dG, k, t0 + 16 * t);
            multiply(sum[t][0], left, right[0]);
            multiply(sum[t][1], left, right[1]);
          }
        }
      });
      add_to(dB, 0, q, at, pass, false, [&](Sum& sum) {
#pragma unroll 1
        for (int k = t0; k < CHUNK<T>; k += 16) {
          const Left<T, 1> left(load_block<true>(C, k, n0));
#pragma unroll
          for (int t = 0; t < REACH / 16; t++) {
            if (k < t0 + 16 * t) continue;
            Right<T> right[2];
            load_rights<true>(right, dG, k, t0 + 16 * t);
            multiply(sum[t][0], left, right[0]);
            multiply(sum[t][1], left, right[1]);
          }
        }
      });
      if (PASSES > 1) continue;
      auto put = [](float v, float* here) { *here = v; };
      each_place(dB, 0, q, at, pass, put);
      each_place(dC, 1, q, at, pass, put);
    }
  }
};

}  // namespace omnimamba::ssd
