// One decode step of a Mamba-2 mixer between its two projections, in one launch; maths and shapes as in mamba_mixer.h.
//
// Plan: a block owns some channels of one group of one row, of one head or several: their convolution, its state, and their rows
//   of S, read and written once, the first of them on their way while the convolution is taken. B and C are few and each
//   block convolves them for itself. Two things need all blocks of a group: the norm, and moving B's and C's convolution
//   state on, which no block may do while another still reads it. The last block of the group does both. No block waits,
//   so no order of blocks can lock up; sums are taken in a fixed order, so no order changes a bit; and the group's counter
//   is 0 again at the end, so that a captured graph can run once more.
// Traffic: 2 h p n elements of ssm_state a row, in accesses of 16 bytes where its addresses allow them. Beside it, mostly in
//   L2: 2 g n (2 w + 1) elements for B and C in each block, and 8 h p bytes of y on their way to the norm.
// Whole sequences have no kernel of their own, on Hopper neither: they are the convolution, the scan and the norm. KB from and
//   to memory a position, bf16, 64 heads of 64, n 128, one group: convolution 8.7 + 8.7; steps 0.1 + 1.3; the scan's walk on
//   Hopper 10.0 + 8.2; norm 16.4 + 8.2: 61.6, at 8 x 2048 positions 1.0 GB. What a fusion would save of that, by arithmetic:
//     convolution in the walk's producer  16.4, where no gradient is wanted (which reads the convolved x). But of a
//       multiprocessor's 65536 registers the walk leaves none, and for 128 channels by 64 positions w products and a SiLU are
//       some 900 issue slots of each scheduler a chunk, beside 2432 clocks of products and about as many slots that feed
//       them: what memory saves in 63 us the walk loses for the most part. B and C, 256 channels, would be convolved anew by
//       each pair of heads, 32 times
//     gate and squares in the walk's end  nothing: z is read there instead of by the norm, and y goes out, in and out again
//     norm in the walk                    16.4, but it needs all heads of a position, which are other blocks'
//     norm in the projection that follows 16.4: squares from the walk, a factor a row there, the norm's weight on its
//       columns. It is the one that pays, and belongs to lora_linear, not here
//   Times are predictions, at 4.25 TB/s; nothing of this was run.
#include "../common/launch.h"
#include "../common/math.cuh"
#include "../common/reduce.cuh"
#include "../common/ticket.cuh"
#include "mamba_mixer.h"

namespace omnimamba {
namespace {

using Params = MambaMixerStepParams;

constexpr int WARPS = 4, THREADS = WARPS * WARP, CHANNELS = 4;
constexpr int64_t FULL = 264;  // blocks that fill a large chip

// A block's place, and where the parts of a row of zxbcdt begin.
struct Part {
  int64_t b, slot, group, size, dim, z, xbc, dt;  // size: channels of a group
  int64_t first, count;                           // this block's channels, within the group
  int member, members;                            // its number among the blocks of the group

  OM_DEVICE Part(const Params& p, int channels_a_block) {
    dim = p.heads * p.headdim, size = dim / p.groups;
    z = 2 * p.extra, xbc = z + dim, dt = xbc + dim + 2 * p.groups * p.state;
    const auto blocks = static_cast<uint32_t>(ceil_div(size, channels_a_block)),
               groups = static_cast<uint32_t>(p.groups);
    member = static_cast<int>(blockIdx.x % blocks), members = static_cast<int>(blocks);
    group = blockIdx.x / blocks % groups, b = blockIdx.x / blocks / groups;
    slot = slot_at(p.state_batch_indices, b, p.slots);
    first = static_cast<int64_t>(member) * channels_a_block;
    count = size - first < channels_a_block ? size - first : channels_a_block;
  }
  // Head, or channel of it, of this block's channel c.
  OM_DEVICE uint32_t head(const Params& p, int64_t c) const {
    return static_cast<uint32_t>(group * size + first + c) / static_cast<uint32_t>(p.headdim);
  }
  OM_DEVICE uint32_t inner(const Params& p, int64_t c) const {
    return static_cast<uint32_t>(group * size + first + c) % static_cast<uint32_t>(p.headdim);
  }
  // The convolution's channel of state i of B, or of C.
  OM_DEVICE int64_t B(const Params& p, int64_t i) const { return dim + group * p.state + i; }
  OM_DEVICE int64_t C(const Params& p, int64_t i) const { return B(p, i) + p.groups * p.state; }
};

// The convolution's output for one channel.
OM_DEVICE float convolved(const Params& p, const Part& at, int64_t channel) {
  float sum = p.conv1d_bias ? float_at(p.conv1d_bias, channel) : 0.0f;
  const int width = static_cast<int>(p.width);
  for (int k = 0; k < width - 1; k++)
    sum +=
        float_at(p.conv1d_weight, channel, k) * float_at(p.conv_state, at.slot, channel, p.state_len - width + 1 + k);
  sum += float_at(p.conv1d_weight, channel, width - 1) * float_at(p.zxbcdt, at.b, at.xbc + channel);
  return p.activation ? silu(sum) : sum;
}

// Drops the oldest input of one channel and appends the new one.
OM_DEVICE void move_on(const Params& p, const Part& at, int64_t channel) {
  for (int64_t k = 0; k + 1 < p.state_len; k++)
    put_float(float_at(p.conv_state, at.slot, channel, k + 1), p.conv_state, at.slot, channel, k);
  put_float(float_at(p.zxbcdt, at.b, at.xbc + channel), p.conv_state, at.slot, channel, p.state_len - 1);
}

OM_DEVICE float gate(const Params& p, const Part& at, int64_t channel) {
  return silu(float_at(p.zxbcdt, at.b, at.z + channel));
}

// out = silu(z0) x0, the columns beside the scan, shared out over the row's blocks; 0 in padding.
OM_DEVICE void bypass(const Params& p, const Part& at) {
  const int64_t block = at.group * at.members + at.member;
  for (int64_t c = block * THREADS + threadIdx.x; c < p.extra; c += p.groups * at.members * THREADS) {
    float value = 0.0f;
    if (at.slot >= 0) value = silu(float_at(p.zxbcdt, at.b, c)) * float_at(p.zxbcdt, at.b, p.extra + c);
    put_float(value, p.out, at.b, c);
  }
}

// What the block keeps in shared memory, as floats.
struct Kept {
  float *B, *C, *input, *decay, *y;  // input: dt x, y: D x at first
  OM_DEVICE Kept(const Params& p, unsigned char* memory, int channels_a_block) {
    B = reinterpret_cast<float*>(memory), C = B + p.state, input = C + p.state;
    decay = input + channels_a_block, y = decay + channels_a_block;
  }
};

OM_DEVICE void prepare(const Params& p, const Part& at, const Kept& kept) {
  for (int64_t c = threadIdx.x; c < at.count; c += THREADS) {
    const int64_t channel = at.group * at.size + at.first + c;
    const uint32_t h = at.head(p, c);
    const float x = convolved(p, at, channel);
    move_on(p, at, channel);
    float dt = float_at(p.zxbcdt, at.b, at.dt + h);
    if (p.dt_bias) dt += float_at(p.dt_bias, h);
    dt = softplus(dt);
    kept.input[c] = dt * x;
    kept.decay[c] = expf(dt * float_at(p.A, h));
    kept.y[c] = p.D ? x * (p.headwise_D ? float_at(p.D, h) : float_at(p.D, h, at.inner(p, c))) : 0.0f;
  }
  for (int64_t i = threadIdx.x; i < 2 * p.state; i += THREADS) {
    const bool of_B = i < p.state;
    const int64_t k = of_B ? i : i - p.state;
    (of_B ? kept.B : kept.C)[k] = convolved(p, at, of_B ? at.B(p, k) : at.C(p, k));
  }
}

// S = decay S + input B^T and y += S C for this block's channels: CHANNELS of them for each LANES lanes at a time, N states
// a lane. `state` holds the first states of the first channels, which were read before.
template <class S, int N, int LANES>
struct Walk {
  static constexpr int TOGETHER = WARP / LANES, PASS = WARPS * TOGETHER * CHANNELS;  // channels
  float state[CHANNELS][N];

  OM_DEVICE static int64_t channel(int64_t first, int i) {
    return first + (warp_id() * CHANNELS + i) * TOGETHER + lane_id() / LANES;
  }
  OM_DEVICE static S* row(const Params& p, const Part& at, int64_t c) {
    return p.ssm_state.at<S>(at.slot, at.head(p, c), at.inner(p, c));
  }
  OM_DEVICE static void read(const Params& p, float (&out)[N], const S* from, int64_t k) {
    if (k >= p.state) return;
    if constexpr (N > 1)
      load_floats(out, from + k);
    else
      out[0] = to_float(from[k * p.ssm_state.stride[3]]);
  }
  OM_DEVICE void begin(const Params& p, const Part& at, int64_t first) {
#pragma unroll
    for (int i = 0; i < CHANNELS; i++)
      if (const int64_t c = channel(first, i); c < at.count) read(p, state[i], row(p, at, c), lane_id() % LANES * N);
  }
  OM_DEVICE void pass(const Params& p, const Part& at, const Kept& kept, int64_t first) {
    float sum[CHANNELS] = {};
    for (int64_t k = lane_id() % LANES * N; k < p.state; k += LANES * N) {
#pragma unroll
      for (int i = 0; i < CHANNELS; i++) {
        const int64_t c = channel(first, i);
        if (c >= at.count) continue;
        S* to = row(p, at, c);
        const float input = kept.input[c], decay = kept.decay[c];
#pragma unroll
        for (int j = 0; j < N; j++) {
          state[i][j] = decay * state[i][j] + input * kept.B[k + j];
          sum[i] += state[i][j] * kept.C[k + j];
        }
        if constexpr (N > 1)
          store_floats(to + k, state[i]);
        else
          to[k * p.ssm_state.stride[3]] = from_float<S>(state[i][0]);
        read(p, state[i], to, k + LANES * N);
      }
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
      const float y = warp_sum<LANES>(sum[i]);
      if (const int64_t c = channel(first, i); c < at.count && lane_id() % LANES == 0) kept.y[c] += y;
    }
  }
};

// y to the output, gated, or on its way to the norm: u and this block's sum of squares.
OM_DEVICE void finish(const Params& p, const Part& at, const Kept& kept, float* scratch) {
  float* u = p.workspace.at<float>() + at.b * at.dim;
  float squares[1] = {};
  for (int64_t c = threadIdx.x; c < at.count; c += THREADS) {
    const int64_t channel = at.group * at.size + at.first + c;
    float y = kept.y[c];
    if (!p.rmsnorm_weight || !p.norm_before_gate) y *= gate(p, at, channel);
    squares[0] += y * y;
    if (p.rmsnorm_weight)
      u[channel] = y;
    else
      put_float(y, p.out, at.b, p.extra + channel);
  }
  if (!p.rmsnorm_weight) return;
  block_sum(squares, scratch);
  if (threadIdx.x == 0) p.workspace.at<float>()[p.batch * at.dim + blockIdx.x] = squares[0];
}

// The norm of the group, when all its blocks have left their u and their squares.
OM_DEVICE void normalize(const Params& p, const Part& at, float* scratch) {
  const float* u = p.workspace.at<float>() + at.b * at.dim;
  const float* of_blocks = p.workspace.at<float>() + p.batch * at.dim + blockIdx.x - at.member;
  float squares[1] = {};
  for (int m = static_cast<int>(threadIdx.x); m < at.members; m += THREADS) squares[0] += of_blocks[m];
  block_sum(squares, scratch);
  const float r = inverse_root(squares[0] * reciprocal(static_cast<float>(at.size)) + p.eps);
  for (int64_t c = threadIdx.x; c < at.size; c += THREADS) {
    const int64_t channel = at.group * at.size + c;
    float v = u[channel] * r * float_at(p.rmsnorm_weight, channel);
    if (p.norm_before_gate) v *= gate(p, at, channel);
    put_float(v, p.out, at.b, p.extra + channel);
  }
}

template <class S, int N, int LANES>
__global__ void __launch_bounds__(THREADS, 4) step_kernel(const __grid_constant__ Params p, int channels_a_block) {
  OM_SHARED_DYNAMIC(memory);
  OM_SHARED(float, scratch, WARPS);
  using Rows = Walk<S, N, LANES>;
  const Part at(p, channels_a_block);
  bypass(p, at);
  if (at.slot < 0) {
    for (int64_t c = threadIdx.x; c < at.count; c += THREADS)
      put_float(0.0f, p.out, at.b, p.extra + at.group * at.size + at.first + c);
    return;
  }
  const Kept kept(p, memory, channels_a_block);
  Rows rows;
  rows.begin(p, at, 0);
  prepare(p, at, kept);
  sync_block();
  for (int64_t first = 0; first < at.count; first += Rows::PASS) {
    rows.pass(p, at, kept, first);
    rows.begin(p, at, first + Rows::PASS);
  }
  sync_block();
  finish(p, at, kept, scratch);
  if (!is_last_block(p.tickets.at<int32_t>(at.slot, at.group), at.members)) return;
  for (int64_t i = threadIdx.x; i < 2 * p.state; i += THREADS)
    move_on(p, at, i < p.state ? at.B(p, i) : at.C(p, i - p.state));
  if (p.rmsnorm_weight) normalize(p, at, scratch);
}

}  // namespace

#if !defined(__CUDACC_RTC__)

namespace {

// How many channels a block has: enough blocks for a large chip first, then more work for each.
int channels_for(const Params& p) {
  const int64_t size = p.heads * p.headdim / p.groups, fair = p.batch * p.heads * p.headdim / FULL;
  int channels = 32;
  while (channels < 128 && channels < size && 2 * channels <= fair) channels *= 2;
  return channels;
}

int64_t blocks_for(const Params& p) {
  return p.batch * p.groups * ceil_div(p.heads * p.headdim / p.groups, channels_for(p));
}

template <class S, int N, int LANES>
void run(const Params& p) {
  const int channels = channels_for(p);
  const size_t shared = sizeof(float) * static_cast<size_t>(2 * p.state + 3 * channels);
  launch<step_kernel<S, N, LANES>>({grid(blocks_for(p)), THREADS, p.stream, shared}, p, channels);
}

}  // namespace

int64_t mamba_mixer_step_workspace(const Params& p) {
  return p.rmsnorm_weight ? p.batch * p.heads * p.headdim + blocks_for(p) : 0;
}

void mamba_mixer_step(const Params& p) {
  if (p.batch == 0 || p.heads * p.headdim == 0) return;
  for_float_type(p.ssm_state.dtype, [&](auto state) {
    using S = decltype(state);
    constexpr int wide = 16 / static_cast<int>(sizeof(S));
    if (p.state % wide || p.ssm_state.stride[3] != 1 || !packs(p.ssm_state, 3, sizeof(S), 16))
      run<S, 1, WARP>(p);
    else if (p.state > 16 * wide)
      run<S, wide, WARP>(p);
    else
      run<S, wide, WARP / 2>(p);
  });
}

#endif

}  // namespace omnimamba
