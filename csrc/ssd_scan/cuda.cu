// Mamba-2's scan on a GPU: the walk along the sequence. The maths is in ssd_scan.h, the terms in chunk.cuh. For a chunk,
// transposed, with S (p, n) the state before it:
//
//   y^T = (S C^T) carry + x^T M^T + D x^T,   M_ts = (C B^T)_ts L_ts dt_s,   out = y silu(z)
//   S  <- carry_end S + (weight x)^T B
//
// Plan: a block has one or two heads of a group and walks a segment of the sequence, chunk by chunk; a warp has 16 channels
//   of a head, their states in registers. S and weight x enter the matrix units from the registers that hold them. C B^T is
//   computed once for the block's heads, in 16 x 16 tiles dealt out to its warps, each of which writes M of every head.
//   While a chunk is computed the next one is on its way to shared memory. Heads vary fastest over blocks: those that share
//   B and C run together and find them in the L2 cache.
// Launches: the steps; the ends of segments and of packed sequences (cuda_ends.cu), where there are any; the walk. There are
//   several segments where batch rows and heads are too few to fill the chip: the walk then begins with what the earlier
//   segments left. No block waits for another.
// Traffic a position and head at p 64, n 128, bf16: x and y 256 bytes, steps 20; B and C from L2, 512 bytes shared by the
//   block's heads. `states` adds 4 p n / CHUNK = 512, z 128, `ungated` 128.
// Precision: bf16 operands enter as they are; S and M are rounded to bf16 once on their way into y, whose own rounding is
//   coarser. What enters S keeps float32's digits.
#include "schedule.cuh"

namespace omnimamba {
namespace ssd {
namespace {

// The 16 x 16 tile of C B^T on or below the diagonal that has number i, and from it M of each head.
template <class T, int N>
OM_DEVICE void score_tile(const typename Layout<T, N>::Stage& stage, const Layout<T, N>& layout, unsigned char* memory,
                          int live_heads, int i) {
  int row = 0;
  while ((row + 1) * (row + 2) / 2 <= i) row++;
  const int t0 = row * 16, s0 = (i - row * (row + 1) / 2) * 16;
  float G[2][4] = {};
#pragma unroll 4
  for (int k = 0; k < N; k += 16) {
    Right<T> right[2];
    load_rights<false>(right, stage.B, k, s0);
    const Left<T, 1> left(load_block<false>(stage.C, t0, k));
    multiply(G[0], left, right[0]);
    multiply(G[1], left, right[1]);
  }
#pragma unroll 1
  for (int head = 0; head < live_heads; head++) {
    const float* steps = stage.steps + head * STEPS * CHUNK<T>;
    const float *dt = steps + DT * CHUNK<T>, *high = steps + HIGH * CHUNK<T>, *low = steps + LOW * CHUNK<T>;
    const Rows<T, CHUNK<T>> M = layout.scores(memory, head);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Place at = fragment::c(lane_id(), 2 * half);
        const int t = t0 + at.row, s = s0 + 8 * j + at.column;
        float m[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
          float power = high[t] - high[s + k];
          if constexpr (sizeof(T) == 4) power += low[t] - low[s + k];
          const float L = s + k <= t ? power_of_two(power) : 0.0f;
          m[k] = scaled(G[j][2 * half + k], L * dt[s + k]);
        }
        put_pair(M, t, s, m[0], m[1]);
      }
  }
}

// y^T of 16 channels and 16 positions on its way out, through the gate.
template <class T>
OM_DEVICE void store_outputs(const SsdScanParams& q, const Seat& at, const float (&first)[4], const float (&second)[4],
                             float* turn, int64_t t0, uint64_t used) {
  float y[8];
  turn_block(y, first, second, turn);
  const int row = lane_id() / 2, channel = at.p0 + lane_id() % 2 * 8, width = static_cast<int>(q.headdim);
  const int64_t t = t0 + row;
  if (t >= q.length || channel >= width) return;
  const bool live = used >> row & 1;
  if (!live)
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = 0.0f;
  if (q.ungated) put_channels<T>(q.ungated.at<T>(at.b, t, at.h), channel, width, y);
  if (q.z && live) {
    const T* z = q.z.at<T>(at.b, t, at.h) + channel;
#pragma unroll
    for (int part = 0; part < 8; part += 4) {
      float gate[4];
      if (channel + part < width) {
        load_floats(gate, z + part);
#pragma unroll
        for (int i = 0; i < 4; i++) y[part + i] *= silu(gate[i]);
      }
    }
  }
  put_channels<T>(q.y.at<T>(at.b, t, at.h), channel, width, y);
}

// y^T = (S C^T) carry, of the warp's states.
template <class T, int N, int BLOCKS>
OM_DEVICE void from_state(float (&y)[BLOCKS][4], const States<N>& S, const Rows<T, N>& C, int part,
                          const float* carry) {
#pragma unroll
  for (int j = 0; j < OWN<N> / 8; j += 2) {
    float v[8];
    side_by_side(v, S[j], S[j + 1]);
    const Left<T, 1> left(v);
#pragma unroll
    for (int t = 0; t < BLOCKS; t += 2) {
      Right<T> right[2];
      load_rights<false>(right, C, part * OWN<N> + 8 * j, 8 * t);
      multiply(y[t], left, right[0]);
      multiply(y[t + 1], left, right[1]);
    }
  }
#pragma unroll
  for (int t = 0; t < BLOCKS; t++)
#pragma unroll
    for (int i = 0; i < 4; i++) y[t][i] = scaled(y[t][i], carry[8 * t + state_column(i)]);
}

// y^T += x^T M^T.
template <class T, int BLOCKS>
OM_DEVICE void add_scores(float (&y)[BLOCKS][4], const Rows<T, 16>& x, const Rows<T, CHUNK<T>>& M) {
#pragma unroll
  for (int k = 0; k < BLOCKS / 2; k++) {
    const Left<T, 1> left(load_block<true>(x, 16 * k, 0));
#pragma unroll
    for (int t = k; t < BLOCKS / 2; t++) {
      Right<T> right[2];
      load_rights<false>(right, M, 16 * k, 16 * t);
      multiply(y[2 * t], left, right[0]);
      multiply(y[2 * t + 1], left, right[1]);
    }
  }
}

// y^T += D x^T.
template <class T>
OM_DEVICE void add_skip(float (&first)[4], float (&second)[4], const SsdScanParams& q, const Seat& at,
                        const Block<T>& x) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int channel = at.p0 + state_row(2 * half);
    if (channel >= q.headdim) continue;
    const float D = *q.D.at<float>(at.h, channel);
#pragma unroll
    for (int i = 2 * half; i < 2 * half + 2; i++) first[i] += D * x.value(i), second[i] += D * x.value(4 + i);
  }
}

// S = end S + (weight x)^T B. What a chunk adds is summed apart from S, which is often larger and would round it at every
// step; half of the states at a time, whose sums have the registers of y, of float32, which comes in pieces, a quarter.
template <class T, int N>
OM_DEVICE void advance_chunk(States<N>& S, const Rows<T, 16>& x, const Rows<T, N>& B, int part, const float* weight,
                             float end) {
  constexpr int HALF = OWN<N> > 16 ? OWN<N> / 16 : 2, AT_ONCE = sizeof(T) == 4 && HALF > 2 ? HALF / 2 : HALF;
#pragma unroll
  for (int first = 0; first < OWN<N> / 8; first += AT_ONCE) {
    float gained[AT_ONCE][4] = {};
#pragma unroll 1
    for (int k = 0; k < CHUNK<T>; k += 16) {
      float v[8];
      const Block<T> block = load_block<true>(x, k, 0);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = scaled(block.value(i), weight[k + block_column(i)]);
      const Left<T, 3> left(v);
#pragma unroll
      for (int j = 0; j < AT_ONCE; j += 2) {
        Right<T> right[2];
        load_rights<true>(right, B, k, part * OWN<N> + 8 * (first + j));
        multiply(gained[j], left, right[0]);
        multiply(gained[j + 1], left, right[1]);
      }
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) S[first + j][i] = scaled(S[first + j][i], end) + gained[j][i];
  }
}

template <class T, int N>
__global__ void __launch_bounds__(MOST_THREADS, 1)
    ssd_walk_kernel(const __grid_constant__ SsdScanParams q, const __grid_constant__ Cover cover, int chunks_each) {
  constexpr int BLOCKS = CHUNK<T> / 16, TILES = BLOCKS * (BLOCKS + 1) / 2, PARTS = N / OWN<N>;
  using Memory = Layout<T, N>;
  OM_SHARED_DYNAMIC(memory);
  const Memory layout(cover);
  const Seat at = seat_of(q, cover, static_cast<int>(q.segments), PARTS);
  const int me = static_cast<int>(threadIdx.x), team = static_cast<int>(blockDim.x), warps = cover.warps();
  const auto chunks = static_cast<int>(chunks_of(q.length, CHUNK<T>));
  const int first = at.segment * chunks_each, last = first + chunks_each < chunks ? first + chunks_each : chunks;

  auto fetch = [&](int chunk) {
    if (chunk < last) {
      const auto stage = layout.stage(memory, (chunk - first) % layout.stages);
      const uint64_t used = used_bits<T>(q, at.b, chunk);
      const int64_t row = static_cast<int64_t>(chunk) * CHUNK<T>;
      fetch_rows(stage.B, q.B.at<T>(at.b, row, at.group), q.B.stride[1], q.state, used, me, team);
      fetch_rows(stage.C, q.C.at<T>(at.b, row, at.group), q.C.stride[1], q.state, used, me, team);
      for (int head = 0; head < at.live_heads; head++)
        fetch_floats(stage.steps + head * STEPS * CHUNK<T>, steps_of<T>(q, at.b, at.first_head + head, chunk),
                     STEPS * CHUNK<T>, me, team);
      if (at.live && at.part == 0)
        fetch_rows(Rows<T, 16>{stage.x + at.column * Memory::x_size}, q.x.at<T>(at.b, row, at.h) + at.p0, q.x.stride[1],
                   q.headdim - at.p0, used, lane_id(), WARP);
    }
    copy_async_commit();
  };

  fetch(first);
  States<N> S = {};
  begin_segment<N>(S, q, at);
#pragma unroll 1
  for (int chunk = first; chunk < last; chunk++) {
    if (layout.stages > 1) fetch(chunk + 1);
    if (layout.stages > 1)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    sync_block();
    const auto stage = layout.stage(memory, (chunk - first) % layout.stages);
    const float* steps = stage.steps + at.head * STEPS * CHUNK<T>;
    const float *carry = steps + CARRY * CHUNK<T>, *weight = steps + WEIGHT * CHUNK<T>;
    if (q.states && at.live)
      store_state<N>(S, q, at, q.states.at<float>() + ((at.b * chunks + chunk) * q.heads + at.h) * q.headdim * q.state);
#pragma unroll 1
    for (int i = warp_id(); i < TILES; i += warps) score_tile<T, N>(stage, layout, memory, at.live_heads, i);

    const Rows<T, 16> x{stage.x + at.column * Memory::x_size};
    float y[2 * BLOCKS][4] = {};
    if (at.live) from_state<T, N>(y, S, stage.C, at.part, carry);
    if (PARTS == 2 && at.part == 1) {
      float* partial = layout.partial(memory, at.column) + lane_id();
#pragma unroll
      for (int i = 0; i < 8 * BLOCKS; i++) partial[i * WARP] = y[i / 4][i % 4];
    }
    sync_block();  // the scores are there
    if (at.live && at.part == 0) {
      if constexpr (PARTS == 2) {
        const float* partial = layout.partial(memory, at.column) + lane_id();
#pragma unroll
        for (int i = 0; i < 8 * BLOCKS; i++) y[i / 4][i % 4] += partial[i * WARP];
      }
      add_scores<T>(y, x, layout.scores(memory, at.head));
      const uint64_t used = used_bits<T>(q, at.b, chunk);
#pragma unroll
      for (int t = 0; t < BLOCKS; t++) {
        if (q.D) add_skip<T>(y[2 * t], y[2 * t + 1], q, at, load_block<true>(x, 16 * t, 0));
        store_outputs<T>(q, at, y[2 * t], y[2 * t + 1], layout.output(memory, at.column),
                         static_cast<int64_t>(chunk) * CHUNK<T> + 16 * t, used >> 16 * t);
      }
    }
    if (at.live) advance_chunk<T, N>(S, x, stage.B, at.part, weight, carry[CHUNK<T> - 1]);
    sync_block();  // the stage is free, and so are the scores
    if (layout.stages == 1) fetch(chunk + 1);
  }
  if (at.live && last == chunks)
    store_state<N>(S, q, at, q.final_states.at<float>() + (at.b * q.heads + at.h) * q.headdim * q.state);
}

}  // namespace

#if !defined(__CUDACC_RTC__)

namespace {

// The cost of a cut in walks of a whole sequence: waves of blocks, each as long as a segment, and before them the ends of all
// segments but the last, which cost a share of a walk. A cut must be worth its doubts.
int best_segments(int64_t blocks, int64_t chunks, int64_t slots) {
  constexpr double ENDS_SHARE = 0.4, DOUBT = 0.95;
  constexpr int64_t SHORTEST = 2;  // chunks
  int best = 1;
  double least = DOUBT * static_cast<double>(ceil_div(blocks, slots));
  for (int count = 2; count <= MOST_SEGMENTS && count * SHORTEST <= chunks; count++) {
    const auto waves = static_cast<double>(ceil_div(blocks * count, slots)) / count;
    const auto ends = ENDS_SHARE * static_cast<double>(ceil_div(blocks * (count - 1), slots)) / count;
    if (waves + ends < least) {
      best = count;
      least = waves + ends;
    }
  }
  const int64_t each = ceil_div(chunks, best);  // as many as come first; no segment is left without any
  return static_cast<int>(ceil_div(chunks, each));
}

}  // namespace

#endif

}  // namespace ssd

#if !defined(__CUDACC_RTC__)

int64_t ssd_scan_segments(const SsdScanParams& q) {
  using namespace ssd;
#if defined(OMNIMAMBA_SM90)
  if (suits_hopper(q))
    return best_segments(q.batch * hopper_blocks(q), chunks_of(q.length, chunk_of(q)), q.multiprocessors);
#endif
  int64_t segments = 1;
  for_instance(q, [&](auto type, auto states) {
    using T = decltype(type);
    const Cover cover = cover_of<T, states.value>(q);
    const int64_t slots = q.multiprocessors * (MOST_THREADS / (cover.warps() * WARP));
    segments = best_segments(q.batch * blocks_of(q, cover), chunks_of(q.length, chunk_of(q)), slots);
  });
  return segments;
}

void ssd_scan_forward(const SsdScanParams& q) {
  using namespace ssd;
  check(chunks_of(q.length, chunk_of(q)) * q.batch * q.heads < (int64_t{1} << 31),
        "x: the CUDA scan takes fewer than 2^31 chunks of heads; split the batch");
  launch_steps(q);
  launch_ends(q);
#if defined(OMNIMAMBA_SM90)
  if (suits_hopper(q)) return launch_hopper_walk(q);
#endif
  for_instance(q, [&](auto type, auto states) {
    using T = decltype(type);
    constexpr int N = states.value;
    const Cover cover = cover_of<T, N>(q);
    const Shape shape{grid(q.batch * q.segments * blocks_of(q, cover)), cover.warps() * WARP, q.stream,
                      Layout<T, N>(cover).bytes()};
    launch<ssd_walk_kernel<T, N>>(shape, q, cover, chunks_each(q));
  });
}

#endif

}  // namespace omnimamba
