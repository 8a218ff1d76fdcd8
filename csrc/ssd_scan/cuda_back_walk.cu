// The scan's backward, first launch: the gradients dS of the states between chunks, from the last chunk to the first.
//
//   dS = carry_end dS' + sum over t of carry_t dy_t C_t^T + sum over packed sequences of carry_e V
//
// dS' is the gradient of the state after the chunk, V that of the state after a sequence whose last position in the chunk is
// e; dy is the gradient before the gate. Terms as in chunk.cuh.
//
// Shapes: dstates (b, chunks, h, p, n) gets dS' of each chunk, dinitial_states what is left before the first.
// Plan: as in the forward's walk a warp has 16 channels of a head with dS in registers, a block one or two heads. No other
//   warp adds to its dS, and it adds in the order of the positions: the same bits in every run.
// Traffic a position and head: dy once, C shared by the block's heads, 4 p n / CHUNK bytes written.
#include "schedule.cuh"

namespace omnimamba {
namespace ssd {
namespace {

// dS += what the states after sequences that end in this chunk ask for.
template <class T, int N>
OM_DEVICE void join_sequences(States<N>& dS, const SsdScanParams& q, const Seat& at, int64_t start,
                              const float* carry) {
  const int last = sequences_before(q, start + CHUNK<T>);
  for (int j = sequences_before(q, start); j < last; j++) {
    const int64_t end = sequence_end(q, j);
    if (end <= start || end > start + CHUNK<T>) continue;
    const float* V = q.dvarlen_states.at<float>() + (j * q.heads + at.h) * q.headdim * q.state;
    const float left = carry[end - start - 1];
    each_pair<N>(dS, q, at, [&](float* pair, int row, int column, int count) {
      for (int i = 0; i < count; i++) pair[i] += scaled(V[row * q.state + column + i], left);
    });
  }
}

template <class T, int N>
__global__ void __launch_bounds__(MOST_THREADS, 1)
    ssd_back_walk_kernel(const __grid_constant__ SsdScanParams q, const __grid_constant__ Cover cover) {
  OM_SHARED_DYNAMIC(memory);
  const Layout<T, N> layout(cover);
  const Seat at = seat_of(q, cover, 1, cover.parts);
  const int me = static_cast<int>(threadIdx.x), team = static_cast<int>(blockDim.x);
  const auto chunks = static_cast<int>(chunks_of(q.length, CHUNK<T>));
  const int64_t size = q.headdim * q.state;

  auto fetch = [&](int chunk) {
    if (chunk >= 0) {
      const auto stage = layout.stage(memory, chunk % layout.stages);
      const uint64_t used = used_bits<T>(q, at.b, chunk);
      const int64_t row = static_cast<int64_t>(chunk) * CHUNK<T>;
      fetch_rows(stage.C, q.C.at<T>(at.b, row, at.group), q.C.stride[1], q.state, used, me, team);
      for (int head = 0; head < at.live_heads; head++)
        fetch_floats(stage.steps + head * STEPS * CHUNK<T>, steps_of<T>(q, at.b, at.first_head + head, chunk),
                     STEPS * CHUNK<T>, me, team);
      if (at.live && at.part == 0)
        fetch_rows(Rows<T, 16>{stage.x + at.column * layout.x_size}, q.dy.at<T>(at.b, row, at.h) + at.p0,
                   q.dy.stride[1], q.headdim - at.p0, used, lane_id(), WARP);
    }
    copy_async_commit();
  };

  fetch(chunks - 1);
  States<N> dS = {};
  if (at.live && q.dfinal_states)
    join_state<N>(dS, q, at, q.dfinal_states.at<float>() + (at.b * q.heads + at.h) * size, 0.0f);
#pragma unroll 1
  for (int chunk = chunks - 1; chunk >= 0; chunk--) {
    if (layout.stages > 1) {
      fetch(chunk - 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_block();
    if (at.live) {
      const auto stage = layout.stage(memory, chunk % layout.stages);
      const float* carry = stage.steps + (at.head * STEPS + CARRY) * CHUNK<T>;
      const Rows<T, 16> dy{stage.x + at.column * layout.x_size};
      const uint64_t used = used_bits<T>(q, at.b, chunk);
      store_state<N>(dS, q, at, q.dstates.at<float>() + ((at.b * chunks + chunk) * q.heads + at.h) * size);
      States<N> gained = {};  // apart from dS, which is often larger and would round it at every step
#pragma unroll 1
      for (int k = 0; k < CHUNK<T>; k += 16) {
        float v[8];
        const Block<T> block = load_block<true>(dy, k, 0);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const Place place = fragment::a16(lane_id(), i);
          const int t = k + place.column, channel = at.p0 + place.row;
          v[i] = scaled(block.value(i), carry[t]);
          if (q.z && channel < q.headdim && (used >> t & 1))
            v[i] *= silu(to_float(*q.z.at<T>(at.b, static_cast<int64_t>(chunk) * CHUNK<T> + t, at.h, channel)));
        }
        advance<T, N>(gained, v, stage.C, at.part, k);
      }
#pragma unroll
      for (int j = 0; j < OWN<N> / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) dS[j][i] = scaled(dS[j][i], carry[CHUNK<T> - 1]) + gained[j][i];
      if (q.dvarlen_states) join_sequences<T, N>(dS, q, at, static_cast<int64_t>(chunk) * CHUNK<T>, carry);
    }
    sync_block();
    if (layout.stages == 1) fetch(chunk - 1);
  }
  if (!at.live || !q.dinitial_states) return;
  if (q.dvarlen_states && q.sequences > 0 && sequence_end(q, 0) == 0)
    join_state<N>(dS, q, at, q.dvarlen_states.at<float>() + at.h * size, 1.0f);
  store_state<N>(dS, q, at, q.dinitial_states.at<float>() + (at.b * q.heads + at.h) * size);
}

}  // namespace

#if !defined(__CUDACC_RTC__)

void launch_back_walk(const SsdScanParams& q) {
  for_instance(q, [&](auto type, auto states) {
    using T = decltype(type);
    constexpr int N = states.value;
    const Cover cover = cover_of<T, N>(q);
    const Shape shape{grid(q.batch * blocks_of(q, cover)), cover.warps() * WARP, q.stream, Layout<T, N>(cover).bytes()};
    launch<ssd_back_walk_kernel<T, N>>(shape, q, cover);
  });
}

#endif

}  // namespace ssd
}  // namespace omnimamba
