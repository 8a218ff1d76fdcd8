// Mamba-2's scan (state-space duality), chunk by chunk, forward and backward.
//
// Maths. For one head, with a_t = dt_t A and S (n x p) the state:
//   S_t = exp(a_t) S_(t-1) + dt_t B_t^T x_t        y_t = C_t S_t + D x_t        out_t = y_t silu(z_t)
// In a chunk of q positions, with c_t the sum of a up to t and S the state before it:
//   y  = exp(c_t) (C S)_t + sum over s <= t of M_ts x_s,      M_ts = (C B^T)_ts exp(c_t - c_s) dt_s
//   S' = exp(c_q) S + sum over s of B_s^T w_s x_s,            w_s = exp(c_q - c_s) dt_s
//
// Shapes. x, z, y (b, l, h, p); B, C (b, l, g, n); dt (b, l, h); states (b, h, p, n) outside, n x p panels inside.
//
// Plan. The caller cuts each row of the batch into chunks of at most kChunk positions, none of which straddles the start
// of a run of equal seq_idx, so that no kernel needs a mask. A slab is a few chunks; for each slab
//   1. prepare: for each chunk, dt for all heads, and B, C, C B^T once for all heads of a group;
//   2. scan: for each head, M and the two products above as register tiles (common/tile.h).
// Threads take tasks from one counter through all slabs: a few heads each, and amid a slab's the parts of the next slab's
// step 1. A task waits for those it builds on, which were taken before it.
// Where batch x heads cannot be dealt out evenly to the threads, step 2 runs over chunks as well: the chunks' own states
// first, then their prefix, then the outputs. Both ways add in the same order and give the same bits.
//
// Traffic per token, fp32, h heads of p: read x and write y, 8 h p bytes, plus 8 g n for B and C; everything between
// (q x q matrices, packed operands, states) stays in cache. Arithmetic: h (4 n p + q p) + g q n FLOPs a token.
#pragma once
#include <cstdint>

#include "../common/types.h"

namespace omnimamba {

enum class ChunkKind : int64_t { Continues, Fresh, Padding };  // Fresh: the state before it does not count

struct SsdScanParams {
  // x, B, C, z share one type; dt, A, D, dt_bias and all states are float32. D is (h, p), its stride 0 where it was (h,).
  View x, dt, A, B, C, D, z, dt_bias, initial_states;
  View chunks;       // (all chunks, 4) int64: first position, length, ChunkKind, row of varlen_states or -1
  View first_chunk;  // (b + 1) int64: each batch row's first chunk
  View y, final_states, varlen_states;
  View ungated;    // y before the gate, float32; absent unless a backward follows and z is given
  View states;     // (b, max_chunks + 1, h, state) the states between chunks; absent unless a backward follows
  View workspace;  // float32, as many as ssd_scan_*_workspace says
  View dy, dfinal_states, dvarlen_states;                       // backward: gradients that come in
  View dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states;  // backward: gradients that go out
  int64_t batch = 0, length = 0, heads = 0, headdim = 0, groups = 0, state = 0;
  int64_t max_chunks = 0;  // the most chunks of a batch row
  bool dt_softplus = false;
  float dt_low = 0, dt_high = 0;
  int threads = 1;  // of the processor

  // Only for the GPU, which cuts at multiples of a fixed chunk and marks where sequences begin (chunk.cuh): there x, B, C, z
  // have rows of whole 16-byte pieces, zeros after the last channel or state; x, z, y, ungated share a type, dt has any.
  View seq_idx;       // (b, l) integers; optional
  View cu_seqlens;    // (sequences + 1) integers; present where varlen_states are wanted
  View steps;         // (b, h, chunks, STEPS, chunk) float32
  View used;          // (b, chunks) int64, a bit a position
  View ends, decays;  // (b, h, segments - 1, p, n) and (b, h, segments - 1) float32
  View dstates;       // as states
  View sums;          // (b, chunks, h, 2 + p) float32: dA, ddt_bias, dD of each chunk
  int64_t sequences = 0, segments = 1;
  int64_t multiprocessors = 1, shared_limit = 0;  // of the GPU; bytes of shared memory that a block may ask for
  uint64_t stream = 0;
};

int64_t ssd_scan_state_floats(const SsdScanParams&);  // one head's state between chunks, in its inner layout
int64_t ssd_scan_forward_workspace(const SsdScanParams&);
int64_t ssd_scan_backward_workspace(const SsdScanParams&);
void ssd_scan_forward(const SsdScanParams&);
void ssd_scan_backward(const SsdScanParams&);

// Of the GPU: into how many segments the sequence is cut, each walked by a block of its own.
int64_t ssd_scan_segments(const SsdScanParams&);
// And into how many parts a group's heads are dealt in the backward: its workspace is (parts, 2, b, l, g, n) float32, and
// may be dB and dC themselves, one after the other, where there is one part and they are float32. Gradients have any float
// type there but dx and dz, which have x's, and those of states; dD is (h,), its second stride 0, or (h, p).
int64_t ssd_scan_parts(const SsdScanParams&);

// The recurrence itself, position by position, for a few positions without seq_idx: no workspace, no chunks.
void ssd_scan_short(const SsdScanParams&);

}  // namespace omnimamba
