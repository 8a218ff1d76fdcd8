// The scan's backward, the gradient of the steps: of one head and chunk, from sums that none of them is a difference,
//
//   da_r  = sum of T_ts dt_s over s < r <= t  +  sum of R_t over t >= r  +  sum of dt_s U_s over s < r
//   ddt_s = A da_s + sum of T_ts over t + U_s
//
// T is dealt out in 16 x 16 tiles, so the first sum is put together from sums over parts of tiles: of tiles that lie wholly
// beside r, of the rows from r on, of the columns before r, and of the corner of the tile on the diagonal.
#pragma once
#include "../common/reduce.cuh"
#include "schedule.cuh"

namespace omnimamba::ssd {

// The number of the tile in row I and column J of the lower triangle, and the other way round.
OM_HOST_DEVICE constexpr int tile_number(int I, int J) { return I * (I + 1) / 2 + J; }
struct TilePlace {
  int I, J;
};
OM_HOST_DEVICE constexpr TilePlace tile_place(int number) {
  int I = 0;
  while (tile_number(I + 1, 0) <= number) I++;
  return {I, number - tile_number(I, 0)};
}

// Sums over a tile in shared memory, 16 places each: of T dt over the columns and the rows from each row on (on the diagonal:
// over the corner); of T over the rows; of T dt over the rows and the columns before each column.
struct TileSums {
  float from_row[16], column[16], before_column[16], total;
  float pad[15];
};

// T of one tile, held as accumulators, becomes its sums, or (`begins` false) is added to them; `scratch` has 304 floats for
// it. All lanes call it.
OM_DEVICE void sum_tile(const float (&T)[2][4], bool diagonal, bool begins, const float* dt, float* scratch,
                        TileSums& out) {
  const int lane = lane_id(), r = lane % 16;
  float *rows = scratch + 16 * 17, *columns = rows + 16;
  sync_warp();
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const Place place = fragment::c(lane, i % 4);
    scratch[place.row * 17 + place.column + i / 4 * 8] = T[i / 4][i % 4];
  }
  sync_warp();
  float sum = 0.0f;
#pragma unroll 4
  for (int k = 0; k < 16; k++) sum += lane < 16 ? scratch[r * 17 + k] * dt[k] : scratch[k * 17 + r];
  (lane < 16 ? rows : columns)[r] = sum;
  sync_warp();
  float found = 0.0f;
  if (lane < 16 && diagonal) {
    for (int t = r; t < 16; t++)
      for (int s = 0; s < r; s++) found += scratch[t * 17 + s] * dt[s];
  } else if (lane < 16) {
    for (int t = 15; t >= r; t--) found += rows[t];
  } else {
    for (int s = 0; s < r; s++) found += columns[s] * dt[s];
  }
  auto put = [begins](float& to, float v) { to = begins ? v : to + v; };
  if (lane < 16) {
    put(out.from_row[r], found);
  } else {
    put(out.column[r], sum);
    put(out.before_column[r], found);
  }
  if (lane == 0 && !diagonal) put(out.total, found);
}

// What one warp gathers of a head's chunk, in shared memory: registers are scarce there. A lane has positions lane + 32 k, and
// touches no other's.
template <class T>
struct StepGradient {
  static constexpr int EACH = CHUNK<T> / WARP;
  double R[CHUNK<T>], U[CHUNK<T>], before[CHUNK<T>];  // before: of dt U

  OM_DEVICE void clear() {
#pragma unroll
    for (int t = lane_id(); t < CHUNK<T>; t += WARP) R[t] = U[t] = before[t] = 0.0;
  }

  // Adds the parts of R (where `with_R`), of U and of W = <S, dS>, which reaches position `last`.
  OM_DEVICE void add(const float* R_parts, const float* U_parts, const float* W_parts, int parts, bool with_R, int last,
                     const float* dt) {
    double W = 0.0, until = 0.0;
    for (int i = 0; i < parts; i++) W += static_cast<double>(W_parts[i]);
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      const int t = k * WARP + lane_id();
      double u = 0.0;
      for (int i = 0; i < parts; i++) {
        u += static_cast<double>(U_parts[i * CHUNK<T> + t]);
        if (with_R) R[t] += static_cast<double>(R_parts[i * CHUNK<T> + t]);
      }
      if (t == last) R[t] += W;
      U[t] += u;
      const double own = u * static_cast<double>(dt[t]), sum = until + warp_scan(own), above = shuffle_up(sum, 1);
      if (t <= last) before[t] += lane_id() > 0 ? above : until;
      until = shuffle(sum, WARP - 1);
    }
  }

  // dt's gradient of head h and chunk, and its shares of those of A and of the bias.
  OM_DEVICE void finish(const SsdScanParams& q, int64_t b, int64_t h, int64_t chunk, const TileSums* tiles,
                        const float* dt, uint64_t used, float* sums) const {
    constexpr int BLOCKS = CHUNK<T> / 16;
    const double A = static_cast<double>(*q.A.at<float>(h));
    const float bias = q.dt_bias ? *q.dt_bias.at<float>(h) : 0.0f;
    double after = 0.0, dA = 0.0, dbias = 0.0;
#pragma unroll
    for (int k = EACH - 1; k >= 0; k--) {
      const int r = k * WARP + lane_id(), K = r / 16, place = r % 16;
      // From the last lane down: a sum over lanes in reverse.
      const double turned = warp_scan(shuffle(R[r], WARP - 1 - lane_id()));
      double da = after + shuffle(turned, WARP - 1 - lane_id()) + before[r], column = 0.0;
      after += shuffle(turned, WARP - 1);
      for (int I = 0; I < BLOCKS; I++)
        for (int J = 0; J <= I; J++) {
          const TileSums& tile = tiles[tile_number(I, J)];
          if (J < K && I > K) da += static_cast<double>(tile.total);
          if (I == K) da += static_cast<double>(tile.from_row[place]);
          if (J == K && I > J) da += static_cast<double>(tile.before_column[place]);
          if (J == K) column += static_cast<double>(tile.column[place]);
        }
      const int64_t t = chunk * CHUNK<T> + r;
      if (t >= q.length) continue;
      double ddt = 0.0;
      if (used >> r & 1) {
        const float v = float_at(q.dt, b, t, h) + bias, size = q.dt_softplus ? softplus(v) : v;
        float slope = q.dt_softplus && v <= 20.0f ? sigmoid(v) : 1.0f;
        if (size < q.dt_low || size > q.dt_high) slope = 0.0f;
        const double past = da == 0.0 ? 0.0 : A * da;  // A may be -inf
        ddt = slope == 0.0f ? 0.0 : (past + column + U[r]) * static_cast<double>(slope);
        dA += static_cast<double>(dt[r]) * da;
        dbias += ddt;
      }
      put_float(static_cast<float>(ddt), q.ddt, b, t, h);
    }
    dA = warp_sum(dA);
    dbias = warp_sum(dbias);
    if (lane_id() != 0) return;
    sums[0] = static_cast<float>(dA);
    sums[1] = static_cast<float>(dbias);
  }
};

}  // namespace omnimamba::ssd
