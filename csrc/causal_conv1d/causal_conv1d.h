// The depthwise causal convolution: what the host tells its kernels.
#pragma once
#include "../common/types.h"

namespace omnimamba {

// Forward and backward. b batch, d channels, l length, w width (2 to 4); T is x's storage type.
struct CausalConv1dParams {
  View x;               // (b, d, l) of T: channels one element apart, or times one element apart
  View weight;          // (w, d) float, contiguous
  View bias;            // (d,) float, contiguous; optional
  View initial_states;  // (b, d, w - 1) of T, in x's layout; optional
  View
      live;  // (b, l) int, contiguous; bit j: the input j steps back belongs to t's sequence; optional, of the CPU kernels
  View seq_idx;  // (b, l) integers, any strides: what live is made of; optional, of the CUDA kernels
  View y;        // (b, d, l) of T, in x's layout

  View dy;               // (b, d, l) of T, in x's layout
  View dx;               // (b, d, l) of T, in x's layout
  View dinitial_states;  // (b, d, w - 1) of T, in x's layout; optional
  View dweight;          // (w, d) float, contiguous
  View dbias;            // (d,) float, contiguous
  View workspace;        // causal_conv1d_workspace() floats

  int64_t batch = 0, channels = 0, length = 0, width = 0;
  bool activation = false;
  int threads = 1;      // of the processor
  uint64_t stream = 0;  // of the GPU
};

void causal_conv1d_forward(const CausalConv1dParams& p);
void causal_conv1d_backward(const CausalConv1dParams& p);
int64_t causal_conv1d_workspace(const CausalConv1dParams& p);

// Decode: the convolution continued from a state, which takes in x in place. X is x's storage type, S the state's.
struct CausalConv1dUpdateParams {
  View x;                   // (b, d, l) of X, any strides
  View conv_state;          // (slots, d, state_len) of S, any strides
  View weight;              // (d, w) float, any strides
  View bias;                // (d,) float, any stride; optional
  View cache_seqlens;       // (b,) integers: the state is a ring; optional
  View conv_state_indices;  // (b,) integers, negative: padding (on the GPU past the last too); optional
  View y;                   // (b, d, l) of X, any strides
  int64_t batch = 0, slots = 0, channels = 0, length = 0, width = 0, state_len = 0;
  bool activation = false;
  int threads = 1;      // of the processor
  uint64_t stream = 0;  // of the GPU
};

void causal_conv1d_update(const CausalConv1dUpdateParams& p);

// The last inputs of each packed sequence.
struct CausalConv1dVarlenParams {
  View x;           // (total, d) of T, any strides
  View cu_seqlens;  // (sequences + 1,) integers
  View states;      // (sequences, d, state_len) of T, any strides
  int64_t total = 0, sequences = 0, channels = 0, state_len = 0;
  int threads = 1;      // of the processor
  uint64_t stream = 0;  // of the GPU
};

void causal_conv1d_varlen_states(const CausalConv1dVarlenParams& p);

}  // namespace omnimamba
