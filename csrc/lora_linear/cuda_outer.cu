// The gradients of the adapters and of the bias: products over the rows, whose result has few rows itself.
//
// Maths    gradient[r, j] = sum_i low[i, r] u[i, j],  dbias[j] = sum_i v[i, j],  u = v with dropout.
// Shapes   v (rows, width), low (rows, ranks) float32; see gpu.h.
// Plan     bound by the one pass over v. A thread owns N neighbouring columns, for 16 ranks at a time, and walks down a part
//          of the rows with all sums in registers, in float32; 32 rows of low wait in shared memory. The parts are added in
//          their order by a second launch, which knows where the result lies.
// Traffic  rows * width elements of v, once for every 16 ranks; 4 ranks width bytes for each part, written and read.
#include "../common/math.cuh"
#include "parts.cuh"

namespace omnimamba {
namespace {

constexpr int THREADS = 128, RANKS = 16, ROWS = 32, PACK = 4;
constexpr int64_t FULL = 264;          // blocks that fill a large chip
constexpr int64_t MOST_PARTS = 65535;  // that a grid can have along y

int64_t ranks_of(const LoraOuterParams& p) { return p.gradient ? p.tasks * p.rank : 0; }
int64_t lines_of(const LoraOuterParams& p) { return ranks_of(p) + (p.dbias ? 1 : 0); }  // of a part

int64_t parts_of(const LoraOuterParams& p) {
  const int64_t blocks = ceil_div(p.width, THREADS * PACK) * ceil_div(ranks_of(p) + 1, RANKS);
  const int64_t fill = ceil_div(FULL, blocks < 1 ? 1 : blocks), most = ceil_div(p.rows, ROWS);
  const int64_t wanted = 8 * fill < most ? ceil_div(most, 8) : fill;  // sums of 256 rows at most keep their last bits
  const int64_t parts = wanted < most ? wanted : most < 1 ? 1 : most;
  return parts < MOST_PARTS ? parts : MOST_PARTS;
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS, N == 1 ? 6 : 3)
    outer_kernel(const __grid_constant__ LoraOuterParams p, int64_t ranks, int64_t lines, int parts) {
  OM_SHARED(float, low, ROWS* RANKS);
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * N;
  const int64_t first_r = static_cast<int64_t>(blockIdx.z) * RANKS;
  const int part = static_cast<int>(blockIdx.y);
  const int64_t begin = p.rows * part / parts, end = p.rows * (part + 1) / parts, step = p.v.stride[1];
  const bool live = column < p.width;
  float sums[RANKS][N] = {}, ones[N] = {};
  for (int64_t first = begin; first < end; first += ROWS) {
    sync_block();
    for (int e = static_cast<int>(threadIdx.x); e < ROWS * RANKS; e += THREADS) {
      const int64_t row = first + e / RANKS, r = first_r + e % RANKS;
      low[e] = row < end && r < ranks ? *p.low.at<float>(row, r) : 0.0f;
    }
    sync_block();
    if (!live) continue;
    const int count = static_cast<int>(end - first < ROWS ? end - first : ROWS);
#pragma unroll 4
    for (int i = 0; i < count; i++) {
      float v[N];
      if constexpr (N > 1)
        load_floats(v, p.v.at<T>(first + i) + column);
      else
        v[0] = to_float(p.v.at<T>(first + i)[column * step]);
#pragma unroll
      for (int j = 0; j < N; j++) {
        ones[j] += v[j];
        if (p.dropout && !kept(p, first + i, column + j, p.width)) v[j] = 0.0f;
#pragma unroll
        for (int r = 0; r < RANKS; r++) sums[r][j] += low[i * RANKS + r] * v[j];
      }
    }
  }
  if (!live) return;
  float* out = p.workspace.at<float>() + part * lines * p.width + column;
  const float scale = p.dropout ? reciprocal(p.keep) : 1.0f;
#pragma unroll
  for (int r = 0; r < RANKS; r++)
#pragma unroll
    for (int j = 0; j < N; j++)
      if (first_r + r < ranks) out[(first_r + r) * p.width + j] = sums[r][j] * scale;
#pragma unroll
  for (int j = 0; j < N; j++)
    if (lines > ranks && first_r == 0) out[ranks * p.width + j] = ones[j];
}

// Line blockIdx.y of the parts added up: a rank's gradient, or the bias's behind the last rank.
__global__ void __launch_bounds__(THREADS)
    outer_sum_kernel(const __grid_constant__ LoraOuterParams p, int64_t ranks, int64_t lines, int parts) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (column >= p.width) return;
  for (int64_t line = blockIdx.y; line < lines; line += gridDim.y) {
    const float* from = p.workspace.at<float>() + line * p.width + column;
    float sum = 0.0f;
#pragma unroll 4
    for (int part = 0; part < parts; part++) sum += from[part * lines * p.width];
    const auto r = static_cast<uint32_t>(line), rank = static_cast<uint32_t>(p.rank);
    if (line < ranks)
      put_float(sum, p.gradient, r / rank, r % rank, column);
    else
      put_float(sum, p.dbias, column);
  }
}

}  // namespace

#if !defined(__CUDACC_RTC__)

int64_t lora_outer_workspace(const LoraOuterParams& p) { return parts_of(p) * lines_of(p) * p.width; }

void lora_outer(const LoraOuterParams& p) {
  const int64_t ranks = ranks_of(p), lines = lines_of(p);
  if (lines == 0 || p.width == 0) return;
  const int parts = static_cast<int>(parts_of(p));
  for_float_type(p.v.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t size = sizeof(T);
    const bool fits = p.width % PACK == 0 && p.v.stride[1] == 1 && packs(p.v, 1, size, PACK * size);
    const auto blocks = [&](int n) {
      return Shape{grid(ceil_div(p.width, THREADS * n), parts, ceil_div(ranks > 0 ? ranks : 1, RANKS)), THREADS,
                   p.stream};
    };
    if (fits)
      launch<outer_kernel<T, PACK>>(blocks(PACK), p, ranks, lines, parts);
    else
      launch<outer_kernel<T, 1>>(blocks(1), p, ranks, lines, parts);
  });
  launch<outer_sum_kernel>({grid(ceil_div(p.width, THREADS), lines), THREADS, p.stream}, p, ranks, lines, parts);
}

#endif

}  // namespace omnimamba
