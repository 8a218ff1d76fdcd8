// Task-routed LoRA linear layer, for few rows (decode), and the dropout of its adapter's input.
//
// Maths    y[i, o] = sum_k W[o, k] x[i, k] + bias[o] + sum_r low[i, r] B[t, o, r],  low[i, r] = scale sum_k A[t, r, k] x[i, k],
//          t = task[i]; the last sum is absent where t = -1.
// Shapes   x (rows, in), weight (out, in), lora_A (tasks, r, in), lora_B (tasks, out, r), bias (out,), task (rows,) int32, on
//          a GPU int64 too, y (rows, out). Any float type each; innermost strides 1, others any.
//          Or weight int8 with weight_scale (out, in / kInt8Group rounded up), any float type and strides:
//          W[o, k] = weight_scale[o, k / kInt8Group] weight[o, k].
// Plan     x goes to float32 once, in the order in which weights unpack: 16 bits to 32 costs a shift for bfloat16's odd
//          neighbours and a mask for its even ones, so W evens come first, then W odds. Then threads own stretches of
//          outputs, each cut into four streams of neighbouring weight rows, eight for a single row of x where vectors
//          are wide: a tile takes one row of every stream to up to four rows of x in registers. A core waits for memory,
//          not for its multipliers, and has more lines on their way when it reads several long streams, each prefetched a
//          little ahead, than one, or than neighbouring rows.
//          int8 weights: cpu_int8.h. bf16 weights and matrix registers: cpu_few_amx.h.
//          One accumulator for each (row, output): the bits of a row depend on no other row and on no thread count, only
//          on which of these ways is taken.
// Traffic  the weights once (1, 2 or 4 bytes each): the rest stays in cache while x in floats does.
// Many rows are a matrix product: matmul.h.
#pragma once
#include "common/types.h"

namespace omnimamba {

constexpr int kInt8Group = 64;  // neighbouring int8 weights of a row that share a scale
// Floats of memory for kInt8Group values of x in digits (cpu_int8.h).
constexpr int kDigitGroupFloats = 80;

struct LoraLinearParams {
  View x, weight, weight_scale, lora_A, lora_B, bias, task, y, workspace;
  View low;  // (rows, tasks r) float, contiguous; of the CUDA kernels: scale u A^T, 0 outside the row's own task
  int64_t rows = 0, in = 0, out = 0, tasks = 0, rank = 0;
  float scale = 1;
  bool project = false;  // of the CUDA kernels: low comes out too, where it is given; else it goes in
  bool dropout = false;  // of lora_linear_low: as in LoraDropoutParams
  uint32_t seed = 0, threshold = 0;
  float keep = 1;
  bool vnni = true;     // of int8 weights: AVX-512 VNNI may be used, where the processor has it
  bool amx = false;     // of bf16 weights: its matrix registers may be used, likewise
  int threads = 1;      // of the processor
  uint64_t stream = 0;  // of the GPU
};

// workspace: rows * (in rounded up to a multiple of 32 + rank) floats; with int8 weights kDigitGroupFloats for each
// kInt8Group of `in` in the place of the first. Of bf16 weights in matrix registers 8 (in rounded up) for every 16 rows of
// bf16, 8 of float16 or 5 of float32, in the place of the first.
void lora_linear_forward(const LoraLinearParams& p);

// dense[o, k] = weight_scale[o, k / kInt8Group] weight[o, k], contiguous, for products of many rows: in float32, on a GPU in
// any float type.
struct Int8WeightParams {
  View dense, weight, weight_scale;
  int64_t out = 0, in = 0;
  int threads = 1;      // of the processor
  uint64_t stream = 0;  // of the GPU
};

void int8_weight_dequantize(const Int8WeightParams& p);

// y[i, j] = x[i, j] / (1 - p) where hash(seed, i * width + j) >= threshold = p 2^32, else 0, in float32.
// The hash is that of the reference: each mask is a pure function of the seed and the position.
struct LoraDropoutParams {
  View x, y;
  int64_t rows = 0, width = 0;
  uint32_t seed = 0, threshold = 0;
  float keep = 1;  // 1 - p
  int threads = 1;
};

void lora_dropout(const LoraDropoutParams& p);

}  // namespace omnimamba
