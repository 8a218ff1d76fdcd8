// How the last block of several finds out that it is the last: nobody waits, so no order of blocks can lock up.
#pragma once
#include "threads.cuh"

namespace omnimamba {

#if defined(OMNIMAMBA_EMULATED)
inline int count_up(int32_t* counter, int by) {
  const int before = *counter;
  *counter += by;
  return before;
}
#else
// Adds to a counter in global memory and returns what it was. What this thread saw before is seen by whoever counts
// after it.
OM_DEVICE int count_up(int32_t* counter, int by) {
  __threadfence();
  const int before = atomicAdd(counter, by);
  __threadfence();
  return before;
}
#endif

// True in the last of `blocks` blocks to call it with this counter, which is 0 before and after: what the others wrote to
// global memory is then there to read. What was counted is taken back, so that two steps on one
// counter against the rules do not spoil the next. All threads of the block call it.
OM_DEVICE bool is_last_block(int32_t* counter, int blocks) {
  OM_SHARED(int, before, 1);
  sync_block();
  if (threadIdx.x == 0) {
    before[0] = count_up(counter, 1) % blocks;
    if (before[0] == blocks - 1) count_up(counter, -blocks);
  }
  sync_block();
  return before[0] == blocks - 1;
}

}  // namespace omnimamba
