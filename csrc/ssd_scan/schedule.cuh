// How the scan's CUDA kernels are laid out: the shared memory of a block, the heads a block takes, segments of the sequence.
#pragma once
#include "../common/check.h"
#include "chunk.cuh"

namespace omnimamba::ssd {

constexpr int MOST_THREADS = 256, MOST_HEADS = 2, MOST_SEGMENTS = 8;

// The shared memory of a block: stages of a chunk's inputs, then the heads' scores M, then for each column of channels a
// 16 x 16 output, and y of the second part's states where there is one.
template <class T, int N>
struct Layout {
  static constexpr int ROWS = CHUNK<T> * Rows<T, N>::PITCH, SCORES = CHUNK<T> * Rows<T, CHUNK<T>>::PITCH;
  static constexpr int x_size = CHUNK<T> * Rows<T, 16>::PITCH;
  static constexpr int PARTIAL = N > OWN<N> ? CHUNK<T> * 16 : 0;
  int columns, heads, stages;

  struct Stage {
    Rows<T, N> B, C;
    T* x;  // x_size a column
    float* steps;
  };
  OM_HOST_DEVICE constexpr explicit Layout(const Cover& c)
      : columns(c.columns * c.heads), heads(c.heads), stages(c.stages) {}
  OM_HOST_DEVICE size_t stage_bytes() const {
    return sizeof(T) * static_cast<size_t>(2 * ROWS + columns * x_size) +
           sizeof(float) * static_cast<size_t>(heads * STEPS * CHUNK<T>);
  }
  OM_HOST_DEVICE size_t bytes() const {
    return static_cast<size_t>(stages) * stage_bytes() + sizeof(T) * static_cast<size_t>(heads * SCORES) +
           sizeof(float) * static_cast<size_t>(columns * (16 * OUT_PITCH + PARTIAL));
  }
  OM_DEVICE Stage stage(unsigned char* memory, int i) const {
    T* B = reinterpret_cast<T*>(memory + i * stage_bytes());
    T* x = B + 2 * ROWS;
    return {{B}, {B + ROWS}, x, reinterpret_cast<float*>(x + columns * x_size)};
  }
  OM_DEVICE Rows<T, CHUNK<T>> scores(unsigned char* memory, int head) const {
    return {reinterpret_cast<T*>(memory + stages * stage_bytes()) + head * SCORES};
  }
  OM_DEVICE float* output(unsigned char* memory, int column) const {
    return reinterpret_cast<float*>(scores(memory, heads).base) + column * 16 * OUT_PITCH;
  }
  OM_DEVICE float* partial(unsigned char* memory, int column) const {
    return output(memory, columns) + column * PARTIAL;
  }
};

// The next place of a block, of `count`, from what is left of its number.
OM_DEVICE int next_digit(uint32_t& rest, int64_t count) {
  const auto n = static_cast<uint32_t>(count);
  const auto found = static_cast<int>(rest % n);
  rest /= n;
  return found;
}

#if !defined(__CUDACC_RTC__)

// A block takes as many channels and heads as its warps and the chip's shared memory allow; of heads and stages, rather two
// stages.
template <class T, int N>
Cover cover_of(const SsdScanParams& q) {
  const auto wanted = static_cast<int>(ceil_div(q.headdim, 16)), per_group = static_cast<int>(q.heads / q.groups);
  constexpr int MOST = MOST_THREADS / WARP;
  constexpr int PARTS = N / OWN<N>, MOST_COLUMNS = MOST / PARTS;
  Cover cover{wanted < MOST_COLUMNS ? wanted : MOST_COLUMNS, MOST_HEADS, PARTS, 0, 0, 2};
  if (cover.heads > per_group || cover.warps() > MOST) cover.heads = 1;
  while (Layout<T, N>(cover).bytes() > static_cast<size_t>(q.shared_limit)) {
    if (cover.heads > 1)
      cover.heads--;
    else if (cover.stages > 1)
      cover.stages--;
    else if (cover.columns > 1)
      cover.columns = (cover.columns + 1) / 2;
    else
      check(false, "shared_limit: no block of the scan fits into so few bytes");
  }
  cover.p_blocks = static_cast<int>(ceil_div(wanted, cover.columns));
  cover.head_blocks = static_cast<int>(ceil_div(per_group, cover.heads));
  return cover;
}

// Blocks that cover one batch row once.
inline int64_t blocks_of(const SsdScanParams& q, const Cover& cover) {
  return q.groups * cover.head_blocks * cover.p_blocks;
}

// body(T{}, N) with the type of x and the number of states rounded up to what a kernel is compiled for.
template <class Body>
void for_instance(const SsdScanParams& q, Body&& body) {
  auto with_states = [&](auto type) {
    if (q.state <= 16) return body(type, std::integral_constant<int, 16>{});
    if (q.state <= 64) return body(type, std::integral_constant<int, 64>{});
    if (q.state <= 128) return body(type, std::integral_constant<int, 128>{});
    check(q.state <= 256, "B: the CUDA kernels hold at most 256 states a channel");
    return body(type, std::integral_constant<int, 256>{});
  };
  if (q.x.dtype == DType::BF16) return with_states(bf16{});
  check(q.x.dtype == DType::F32, "x: the CUDA scan takes bfloat16 and float32");
  return with_states(float{});
}

inline int chunk_of(const SsdScanParams& q) { return q.x.dtype == DType::BF16 ? CHUNK<bf16> : CHUNK<float>; }

// The chunks of a segment but the last.
inline int chunks_each(const SsdScanParams& q) {
  return static_cast<int>(ceil_div(chunks_of(q.length, chunk_of(q)), q.segments));
}

void launch_steps(const SsdScanParams& q);
// The ends of all segments but the last, and the states after packed sequences.
void launch_ends(const SsdScanParams& q);
void launch_back_walk(const SsdScanParams& q);

// cuda_sm90.cu: whether its walk takes this call, into how many blocks it cuts a batch row, and the walk itself.
bool suits_hopper(const SsdScanParams& q);
int64_t hopper_blocks(const SsdScanParams& q);
void launch_hopper_walk(const SsdScanParams& q);
// cuda_sm90_backward.cu: whether it takes the gradients of this call's chunks, and that launch.
bool suits_hopper_backward(const SsdScanParams& q);
void launch_hopper_back_chunks(const SsdScanParams& q, int part_heads, int parts);

#endif

}  // namespace omnimamba::ssd
