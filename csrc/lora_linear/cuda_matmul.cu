// The matrix products of the LoRA linear layer in float32, from operands of any float type and any strides:
//
//   c[i, j] = sum_k a[i, k] b[k, j] + bias[j] + sum_r low[i, r] up[r, j]          (dropout on the last term: gpu.h)
//
// Plan: for float32 operands, which the matrix units would round, for mixed types and for addresses that allow no accesses of 16
//   bytes. A block owns 128 x 64 of c, a thread 8 x 4 of it in registers; 16 of the depth wait in shared memory while each
//   thread has its share of the next 16 on its way. Their sum is taken by itself: long sums keep their last bits. The product low up is the same walk before the other, over the ranks.
// Traffic: a once for every 64 columns, b once for every 128 rows, c once.
#include "../common/device.h"
#include "../common/math.cuh"
#include "matmul.cuh"

namespace omnimamba {
namespace {

constexpr int ROWS = 128, COLUMNS = 64, DEPTH = 16, THREADS = 256, Y = 8, X = 4;  // Y x X a thread
constexpr int PITCH_A = ROWS + 4, PITCH_B = COLUMNS + 4;

// One operand as (row, k): of a tensor, or of the adapters with k or row as (task, rank).
struct Operand {
  View v;
  int64_t rows, row_step, k_step;  // steps in elements
  uint32_t rank;                   // 0, or: k is task * rank + r, and k_step that of r
  int64_t task_step;
};

OM_DEVICE float element(const Operand& o, int64_t row, int64_t k) {
  View v = o.v;
  v.stride[0] = o.row_step, v.stride[1] = o.k_step, v.stride[2] = o.task_step;
  if (o.rank == 0) return float_at(v, row, k);
  const auto r = static_cast<uint32_t>(k);
  return float_at(v, row, r % o.rank, r / o.rank);
}

// A thread's share of EXTENT rows by DEPTH, on its way from global to shared memory.
template <int EXTENT, int PITCH>
struct Share {
  static constexpr int COUNT = EXTENT * DEPTH / THREADS;
  float value[COUNT];

  // Neighbouring threads read neighbours in memory.
  OM_DEVICE static Place place(const Operand& o, int i) {
    const int e = static_cast<int>(threadIdx.x) + i * THREADS;
    return o.k_step == 1 ? Place{e / DEPTH, e % DEPTH} : Place{e % EXTENT, e / EXTENT};
  }
  OM_DEVICE void read(const Operand& o, int64_t first, int64_t k, int64_t depth) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const Place at = place(o, i);
      const bool inside = first + at.row < o.rows && k + at.column < depth;
      value[i] = inside ? element(o, first + at.row, k + at.column) : 0.0f;
    }
  }
  OM_DEVICE void write(const Operand& o, float* shared) const {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const Place at = place(o, i);
      shared[at.column * PITCH + at.row] = value[i];
    }
  }
};

// acc += a b for this thread's elements of the tile at (row, column).
OM_DEVICE void walk(float (&acc)[Y][X], const Operand& a, const Operand& b, int64_t depth, int64_t row, int64_t column,
                    float* shared_a, float* shared_b) {
  const int my = static_cast<int>(threadIdx.x) / (COLUMNS / X) * Y,
            mx = static_cast<int>(threadIdx.x) % (COLUMNS / X) * X;
  Share<ROWS, PITCH_A> next_a;
  Share<COLUMNS, PITCH_B> next_b;
  next_a.read(a, row, 0, depth);
  next_b.read(b, column, 0, depth);
#pragma unroll 1
  for (int64_t k = 0; k < depth; k += DEPTH) {
    sync_block();
    next_a.write(a, shared_a);
    next_b.write(b, shared_b);
    sync_block();
    next_a.read(a, row, k + DEPTH, depth);
    next_b.read(b, column, k + DEPTH, depth);
    float sums[Y][X] = {};
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
      float left[Y], right[X];
      load_floats(left, shared_a + i * PITCH_A + my);
      load_floats(right, shared_b + i * PITCH_B + mx);
#pragma unroll
      for (int y = 0; y < Y; y++)
#pragma unroll
        for (int x = 0; x < X; x++) sums[y][x] += left[y] * right[x];
    }
#pragma unroll
    for (int y = 0; y < Y; y++)
#pragma unroll
      for (int x = 0; x < X; x++) acc[y][x] += sums[y][x];
  }
}

__global__ void __launch_bounds__(THREADS, 1) matmul_kernel(const __grid_constant__ LoraMatmulParams p) {
  OM_SHARED(float, shared_a, DEPTH* PITCH_A);
  OM_SHARED(float, shared_b, DEPTH* PITCH_B);
  const Place tile = tile_of(blockIdx.x, ceil_div(p.m, ROWS), ceil_div(p.n, COLUMNS));
  const int64_t row = static_cast<int64_t>(tile.row) * ROWS, column = static_cast<int64_t>(tile.column) * COLUMNS;
  const int64_t mine_y = row + threadIdx.x / (COLUMNS / X) * Y, mine_x = column + threadIdx.x % (COLUMNS / X) * X;
  float acc[Y][X] = {};
  if (p.low) {
    const int64_t ranks = p.tasks * p.rank;
    const Operand low{p.low, p.m, ranks, 1, 0, 0};
    const Operand up{p.up, p.n, p.up.stride[2], p.up.stride[1], static_cast<uint32_t>(p.rank), p.up.stride[0]};
    walk(acc, low, up, ranks, row, column, shared_a, shared_b);
    if (p.dropout) {
      const float scale = reciprocal(p.keep);
#pragma unroll
      for (int y = 0; y < Y; y++)
#pragma unroll
        for (int x = 0; x < X; x++) acc[y][x] = kept(p, mine_y + y, mine_x + x, p.n) ? acc[y][x] * scale : 0.0f;
    }
  }
  const Operand a{p.a, p.m, p.a.stride[0], p.a.stride[1], 0, 0}, b{p.b, p.n, p.b.stride[1], p.b.stride[0], 0, 0};
  walk(acc, a, b, p.k, row, column, shared_a, shared_b);
#pragma unroll
  for (int x = 0; x < X; x++) {
    if (mine_x + x >= p.n) continue;
    const float bias = p.bias ? float_at(p.bias, mine_x + x) : 0.0f;
#pragma unroll
    for (int y = 0; y < Y; y++)
      if (mine_y + y < p.m) put_float(acc[y][x] + bias, p.c, mine_y + y, mine_x + x);
  }
}

}  // namespace

#if !defined(__CUDACC_RTC__)

void lora_matmul(const LoraMatmulParams& p) {
  if (p.m == 0 || p.n == 0) return;
#if defined(OMNIMAMBA_SM90)
  if (runs_sm90() && matmul_sm90(p)) return;
#endif
  if (matmul_16(p)) return;
  launch<matmul_kernel>({grid(ceil_div(p.m, ROWS) * ceil_div(p.n, COLUMNS)), THREADS, p.stream}, p);
}

#endif

}  // namespace omnimamba
