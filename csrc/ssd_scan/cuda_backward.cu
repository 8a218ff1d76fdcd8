// The scan's backward on a GPU: every chunk on its own, from the states S and their gradients dS' to all other gradients.
//
// With dy the gradient before the gate, L, carry and weight as in chunk.cuh, tail_s = 2^(cum_end - cum_s), and for each head
//   T_ts = (dy x^T o L o C B^T)_ts     M = C B^T o L dt     dG = sum over heads of dy x^T o L dt
//   dx^T = (dS' B^T) dt tail + dy^T M + D dy^T              dz = dy_gated y silu'(z)
//   Y^T  = S^T dy^T     dC^T = sum of carry Y^T + B^T dG^T     R_t = carry_t C_t . Y_t
//   Z^T  = dS'^T x^T    dB^T = sum of weight Z^T + C^T dG      U_s = tail_s B_s . Z_s
// The gradient V of the state after a packed sequence that ends in the chunk acts like dS', with tails up to its end. From
// R, U, T and W = carry_end <S, dS'> come the steps' gradients: back_terms.cuh.
//
// Plan: a block has a batch row, a chunk and some heads of a group, one after another, PART channels at a time. Two roles,
//   one after the other: of channels, a warp has 16 of them and SPAN positions of dx; of states, a warp has 16 of them and
//   REACH positions of dB and dC, whose sums over heads stay in registers, or where there are more than 128 states in their
//   place in memory. C B^T lies in registers, a tile or two a warp. The next head's x and dy are fetched meanwhile.
// Launches: the walk of dS; this one; the totals: dA, ddt_bias and dD over chunks and batch rows, and dB and dC over the parts
//   of a group's heads, which also gives them the caller's type. Where there is one part and they are float32, they are in place.
// Traffic a position and head at p 64, n 128, bf16: x, dy and dx 384 bytes, S and dS' 1024, dS' 512 again from the cache.
// Precision: what becomes dx, dB and dC is rounded to bf16 once on its way into a product; R, U, T and W keep float32's digits.
#include "back_sums.cuh"

namespace omnimamba {
namespace ssd {
namespace {

template <class T, int N>
__global__ void __launch_bounds__(MOST_THREADS, 1)
    ssd_back_chunk_kernel(const __grid_constant__ SsdScanParams q, const __grid_constant__ BackCover cover) {
  using Memory = BackLayout<T, N>;
  constexpr int PART = Memory::PART, SPAN = Memory::SPAN;
  OM_SHARED_DYNAMIC(memory);
  const Memory layout(cover);
  typename Memory::Small& small = layout.small(memory);
  const Rows<T, N> B = layout.B(memory), C = layout.C(memory);
  const Rows<T, CHUNK<T>> M = layout.M(memory);
  const int me = static_cast<int>(threadIdx.x), warp = warp_id();
  const int p_parts = static_cast<int>(ceil_div(q.headdim, PART));
  const int64_t chunks = chunks_of(q.length, CHUNK<T>), size = q.headdim * q.state;
  const auto per_group = static_cast<int>(q.heads / q.groups);

  Hand at;
  uint32_t rest = blockIdx.x;
  at.part = next_digit(rest, cover.parts);
  at.group = next_digit(rest, q.groups);
  at.chunk = next_digit(rest, chunks);
  at.b = static_cast<int>(rest);
  at.used = used_bits<T>(q, at.b, at.chunk);
  const int64_t start = int64_t{at.chunk} * CHUNK<T>;
  const int first = at.group * per_group + at.part * cover.part_heads;
  const int left_heads = per_group - at.part * cover.part_heads;
  const int items = (left_heads < cover.part_heads ? left_heads : cover.part_heads) * p_parts;
  const int first_sequence = q.dvarlen_states ? sequences_before(q, start) : 0;
  const int last_sequence = q.dvarlen_states ? sequences_before(q, start + CHUNK<T>) : 0;

  auto fetch = [&](int item) {
    if (item < items) {
      const int h = first + item / p_parts;
      const int stage = item % layout.stages, p0 = item % p_parts * PART;
      fetch_rows(layout.x(memory, stage), q.x.at<T>(at.b, start, h) + p0, q.x.stride[1], q.headdim - p0, at.used, me,
                 MOST_THREADS);
      fetch_rows(layout.dy(memory, stage, 0), q.dy.at<T>(at.b, start, h) + p0, q.dy.stride[1], q.headdim - p0, at.used,
                 me, MOST_THREADS);
      fetch_floats(small.steps[stage], steps_of<T>(q, at.b, h, at.chunk), STEPS * CHUNK<T>, me, MOST_THREADS);
    }
    copy_async_commit();
  };
  fetch_rows(B, q.B.at<T>(at.b, start, at.group), q.B.stride[1], q.state, at.used, me, MOST_THREADS);
  fetch_rows(C, q.C.at<T>(at.b, start, at.group), q.C.stride[1], q.state, at.used, me, MOST_THREADS);
  fetch(0);
  copy_async_wait<0>();
  sync_block();

  Scores<T, N> scores;
  scores.start(small, B, C);
  StateSums<T, N> sums;
  sums.clear();
#pragma unroll 1
  for (int item = 0; item < items; item++) {
    const int stage = item % layout.stages;
    at.h = first + item / p_parts;
    at.p0 = item % p_parts * PART;
    at.width = static_cast<int>(q.headdim) - at.p0 < PART ? static_cast<int>(q.headdim) - at.p0 : PART;
    at.steps = small.steps[stage];
    if (layout.stages > 1) fetch(item + 1);
    if (item > 0) {
      if (layout.stages > 1)
        copy_async_wait<1>();
      else
        copy_async_wait<0>();
      sync_block();
    }
    if (q.z) {
      open_gate<T, PART>(q, layout, memory, stage, at);
      sync_block();
    }
    const Rows<T, PART> x = layout.x(memory, stage);
    auto dy = [&](int term) { return layout.dy(memory, stage, term); };
    const bool begins = at.p0 == 0, ends = at.p0 + PART >= q.headdim;
    if (begins) {
      scores.write(M, at.steps);
      if (warp == 0) small.gathered.clear();
    }  // others read M after the barriers of each_state

    const int64_t state_at = ((at.b * chunks + at.chunk) * q.heads + at.h) * size;
    const float *S = q.states.at<float>() + state_at, *dS = q.dstates.at<float>() + state_at;
    const int column = warp % Memory::COLUMNS * 16, s0 = warp / Memory::COLUMNS * SPAN;
    const bool has_channels = warp < Memory::COLUMNS * Memory::SPANS && column < at.width;
    // body(gradient of a state that the chunk leads to, the last position before it): of the one after the chunk, then of
    // those after packed sequences that end here.
    auto each_state = [&](auto&& body) {
      int last = CHUNK<T> - 1;
#pragma unroll 1
      for (int sequence = first_sequence - 1; sequence < last_sequence; sequence++) {
        const float* dV = dS;
        if (sequence >= first_sequence) {
          const int64_t end = sequence_end(q, sequence);
          if (end <= start || end > start + CHUNK<T>) continue;
          last = static_cast<int>(end - start) - 1;
          dV = q.dvarlen_states.at<float>() + (sequence * q.heads + at.h) * size;
        }
        body(dV, last);
      }
    };
    each_state([&](const float* dV, int last) {
      const bool own = dV == dS;
      sums.template add<PART>(q, at, small, B, C, x, dy, layout.terms, S, dV, last, own, item == 0 && own);
      sync_block();
      if (warp == 0)
        small.gathered.add(small.R, small.U, small.W, static_cast<int>(ceil_div(q.state, 16)), own, last,
                           at.steps + DT * CHUNK<T>);
      sync_block();
    });
    if (has_channels) {
      float dx[SPAN / 8][4] = {};
      each_state([&](const float* dV, int last) {
        from_state_gradient<T, N, SPAN>(dx, q, at, B, dV, at.p0 + column, s0, last);
      });
      from_scores<T, SPAN>(dx, dy(0), M, column, s0);
      if (s0 == 0 && q.D)
        skip_gradient<T>(q.sums.at<float>() + ((at.b * chunks + at.chunk) * q.heads + at.h) * (2 + q.headdim) + 2, at,
                         x, column, layout.terms, dy);
      store_dx<T, SPAN>(q, at, dx, dy, layout.terms, column, s0, small.scratch[warp]);
    }
    scores.add(small, x, dy, layout.terms, at.width, at.steps, begins);
    if (ends) {
      sync_block();
      if (warp == 0)
        small.gathered.finish(q, at.b, at.h, at.chunk, small.tiles, at.steps + DT * CHUNK<T>, at.used,
                              q.sums.at<float>() + ((at.b * chunks + at.chunk) * q.heads + at.h) * (2 + q.headdim));
    }
    sync_block();
    if (layout.stages == 1) fetch(item + 1);
  }
  scores.write_gradient(small, M);
  sync_block();
  sums.finish(q, at, B, C, M);
}

constexpr int TOTAL_WARPS = 32, TOTAL_THREADS = TOTAL_WARPS * WARP, TOTAL_EACH = 4;  // elements a thread

// dA, ddt_bias and dD of a head, summed in double in a fixed order: a warp has a slice of the rows, a lane a column.
OM_DEVICE void total_of_head(const SsdScanParams& q, int h) {
  OM_SHARED(double, slices, TOTAL_THREADS);
  const int64_t columns = 2 + q.headdim,
                rows = q.batch * chunks_of(q.length, q.x.dtype == DType::BF16 ? CHUNK<bf16> : CHUNK<float>);
  const float* from = q.sums.at<float>() + h * columns;
  double all = 0.0;  // dD of all channels
#pragma unroll 1
  for (int64_t first = 0; first < columns; first += WARP) {
    const int64_t c = first + lane_id();
    double sum = 0.0;
    if (c < columns) {
      const int64_t begin = rows * warp_id() / TOTAL_WARPS, end = rows * (warp_id() + 1) / TOTAL_WARPS;
#pragma unroll 4
      for (int64_t row = begin; row < end; row++) sum += static_cast<double>(from[row * q.heads * columns + c]);
    }
    sync_block();  // the slices before were read
    slices[threadIdx.x] = sum;
    sync_block();
    if (warp_id() != 0 || c >= columns) continue;
    for (int slice = 1; slice < TOTAL_WARPS; slice++) sum += slices[slice * WARP + lane_id()];
    const auto value = static_cast<float>(sum);
    if (c == 0) put_float(value, q.dA, h);
    if (c == 1 && q.ddt_bias) put_float(value, q.ddt_bias, h);
    if (c > 1) all += sum;
    if (c > 1 && q.dD && q.dD.stride[1] != 0) put_float(value, q.dD, h, c - 2);
  }
  if (warp_id() != 0 || !q.dD || q.dD.stride[1] != 0) return;
  const double sum = warp_sum(all);
  if (lane_id() == 0) put_float(static_cast<float>(sum), q.dD, h);
}

// Elements of dB or dC, summed over the parts of a group's heads.
OM_DEVICE void total_of_parts(const SsdScanParams& q, int64_t block, int parts) {
  const int64_t size = q.batch * q.length * q.groups * q.state;
#pragma unroll
  for (int k = 0; k < TOTAL_EACH; k++) {
    const int64_t i = (block * TOTAL_EACH + k) * TOTAL_THREADS + threadIdx.x;
    if (i >= 2 * size) return;
    double sum = 0.0;
    for (int part = 0; part < parts; part++)
      sum += static_cast<double>(q.workspace.at<float>()[int64_t{2} * part * size + i]);
    View to = i < size ? q.dB : q.dC;
    to.stride[0] = 1;  // contiguous
    put_float(static_cast<float>(sum), to, i < size ? i : i - size);
  }
}

__global__ void __launch_bounds__(TOTAL_THREADS)
    ssd_back_totals_kernel(const __grid_constant__ SsdScanParams q, int parts) {
  if (blockIdx.x < q.heads)
    total_of_head(q, static_cast<int>(blockIdx.x));
  else
    total_of_parts(q, blockIdx.x - q.heads, parts);
}

}  // namespace

#if !defined(__CUDACC_RTC__)

namespace {

BackCover back_cover(const SsdScanParams& q) {
  const int64_t chunks = chunks_of(q.length, chunk_of(q)), per_group = q.heads / q.groups;
  const int64_t slots = q.multiprocessors / (q.batch * chunks * q.groups);
  const int64_t parts = slots < 1 ? 1 : slots < per_group ? slots : per_group, part_heads = ceil_div(per_group, parts);
  const bool narrow = q.x.dtype == DType::BF16;
  return {static_cast<int>(part_heads), static_cast<int>(ceil_div(per_group, part_heads)), narrow && q.z ? 3 : 1, 2};
}

void launch_back_chunks(const SsdScanParams& q, BackCover cover) {
#if defined(OMNIMAMBA_SM90)
  if (suits_hopper_backward(q)) return launch_hopper_back_chunks(q, cover.part_heads, cover.parts);
#endif
  for_instance(q, [&](auto type, auto states) {
    using T = decltype(type);
    constexpr int N = states.value;
    if (BackLayout<T, N>(cover).bytes() > static_cast<size_t>(q.shared_limit)) cover.stages = 1;
    launch<ssd_back_chunk_kernel<T, N>>({grid(q.batch * chunks_of(q.length, CHUNK<T>) * q.groups * cover.parts),
                                         MOST_THREADS, q.stream, BackLayout<T, N>(cover).bytes()},
                                        q, cover);
  });
}

}  // namespace

#endif

}  // namespace ssd

#if !defined(__CUDACC_RTC__)

int64_t ssd_scan_parts(const SsdScanParams& q) { return ssd::back_cover(q).parts; }

void ssd_scan_backward(const SsdScanParams& q) {
  using namespace ssd;
  launch_back_walk(q);
  const BackCover cover = back_cover(q);
  launch_back_chunks(q, cover);
  const int64_t size = q.workspace.data == q.dB.data ? 0 : q.batch * q.length * q.groups * q.state;
  const int64_t blocks = q.heads + ceil_div(2 * size, TOTAL_THREADS * TOTAL_EACH);
  launch<ssd_back_totals_kernel>({grid(blocks), TOTAL_THREADS, q.stream}, q, cover.parts);
}

#endif

}  // namespace omnimamba
