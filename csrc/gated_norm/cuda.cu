// Gated RMSNorm, forward and backward. For each row and each group of G neighbouring values, with s = silu(z):
//
//   u = x or x s,  r = 1 / sqrt(mean(u^2) + eps),  v = u r weight + bias,  y = v s or v
//
//   dv = dy s or dy,  dn = dv weight,  du = r (dn - u r^2 mean(dn u))
//   gate after:   dx = du,    dz = dy v silu'(z)
//   gate before:  dx = du s,  dz = du x silu'(z)
//   dweight = sum over rows of dv u r,  dbias = sum over rows of dv
//
// Plan, forward: a group of a row belongs to a team, one warp where that holds it in registers, else a block. Accesses of
//   16 bytes where all addresses allow them. x and z stay in registers between the sum and the output.
// Plan, backward: a block has one group of a part of the rows, at most 256 parts, and walks its rows; a thread keeps the sums
//   of dweight and dbias of its columns in registers. A second launch adds the parts in order.
// With `update` x += update comes first, in place.
// Groups longer than the registers hold are read a second time, from the cache; their sums stay in the workspace.
// Traffic: forward rows d (3 elements with z, 2 without), backward rows d (5 or 3).
#include "../common/check.h"
#include "../common/math.cuh"
#include "../common/reduce.cuh"
#include "../common/sum_parts.cuh"
#include "gate.h"
#include "gated_norm.h"

namespace omnimamba {
namespace {

constexpr int FORWARD_ITEMS = 4;  // packs a thread keeps in registers
template <class T>
constexpr int BACKWARD_ITEMS = sizeof(T) == 2 ? 4 : 2;
constexpr int LONGEST_TEAM = 512, WARPS_A_BLOCK = 4;

// Row (i, j) of a view; the division is of 32 bits.
struct Row {
  int64_t i, j;
  OM_DEVICE Row(const GatedNormParams& p, uint32_t row)
      : i(row / static_cast<uint32_t>(p.inner)), j(row % static_cast<uint32_t>(p.inner)) {}
};

// The group of `row` that begins with column `first`, by `team` threads of which this is number `me`.
template <class T, Gate WHERE, int N>
OM_DEVICE void normalize(const GatedNormParams& p, uint32_t row, int64_t first, int me, int team, float* scratch) {
  const Row at(p, row);
  const int packs = static_cast<int>(p.group_size) / N;
  T* x = p.x.at<T>(at.i, at.j) + first;
  const T* z = WHERE == Gate::NONE ? x : p.z.at<T>(at.i, at.j) + first;
  const T* update = p.update ? p.update.at<T>(at.i, at.j) + first : nullptr;
  T* y = p.y.at<T>(at.i, at.j) + first;
  const float *weight = p.weight.at<float>() + first, *bias = p.bias ? p.bias.at<float>() + first : nullptr;

  float kept_x[FORWARD_ITEMS][N], kept_z[FORWARD_ITEMS][N], squares[1] = {};
  auto input = [&](int pack, float (&u)[N], float (&gate)[N], bool first_time) {
    load_floats(u, x + pack * N);
    if (update && first_time) {  // x += update, rounded as it is stored
      float more[N];
      load_floats(more, update + pack * N);
#pragma unroll
      for (int k = 0; k < N; k++) u[k] = to_float(from_float<T>(u[k] + more[k]));
      store_floats(x + pack * N, u);
    }
    if constexpr (WHERE != Gate::NONE) load_floats(gate, z + pack * N);
#pragma unroll
    for (int k = 0; k < N; k++) {
      if constexpr (WHERE == Gate::BEFORE) u[k] *= silu(gate[k]);
      squares[0] += u[k] * u[k];
    }
  };
#pragma unroll
  for (int item = 0; item < FORWARD_ITEMS; item++)
    if (me + item * team < packs) input(me + item * team, kept_x[item], kept_z[item], true);
  for (int pack = me + FORWARD_ITEMS * team; pack < packs; pack += team) {
    float u[N], gate[N];
    input(pack, u, gate, true);
  }
  if (team == WARP)
    squares[0] = warp_sum(squares[0]);
  else
    block_sum(squares, scratch);
  const float r = inverse_root(squares[0] * reciprocal(static_cast<float>(p.group_size)) + p.eps);

  auto output = [&](int pack, float (&u)[N], float (&gate)[N]) {
    float w[N], b[N] = {};
    load_floats(w, weight + pack * N);
    if (bias) load_floats(b, bias + pack * N);
#pragma unroll
    for (int k = 0; k < N; k++) {
      u[k] = u[k] * r * w[k] + b[k];
      if constexpr (WHERE == Gate::AFTER) u[k] *= silu(gate[k]);
    }
    store_floats(y + pack * N, u);
  };
#pragma unroll
  for (int item = 0; item < FORWARD_ITEMS; item++)
    if (me + item * team < packs) output(me + item * team, kept_x[item], kept_z[item]);
  for (int pack = me + FORWARD_ITEMS * team; pack < packs; pack += team) {
    float u[N], gate[N];
    input(pack, u, gate, false);
    output(pack, u, gate);
  }
}

template <class T, Gate WHERE, int N>
__global__ void __launch_bounds__(LONGEST_TEAM)
    gated_norm_forward_kernel(const __grid_constant__ GatedNormParams p, int team) {
  OM_SHARED(float, scratch, LONGEST_TEAM / WARP);
  const int warps = team / WARP, teams = static_cast<int>(blockDim.x) / team;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * teams + warp_id() / warps;
  const int me = warp_id() % warps * WARP + lane_id();
  if (row >= p.outer * p.inner) return;
  for (int64_t first = blockIdx.y * p.group_size; first < p.width; first += gridDim.y * p.group_size)
    normalize<T, WHERE, N>(p, static_cast<uint32_t>(row), first, me, team, scratch);
}

// Neighbouring columns of one row as they lie in memory, and one of them as floats.
template <class T, int N>
struct Columns {
  Pack<T, N> x, z, dy;
};
struct Column {
  float x, u, dy, dv, gate, slope;  // gate: silu(z), slope: its derivative
};

template <class T, Gate WHERE, int N>
OM_DEVICE Columns<T, N> read_columns(const T* x, const T* z, const T* dy) {
  Columns<T, N> in{};
  in.x = load_pack<Pack<T, N>>(x);
  in.dy = load_pack<Pack<T, N>>(dy);
  if constexpr (WHERE != Gate::NONE) in.z = load_pack<Pack<T, N>>(z);
  return in;
}

template <Gate WHERE, class T, int N>
OM_DEVICE Column column(const Columns<T, N>& in, int k) {
  Column c{to_float(in.x.value[k]), 0.0f, to_float(in.dy.value[k]), 0.0f, 1.0f, 0.0f};
  if constexpr (WHERE != Gate::NONE) {
    const float z = to_float(in.z.value[k]), s = sigmoid(z);
    c.gate = z * s;
    c.slope = s * (1.0f + z * (1.0f - s));
  }
  c.u = WHERE == Gate::BEFORE ? c.x * c.gate : c.x;
  c.dv = WHERE == Gate::AFTER ? c.dy * c.gate : c.dy;
  return c;
}

template <class T, Gate WHERE, int N>
__global__ void __launch_bounds__(LONGEST_TEAM)
    gated_norm_backward_kernel(const __grid_constant__ GatedNormParams p, int parts) {
  OM_SHARED(float, scratch, LONGEST_TEAM / WARP * 2);
  const int packs = static_cast<int>(p.group_size) / N, me = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  constexpr int ITEMS = BACKWARD_ITEMS<T>;
  const int part = static_cast<int>(blockIdx.x) % parts, group = static_cast<int>(blockIdx.x) / parts;
  const int64_t first = group * p.group_size;
  const auto count = static_cast<uint32_t>(p.outer * p.inner);
  const uint32_t begin = first_of_part(count, part, parts), end = first_of_part(count, part + 1, parts);
  const float *weight = p.weight.at<float>() + first, *bias = p.bias ? p.bias.at<float>() + first : nullptr;
  float* dweight = p.workspace.at<float>() + part * 2 * p.width + first;
  float* dbias = dweight + p.width;
  float sum_w[ITEMS][N] = {}, sum_b[ITEMS][N] = {};

  for (uint32_t row = begin; row < end; row++) {
    const Row at(p, row);
    const int64_t i = at.i, j = at.j;
    const T *x = p.x.at<T>(i, j) + first, *dy = p.dy.at<T>(i, j) + first;
    const T* z = WHERE == Gate::NONE ? x : p.z.at<T>(i, j) + first;
    T *dx = p.dx.at<T>(i, j) + first, *dz = WHERE == Gate::NONE ? nullptr : p.dz.at<T>(i, j) + first;
    Columns<T, N> kept[ITEMS];
    float sums[2] = {};  // of u^2 and dn u
    auto read = [&](int pack) { return read_columns<T, WHERE, N>(x + pack * N, z + pack * N, dy + pack * N); };
    auto add = [&](int pack, const Columns<T, N>& in) {
      float w[N];
      load_floats(w, weight + pack * N);
#pragma unroll
      for (int k = 0; k < N; k++) {
        const Column c = column<WHERE>(in, k);
        sums[0] += c.u * c.u;
        sums[1] += c.dv * w[k] * c.u;
      }
    };
#pragma unroll
    for (int item = 0; item < ITEMS; item++)
      if (me + item * threads < packs) kept[item] = read(me + item * threads);
#pragma unroll
    for (int item = 0; item < ITEMS; item++)
      if (me + item * threads < packs) add(me + item * threads, kept[item]);
    for (int pack = me + ITEMS * threads; pack < packs; pack += threads) add(pack, read(pack));
    block_sum(sums, scratch);
    const float each = reciprocal(static_cast<float>(p.group_size)), r = inverse_root(sums[0] * each + p.eps);
    const float slope = r * r * (sums[1] * each);

    auto output = [&](int pack, const Columns<T, N>& in, float (&to_w)[N], float (&to_b)[N]) {
      float w[N], b[N] = {}, out_x[N], out_z[N];
      load_floats(w, weight + pack * N);
      if (WHERE == Gate::AFTER && bias) load_floats(b, bias + pack * N);
#pragma unroll
      for (int k = 0; k < N; k++) {
        const Column c = column<WHERE>(in, k);
        const float du = r * (c.dv * w[k] - c.u * slope);
        out_x[k] = WHERE == Gate::BEFORE ? du * c.gate : du;
        if constexpr (WHERE == Gate::BEFORE) out_z[k] = du * c.x * c.slope;
        if constexpr (WHERE == Gate::AFTER) out_z[k] = c.dy * (c.u * r * w[k] + b[k]) * c.slope;
        to_w[k] += c.dv * c.u * r;
        to_b[k] += c.dv;
      }
      store_floats(dx + pack * N, out_x);
      if constexpr (WHERE != Gate::NONE) store_floats(dz + pack * N, out_z);
    };
#pragma unroll
    for (int item = 0; item < ITEMS; item++)
      if (me + item * threads < packs) output(me + item * threads, kept[item], sum_w[item], sum_b[item]);
    for (int pack = me + ITEMS * threads; pack < packs; pack += threads) {
      float to_w[N] = {}, to_b[N] = {};
      if (row > begin) {
        load_floats(to_w, dweight + pack * N);
        load_floats(to_b, dbias + pack * N);
      }
      output(pack, read(pack), to_w, to_b);
      store_floats(dweight + pack * N, to_w);
      store_floats(dbias + pack * N, to_b);
    }
  }
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int pack = me + item * threads;
    if (pack >= packs) continue;
    store_floats(dweight + pack * N, sum_w[item]);
    store_floats(dbias + pack * N, sum_b[item]);
  }
}

// body(T{}, gate, width of an access in elements), all of them compile-time constants. An access of a
// 16-bit type has BYTES.
template <int BYTES, class Body>
void for_instance(const GatedNormParams& p, Body&& body) {
  for_float_type(p.x.dtype, [&](auto type) {
    constexpr int size = sizeof(type), wide = size == 4 ? 4 : BYTES / size;
    bool fits = p.group_size % wide == 0 && packs(p.weight, 0, 4, 16) && packs(p.bias, 0, 4, 16);
    for (const View* v : {&p.x, &p.z, &p.update, &p.y, &p.dy, &p.dx, &p.dz})
      fits = fits && packs(*v, 2, size, wide * size);
    auto with_gate = [&](auto gate) {
      if (fits)
        body(type, gate, std::integral_constant<int, wide>{});
      else
        body(type, gate, std::integral_constant<int, 1>{});
    };
    if (!p.z)
      with_gate(std::integral_constant<Gate, Gate::NONE>{});
    else if (p.norm_before_gate)
      with_gate(std::integral_constant<Gate, Gate::AFTER>{});
    else
      with_gate(std::integral_constant<Gate, Gate::BEFORE>{});
  });
}

int64_t rows_of(const GatedNormParams& p) {
  const int64_t rows = p.outer * p.inner;
  check(rows < (int64_t{1} << 32), "x: the CUDA kernels take fewer than 2^32 rows; split x along its first dimension");
  return rows;
}

int64_t parts_of(const GatedNormParams& p) {
  const int64_t parts = ceil_div(rows_of(p), 16);
  return parts < 1 ? 1 : parts > 256 ? 256 : parts;
}

}  // namespace

#if !defined(__CUDACC_RTC__)

void gated_norm_forward(const GatedNormParams& p) {
  const int64_t rows = rows_of(p), groups = p.width / p.group_size;
  if (rows == 0) return;
  for_instance<16>(p, [&](auto type, auto gate, auto width) {
    using T = decltype(type);
    const int team = warps_for(ceil_div(p.group_size / width.value, FORWARD_ITEMS), LONGEST_TEAM);
    const int threads = team == WARP ? WARP * WARPS_A_BLOCK : team;
    launch<gated_norm_forward_kernel<T, gate.value, width.value>>(
        {grid(ceil_div(rows * team, threads), groups), threads, p.stream}, p, team);
  });
}

int64_t gated_norm_workspace(const GatedNormParams& p) { return parts_of(p) * 2 * p.width; }

void gated_norm_backward(const GatedNormParams& p) {
  const int parts = static_cast<int>(parts_of(p));
  const int64_t groups = p.width / p.group_size;
  for_instance<8>(p, [&](auto type, auto gate, auto width) {
    using T = decltype(type);
    const int threads = warps_for(ceil_div(p.group_size / width.value, BACKWARD_ITEMS<T>), LONGEST_TEAM);
    launch<gated_norm_backward_kernel<T, gate.value, width.value>>({grid(parts * groups), threads, p.stream}, p, parts);
  });
  sum_parts(p.workspace.at<float>(), parts, 2 * p.width, p.width, p.dweight.at<float>(), p.dbias.at<float>(), p.stream);
}

#endif

}  // namespace omnimamba
