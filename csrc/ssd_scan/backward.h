// The backward pass for one head and chunk.
//
// Maths. With dS' the gradient of the state after the chunk, dM = dy x^T on and below the diagonal, L_ts = exp(c_t - c_s):
//   dx = w (B dS') + M^T dy + D dy              dS = exp(c_q) dS' + C^T (exp(c) dy)
//   dG = dM L dt                                dC = exp(c) (dy S^T) + dG B        dB = w (x dS'^T) + dG^T C
// and for the steps, with P = dM o M off the diagonal, R_t = C_t . (the first part of dC_t), U_s = B_s . (x dS'^T)_s:
//   da_r = sum of P over s < r <= t + sum of exp(c_t) R_t over t >= r + sum of w_s U_s over s < r + exp(c_q) <S, dS'>
//   ddt_s = A da_s + sum over t of (dM L G)_ts + exp(c_q - c_s) U_s
#pragma once
#include "ahead.h"
#include "prepare.h"

namespace omnimamba::ssd {

// What one thread needs for one head and chunk.
struct BackwardScratch {
  BackwardScratch(Arena& arena, const Sizes& z)
      : x(arena.take(z.panels * panel_floats())),
        dy(arena.take(z.panels * panel_floats())),
        weighted(arena.take(z.panels * panel_floats())),
        x_columns(arena.take(int64_t{z.panels} * kTileColumns * kRow)),
        dy_columns(arena.take(int64_t{z.panels} * kTileColumns * kRow)),
        M(arena.take(kRow * kRow)),
        L(arena.take(kRow * kRow)),
        dM(arena.take(kRow * kRow)),
        rows(arena.take(int64_t{kRow} * z.bc_row)),
        D(arena.take(int64_t{z.panels} * kTileColumns)),
        decay(reinterpret_cast<Decay*>(arena.take(sizeof(Decay) / sizeof(float)))),
        sums(reinterpret_cast<Sums*>(arena.take(sizeof(Sums) / sizeof(float)))) {}

  // Sums for the steps' gradients, named as in the maths. Those of P are double: what lies on one side of a position is in
  // both, and large beside the difference that remains.
  struct Sums {
    alignas(64) double row_P[kRow], column_P[kRow];
    alignas(64) float column_T[kRow], R[kRow], U[kRow];
  };
  float *x, *dy, *weighted;       // panels: x, dy before the gate, exp(c) dy
  float *x_columns, *dy_columns;  // [p][t]
  float *M, *L, *dM;
  float* rows;  // a group's dB or dC
  float* D;
  Decay* decay;
  Sums* sums;
};

// Sums over some heads of a group, in the layout of GroupPack.
struct GroupGradient {
  float *dB_columns, *dC_columns, *dG;
  static GroupGradient take(Arena& arena, const Sizes& z) {
    int64_t columns = int64_t{z.state_rows} * kRow;
    return {arena.take(columns), arena.take(columns), arena.take(kRow * kRow)};
  }
};

// A unit's operands.
struct BackwardUnit {
  const SsdScanParams& q;
  const Sizes& z;
  Unit at;
  BackwardScratch s;
  GroupPack pack;
  GroupGradient sum;
  const float *dt, *slope;
  const float* state;  // before the chunk; null where it does not count
  const float* dnext;  // gradient of the state after it
  Ahead& ahead;
};

// x and dy, raw, weighted and transposed; through the gate, which gives dz as well.
template <class T>
void pack_dy(const BackwardUnit& u) {
  const SsdScanParams& q = u.q;
  const auto [b, c, h, in_slab, chunk] = u.at;
  if (!q.z) return pack_panels(q.dy.at<T>(b, chunk.start, h), q.dy.stride[1], chunk.length, u.z, u.s.dy);
  for (int t = 0; t < chunk.length; t++)
    for (int column = 0; column < u.z.panels * kTileColumns; column += W) {
      const int left = u.z.p - column, panel = column / kTileColumns;
      float* out = u.s.dy + panel * panel_floats() + t * kTileColumns + column % kTileColumns;
      if (left <= 0) {
        store(out, vf{});
        continue;
      }
      const int64_t row = chunk.start + t;
      vf dy = load_left(q.dy.at<T>(b, row, h) + column, left), z = load_left(q.z.at<T>(b, row, h) + column, left);
      vf ungated = load_left(q.ungated.at<float>(b, row, h) + column, left);
      store_left(q.dz.at<T>(b, row, h) + column, dy * ungated * silu_slope(z), left);
      store(out, dy * silu(z));
    }
}

template <class T>
void pack_head(const BackwardUnit& u) {
  const Chunk& chunk = u.at.chunk;
  pack_panels(u.q.x.at<T>(u.at.b, chunk.start, u.at.h), u.q.x.stride[1], chunk.length, u.z, u.s.x);
  pack_dy<T>(u);
  for (int j = 0; j < u.z.panels; j++) {
    const int64_t at = j * panel_floats();
    for (int t = 0; t < chunk.length; t++)
      for (int v = 0; v < kTileColumns; v += W) {
        const int64_t i = at + t * kTileColumns + v;
        store(u.s.weighted + i, load(u.s.dy + i) * splat(u.s.decay->from_start[t]));
      }
    const int columns = std::min(kTileColumns, u.z.p - j * kTileColumns);
    const int64_t out = int64_t{j} * kTileColumns * kRow;
    pack_columns(u.s.x + at, kTileColumns, chunk.length, columns, kTileColumns, u.s.x_columns + out);
    pack_columns(u.s.dy + at, kTileColumns, chunk.length, columns, kTileColumns, u.s.dy_columns + out);
  }
}

// dx = w (B dS') + M^T dy + D dy.
template <class T>
void input_gradient(const BackwardUnit& u) {
  for (int64_t i = 0; i < u.z.p; i++) u.s.D[i] = u.q.D ? *u.q.D.at<float>(u.at.h, i) : 0.0f;
  for (int j = 0; j < u.z.panels; j++)
    each_tile(u.at.chunk.length, [&](auto height, int s0) {
      const float* dy = u.s.dy + j * panel_floats() + s0 * kTileColumns;
      u.ahead.row();
      Tile<height> tile;
      for (int k = 0; k < u.z.n; k += kChunk)
        add_states(tile, u.pack.B_positions, s0, k, std::min(k + kChunk, u.z.n), u.dnext + j * u.z.state_panel,
                   kTileColumns);
      tile_each(tile, [&](int r, int, vf& acc) { acc *= splat(u.s.decay->weight[s0 + r]); });
      const int rows = u.at.chunk.length - s0, columns = u.z.p - j * kTileColumns;
      tile_add<1>(tile, rows, u.s.M + s0 * kRow + s0, kRow, dy, kTileColumns);
      const float* D = u.s.D + j * kTileColumns;
      const int64_t step = u.q.dx.stride[1];
      T* dx = u.q.dx.at<T>(u.at.b, u.at.chunk.start + s0, u.at.h) + j * kTileColumns;
      tile_each(tile, [=](int r, int v, vf& acc) {
        if (r >= rows) return;
        acc += load(D + v * W) * load(dy + r * kTileColumns + v * W);
        store_left(dx + r * step + v * W, acc, columns - v * W);
      });
    });
}

// dM, and from it dG and the sums row_P, column_P, column_T (T = dM L G).
inline void score_gradient(const BackwardUnit& u) {
  const int length = u.at.chunk.length;
  for (int t = 0; t < length; t += kTileRows)
    for (int s = 0; s < std::min(length, t + kTileRows); s += kTileColumns) {
      Tile tile;
      tile_add<1>(tile, u.z.p, u.s.dy_columns + t, kRow, u.s.x_columns + s, kRow);
      tile_each(tile, [&](int r, int v, vf& acc) { store(u.s.dM + (t + r) * kRow + s + v * W, acc); });
    }
  typedef double Wide __attribute__((vector_size(8 * W)));
  BackwardScratch::Sums& sums = *u.s.sums;
  for (int t = 0; t < length; t++) {
    Wide row{};
    for (int s = 0; s < (t / kBlock + 1) * kBlock; s += W) {
      const int at = t * kRow + s;
      const vf L = load(u.s.L + at), dt = load(u.s.decay->dt + s);
      const vf dML = select(L > vf{}, load(u.s.dM + at) * L, vf{});
      const vf T = select(L > vf{}, dML * load(u.pack.G + at), vf{});
      const vf P = select(lane_index() + splat(static_cast<float>(s)) < splat(static_cast<float>(t)), T * dt, vf{});
      store(u.sum.dG + at, load(u.sum.dG + at) + dML * dt);
      store(sums.column_T + s, load(sums.column_T + s) + T);
      const Wide wide = __builtin_convertvector(P, Wide);
      Wide column;
      std::memcpy(&column, sums.column_P + s, sizeof column);
      column += wide;
      std::memcpy(sums.column_P + s, &column, sizeof column);
      row += wide;
    }
    for (int i = 0; i < W; i++) sums.row_P[t] += row[i];
  }
}

// The states' part of dB or dC, V = X state^T with X by columns: total[n][t] += scale_t V_tn, dots[t] = <V_t, with_t>.
inline void state_part(const BackwardUnit& u, const float* state, const float* X_columns, const float* scale,
                       const float* with, float* total, float* dots) {
  for (int t = 0; t < u.at.chunk.length; t += kTileColumns) {
    vf dot[kTileVectors] = {};
    each_tile(u.z.n, [&](auto height, int i) {
      u.ahead.row();
      Tile<height> tile;
      for (int j = 0; j < u.z.panels; j++)
        tile_add<kTileColumns>(tile, std::min(kTileColumns, u.z.p - j * kTileColumns),
                               state + j * u.z.state_panel + i * kTileColumns, 1,
                               X_columns + int64_t{j} * kTileColumns * kRow + t, kRow);
      tile_each(tile, [&](int r, int v, vf& acc) {
        const int at = (i + r) * kRow + t + v * W;
        store(total + at, load(total + at) + acc * load(scale + t + v * W));
        dot[v] += acc * load(with + at);
      });
    });
    for (int v = 0; v < kTileVectors; v++) store(dots + t + v * W, dot[v]);
  }
}

// <S, dS'>.
inline float state_product(const BackwardUnit& u) {
  vf total{};
  for (int j = 0; j < u.z.panels; j++)
    for (int64_t i = 0; i < u.z.n * kTileColumns; i += W)
      total += load(u.state + j * u.z.state_panel + i) * load(u.dnext + j * u.z.state_panel + i);
  return sum(total);
}

// The sums become gradients of this head's steps; returns its shares of the gradients of A and of the bias.
struct StepGradient {
  float dA, dbias;
};
inline StepGradient step_gradient(const BackwardUnit& u) {
  const auto [b, c, h, in_slab, chunk] = u.at;
  const BackwardScratch::Sums& sums = *u.s.sums;
  const Decay& d = *u.s.decay;
  const float A = finite_rate(*u.q.A.at<float>(h));
  double after[kChunk], suffix = 0, dA = 0, dbias = 0;
  for (int t = chunk.length - 1; t >= 0; t--) {
    suffix += sums.row_P[t] - sums.column_P[t] + double{d.from_start[t]} * sums.R[t];
    if (d.dt[t] * A <= kForgotten) suffix = 0;  // nothing crosses t: no trace of rounding may either
    after[t] = suffix;
  }
  double before = u.state ? double{d.whole} * state_product(u) : 0.0;
  for (int t = 0; t < chunk.length; t++) {
    const double da = after[t] + before;
    const double ddt = (A * da + sums.column_T[t] + double{d.to_end[t]} * sums.U[t]) * u.slope[t];
    before += double{d.weight[t]} * sums.U[t];
    dA += d.dt[t] * da;
    dbias += ddt;
    *u.q.ddt.at<float>(b, chunk.start + t, h) = static_cast<float>(ddt);
  }
  return {static_cast<float>(dA), static_cast<float>(dbias)};
}

}  // namespace omnimamba::ssd
