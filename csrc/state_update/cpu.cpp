// One decode step of the selective scan, for each row b, head h, channel c and state k:
//
//   dt = softplus(dt + dt_bias),  state = exp(dt A) state + dt x B,  out = (sum_k state C + D x) silu(z)
//
// The state is rounded to its storage type only when it is written; out uses the unrounded one.
//
// Plan: threads over batch, heads and blocks of W channels; vectors along n for the state, along the channels for all else.
//   Where A is the same along n (heads whose decay is tied) a block of W rows costs one vector of exponentials.
// Traffic: b h d n states read and written once; the rest is smaller by a factor of n.
#include "../common/parallel.h"
#include "row.h"

namespace omnimamba {
namespace {

constexpr int64_t ENOUGH = 1 << 15;  // states below which waking threads costs more than it saves

template <class S, class T>
void update(const StateUpdateParams& p) {
  const int64_t blocks = (p.width + W - 1) / W;
  const int threads = p.batch * p.heads * p.width * p.n < ENOUGH ? 1 : p.threads;
  parallel_for(threads, p.batch * p.heads * blocks, [&](int64_t item, int) {
    const int64_t b = item / (p.heads * blocks), h = item / blocks % p.heads, c = item % blocks * W;
    const int rows = p.width - c < W ? static_cast<int>(p.width - c) : W;
    const int64_t slot = p.state_batch_indices ? integer_at(p.state_batch_indices, b) : b;
    if (slot < 0)
      scatter(p.out.at<T>(b, h, c), p.out.stride[2], vf{}, rows);
    else
      advance_rows<S, T, T>(p, b, slot, h, c, rows);
  });
}

}  // namespace

void state_update_forward(const StateUpdateParams& p) {
  for_float_type(p.state.dtype, [&](auto state) {
    for_float_type(p.x.dtype, [&](auto type) { update<decltype(state), decltype(type)>(p); });
  });
}

}  // namespace omnimamba
