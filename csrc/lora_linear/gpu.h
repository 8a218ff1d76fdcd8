// Task-routed LoRA linear layer on a GPU, beside lora_linear.h: what the host tells the kernels for many rows.
//
// The adapters are concatenated by rank: low (rows, ranks) = scale u [A_1; A_2; ..]^T, 0 outside the columns of the row's own
// task, ranks = tasks r; then y = x W^T + bias + low [B_1 | B_2 | ..]^T. No sorting, nothing read back, any mix of tasks.
#pragma once
#include "lora_linear.h"

namespace omnimamba {

// low = scale u A^T of x (rows, in) and lora_A (tasks, r, in), any strides and any float type each. It also makes
// dlow = scale dy B, with dy as x and lora_B (tasks, out, r) transposed as lora_A.
void lora_linear_low(const LoraLinearParams& p);

// c (m, n) = a (m, k) b (k, n) + bias + low up. In x's gradient dropout masks the last term: keep[m, n] / (1 - p) low up.
struct LoraMatmulParams {
  View a, b;  // any strides, any float type
  View c;     // contiguous, any float type
  View bias;  // (n,), optional
  View low;   // (m, ranks) float, contiguous; optional
  View up;    // (tasks, r, n), any strides, any float type
  int64_t m = 0, n = 0, k = 0, tasks = 0, rank = 0;
  bool dropout = false;
  uint32_t seed = 0, threshold = 0;
  float keep = 1;           // 1 - p
  int multiprocessors = 0;  // of the chip
  int threads = 1;
  uint64_t stream = 0;
};

void lora_matmul(const LoraMatmulParams& p);

// gradient[t, r, j] = sum_i low[i, t r] u[i, j] and dbias[j] = sum_i v[i, j], where u is v with dropout: from low = dlow and
// v = x comes lora_A's gradient, from low and v = dy that of lora_B, transposed, and of the bias.
struct LoraOuterParams {
  View v;          // (rows, width), any strides, any float type
  View low;        // (rows, ranks) float, contiguous
  View gradient;   // (tasks, r, width), any strides, any float type; absent: only dbias
  View dbias;      // (width,), optional
  View workspace;  // lora_outer_workspace() floats
  int64_t rows = 0, width = 0, tasks = 0, rank = 0;
  bool dropout = false;
  uint32_t seed = 0, threshold = 0;
  float keep = 1;  // 1 - p
  int threads = 1;
  uint64_t stream = 0;
};

int64_t lora_outer_workspace(const LoraOuterParams& p);
void lora_outer(const LoraOuterParams& p);

}  // namespace omnimamba
