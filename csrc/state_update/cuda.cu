// One decode step of the selective scan, for each row b, head h, channel c and state k:
//
//   dt = softplus(dt + dt_bias),  state = exp(dt A) state + dt x B,  out = (sum_k state C + D x) silu(z)
//
// The state is rounded to its storage type only when it is written; out uses the unrounded one.
//
// Plan: LANES lanes share a channel, each with N neighbouring states in one access of 16 bytes where all addresses allow it,
//   and N = 1 at any strides. A warp walks CHANNELS channels a lane group at a time and starts the reads of all of them
//   before it needs the first; B and C are read once a warp. Where A is the same along n one exponential serves a channel.
// Traffic: b h d n states read and written once; the rest is smaller by a factor of n.
#include "../common/launch.h"
#include "../common/math.cuh"
#include "../common/reduce.cuh"
#include "state_update.h"

namespace omnimamba {
namespace {

constexpr int WARPS = 4, CHANNELS = 4;

// What a channel needs beside its states; the lanes of a channel hold the same.
struct Channel {
  float x, dt, decay;  // decay: exp(dt A) where A is the same along n
};

template <class T>
OM_DEVICE Channel read_channel(const StateUpdateParams& p, int64_t b, int64_t h, int64_t c, bool tied) {
  Channel in{to_float(*p.x.at<T>(b, h, c)), *p.dt.at<float>(b, h, c), 0.0f};
  if (p.dt_bias) in.dt += *p.dt_bias.at<float>(h, c);
  if (p.dt_softplus) in.dt = softplus(in.dt);
  if (tied) in.decay = expf(in.dt * *p.A.at<float>(h, c));
  return in;
}

// N values from index k on, 0 past n; one access where N > 1.
template <class T, int N>
OM_DEVICE void read_states(float (&out)[N], const T* row, int64_t step, int k, int n) {
  if (k >= n) {
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = 0.0f;
  } else if constexpr (N > 1) {
    load_floats(out, row + k);
  } else {
    out[0] = to_float(row[k * step]);
  }
}

template <class S, class T, int N, int LANES>
__global__ void __launch_bounds__(WARPS* WARP) state_update_kernel(const __grid_constant__ StateUpdateParams p) {
  constexpr int TOGETHER = WARP / LANES;  // channels a warp has in hand at a time
  const int n = static_cast<int>(p.n), lane = lane_id() % LANES;
  const auto a_head = static_cast<uint32_t>(ceil_div(p.width, WARPS * CHANNELS * TOGETHER));  // blocks
  const auto heads = static_cast<uint32_t>(p.heads), head = blockIdx.x / a_head % heads;
  const int64_t h = head, b = blockIdx.x / a_head / heads, group = head / (heads / static_cast<uint32_t>(p.groups));
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x % a_head) * WARPS + warp_id()) * CHANNELS * TOGETHER + lane_id() / LANES;
  const int64_t slot = slot_at(p.state_batch_indices, b, p.slots);
  const bool tied = (p.A.stride[2] == 0 && n) || n == 1;
  const T *B = p.B.at<T>(b, group), *C = p.C.at<T>(b, group);
  auto channel = [&](int i) { return first + i * TOGETHER; };
  if (slot < 0) {
    for (int i = 0; i < CHANNELS; i++)
      if (lane == 0 && channel(i) < p.width) *p.out.at<T>(b, h, channel(i)) = from_float<T>(0.0f);
    return;
  }
  Channel in[CHANNELS];
  float out[CHANNELS] = {}, state[CHANNELS][N];
#pragma unroll
  for (int i = 0; i < CHANNELS; i++) {
    if (channel(i) < p.width) read_states(state[i], p.state.at<S>(slot, h, channel(i)), p.state.stride[3], lane * N, n);
  }
#pragma unroll
  for (int i = 0; i < CHANNELS; i++)
    if (channel(i) < p.width) in[i] = read_channel<T>(p, b, h, channel(i), tied);
  for (int k = lane * N; k < n; k += LANES * N) {
    float Bk[N], Ck[N];
    read_states(Bk, B, p.B.stride[2], k, n);
    read_states(Ck, C, p.C.stride[2], k, n);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
      if (channel(i) >= p.width) continue;
      S* row = p.state.at<S>(slot, h, channel(i));
      float A[N];
      if (!tied) read_states(A, p.A.at<float>(h, channel(i)), p.A.stride[2], k, n);
#pragma unroll
      for (int j = 0; j < N; j++) {
        const float decay = tied ? in[i].decay : expf(in[i].dt * A[j]);
        state[i][j] = decay * state[i][j] + in[i].dt * in[i].x * Bk[j];
        out[i] += state[i][j] * Ck[j];
      }
      if constexpr (N > 1)
        store_floats(row + k, state[i]);
      else
        row[k * p.state.stride[3]] = from_float<S>(state[i][0]);
      read_states(state[i], row, p.state.stride[3], k + LANES * N, n);
    }
  }
#pragma unroll
  for (int i = 0; i < CHANNELS; i++) {
    float y = warp_sum<LANES>(out[i]);
    if (lane != 0 || channel(i) >= p.width) continue;
    if (p.D) y += *p.D.at<float>(h, channel(i)) * in[i].x;
    if (p.z) y *= silu(to_float(*p.z.at<T>(b, h, channel(i))));
    *p.out.at<T>(b, h, channel(i)) = from_float<T>(y);
  }
}

template <class S, class T, int N, int LANES>
void run(const StateUpdateParams& p) {
  const int64_t blocks = ceil_div(p.width, WARPS * CHANNELS * (WARP / LANES)) * p.heads * p.batch;
  launch<state_update_kernel<S, T, N, LANES>>({grid(blocks), WARPS * WARP, p.stream}, p);
}

}  // namespace

#if !defined(__CUDACC_RTC__)

void state_update_forward(const StateUpdateParams& p) {
  if (p.batch == 0 || p.width == 0) return;
  for_float_type(p.state.dtype, [&](auto state) {
    for_float_type(p.x.dtype, [&](auto type) {
      using S = decltype(state);
      using T = decltype(type);
      constexpr int wide = 16 / static_cast<int>(sizeof(S)), element = static_cast<int>(sizeof(T));
      constexpr int floats = wide < 4 ? wide * 4 : 16;
      const bool fits = p.n % wide == 0 && p.state.stride[3] == 1 && p.B.stride[2] == 1 && p.C.stride[2] == 1 &&
                        packs(p.state, 3, sizeof(S), 16) &&
                        packs(p.B, 2, element, wide * element < 16 ? wide * element : 16) &&
                        packs(p.C, 2, element, wide * element < 16 ? wide * element : 16) &&
                        (p.A.stride[2] == 0 || (p.A.stride[2] == 1 && packs(p.A, 2, 4, floats)));
      if (!fits)
        run<S, T, 1, 32>(p);
      else if (p.n > 16 * wide)
        run<S, T, wide, 32>(p);
      else if (p.n > 4 * wide)
        run<S, T, wide, 16>(p);
      else
        run<S, T, wide, 4>(p);
    });
  });
}

#endif

}  // namespace omnimamba
