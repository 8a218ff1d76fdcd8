#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "common/isa.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "lora_linear/cpu_few_amx.h"
#include "lora_linear/cpu_int8.h"
#include "lora_linear/lora_linear.h"

namespace omnimamba {
namespace {

constexpr int STEP = 2 * W;  // weights taken at a time from each row
constexpr int ROWS = 4;      // rows of x in one tile

constexpr int64_t ENOUGH = 1 << 14;  // elements below which waking threads costs more than it saves

static_assert(32 % STEP == 0, "the workspace pads rows to 32");
int64_t padded(int64_t in) { return (in + 31) / 32 * 32; }

// ---- STEP weights as two vectors of floats, and the order of x that fits them ----

struct Pair {
  vf first, second;
};

OM_INLINE Pair load_pair(const bf16* w) {
  vu both;
  std::memcpy(&both, w, sizeof both);
  return {(vf)(both << 16), (vf)(both & 0xffff0000u)};
}
template <class T>
OM_INLINE Pair load_pair(const T* w) {
  return {load(w), load(w + W)};
}

// STEP values of x in the order in which load_pair gives the weights of type TW.
template <class TW>
OM_INLINE void reorder(const float* x, float* to) {
  if constexpr (std::is_same_v<TW, bf16>) {
    typedef uint64_t Pairs __attribute__((vector_size(8 * W)));  // the even neighbour is the lower half
    Pairs pairs;
    std::memcpy(&pairs, x, sizeof pairs);
    store(to, (vf) __builtin_convertvector(pairs, vu));
    store(to + W, (vf) __builtin_convertvector(pairs >> 32, vu));
  } else {
    std::memcpy(to, x, sizeof(float) * STEP);
  }
}

// x as floats in the weights' order, each row padded with zeros to a multiple of STEP.
template <class TX, class TW>
void unpack_row(const TX* x, int64_t in, float* to) {
  for (int64_t begin = 0; begin < in; begin += STEP) {
    float plain[STEP] = {};
    if (begin + STEP <= in) {
      store(plain, load(x + begin));
      store(plain + W, load(x + begin + W));
    } else {
      for (int64_t k = begin; k < in; k++) plain[k - begin] = to_float(x[k]);
    }
    reorder<TW>(plain, to + begin);
  }
}

// ---- the tile ----

// One weight row of each of M streams.
template <class TW, int M>
struct Rows {
  static constexpr int COUNT = M;
  const TW* w[M];

  void set(const LoraLinearParams& p, int m, int64_t o) { w[m] = p.weight.at<TW>(o); }
};

// sums[r][m] = dot(x row r, weight row m), for R rows of x and one weight row of each stream.
template <int R, class TW, int M>
OM_INLINE void dot_tile(const Rows<TW, M>& rows, const float* x, int64_t pitch, int64_t in, float (*sums)[M]) {
  const int64_t whole = in / STEP * STEP;
  vf acc[R][M] = {};
  auto multiply = [&](const Pair& pair, int64_t k, int m) {
    for (int r = 0; r < R; r++) {
      acc[r][m] += pair.first * load(x + r * pitch + k);
      acc[r][m] += pair.second * load(x + r * pitch + k + W);
    }
  };
  for (int64_t k = 0; k < whole; k += STEP)
    for (int m = 0; m < M; m++) {
      for (size_t byte = 0; byte < sizeof(TW) * STEP; byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(rows.w[m] + k) + byte + AHEAD / M);
      multiply(load_pair(rows.w[m] + k), k, m);
    }
  if (whole < in)
    for (int m = 0; m < M; m++) {
      TW rest[STEP] = {};
      std::memcpy(static_cast<void*>(rest), rows.w[m] + whole, sizeof(TW) * static_cast<size_t>(in - whole));
      multiply(load_pair(rest), whole, m);
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = sum(acc[r][m]);
}

// x in floats, and its dot products with up to ROWS rows of it: a call, compiled once, whatever types x and y have. The rows
// come by value, so that the loops need not read where they are.
struct Floats {
  float* x;
  int64_t in;

  template <class TX, class TW>
  void take(const TX* from, int64_t row, TW) {
    unpack_row<TX, TW>(from, in, x + row * padded(in));
  }
  template <class AnyRows>
  [[gnu::noinline]] void dot(int64_t row, int64_t count, AnyRows rows, float (*sums)[AnyRows::COUNT]) const {
    const int64_t pitch = padded(in);
    const float* first = x + row * pitch;
    if constexpr (AnyRows::COUNT > STREAMS) {
      dot_tile<1>(rows, first, pitch, in, sums);
    } else {
      switch (count) {
        case 1: return dot_tile<1>(rows, first, pitch, in, sums);
        case 2: return dot_tile<2>(rows, first, pitch, in, sums);
        case 3: return dot_tile<3>(rows, first, pitch, in, sums);
        default: return dot_tile<ROWS>(rows, first, pitch, in, sums);
      }
    }
  }
};

#if defined(OM_VNNI)
// The same in digits, where a row's numbers allow it: then a tile's other rows go one by one, with the same bits.
struct Digits {
  DigitGroup* x;
  int64_t in;

  DigitGroup* row(int64_t i) const { return x + i * groups_of(in); }
  int32_t& in_digits(int64_t i) const { return row(i + 1)[-1].in_digits; }

  template <class TX>
  void take(const TX* from, int64_t i, int8_t) {
    const bool fits = split_row(from, in, row(i));
    if (!fits) unpack_row<TX, int8_t>(from, in, reinterpret_cast<float*>(row(i)));
    in_digits(i) = fits;
  }
  template <class TS>
  void dot(int64_t i, int64_t count, const Int8Rows<TS>& rows, float (*sums)[STREAMS]) const {
    bool all = true;
    for (int64_t r = 0; r < count; r++) all &= in_digits(i + r) != 0;
    if (!all && count > 1) {
      for (int64_t r = 0; r < count; r++) dot(i + r, 1, rows, sums + r);
      return;
    }
    if (!all) return dot_tile<1>(rows, reinterpret_cast<const float*>(row(i)), 0, in, sums);
    switch (count) {
      case 1: return dot_digits<1>(rows, row(i), in, sums);
      case 2: return dot_digits<2>(rows, row(i), in, sums);
      case 3: return dot_digits<3>(rows, row(i), in, sums);
      default: return dot_digits<ROWS>(rows, row(i), in, sums);
    }
  }
};
#endif

// ---- the adapter ----

template <class TX, class TA>
float dot(const TX* x, const TA* a, int64_t in) {
  vf acc = {};
  int64_t k = 0;
  for (; k + W <= in; k += W) acc += load(x + k) * load(a + k);
  float total = sum(acc);
  for (; k < in; k++) total += to_float(x[k]) * to_float(a[k]);
  return total;
}

int task_of(const LoraLinearParams& p, int64_t row) { return p.task ? *p.task.at<int32_t>(row) : -1; }

// low (rows, rank), 0 where the row has no adapter.
void project_down(const LoraLinearParams& p, float* low) {
  for_float_type(p.x.dtype, [&](auto x) {
    for_float_type(p.lora_A.dtype, [&](auto a) {
      using TX = decltype(x);
      using TA = decltype(a);
      parallel_for(p.threads, p.rows * p.rank, [&](int64_t i, int) {
        int64_t row = i / p.rank, r = i % p.rank;
        int t = task_of(p, row);
        low[i] = t < 0 ? 0.0f : p.scale * dot(p.x.at<TX>(row), p.lora_A.at<TA>(t, r), p.in);
      });
    });
  });
}

template <class TB>
OM_INLINE float project_up(const LoraLinearParams& p, const float* low, int task, int64_t o) {
  const TB* b = p.lora_B.at<TB>(task, o);
  float total = 0;
  for (int64_t r = 0; r < p.rank; r++) total += low[r] * to_float(b[r]);
  return total;
}

// Adds bias and adapter to one sum and writes it as y.
template <class TY>
OM_INLINE void finish(const LoraLinearParams& p, const float* low, int64_t row, int64_t o, float value) {
  if (p.bias) for_float_type(p.bias.dtype, [&](auto b) { value += to_float(*p.bias.at<decltype(b)>(o)); });
  if (const int t = task_of(p, row); t >= 0)
    for_float_type(p.lora_B.dtype, [&](auto b) { value += project_up<decltype(b)>(p, low + row * p.rank, t, o); });
  *p.y.at<TY>(row, o) = from_float<TY>(value);
}

// Outputs [begin, end), cut into streams of neighbouring weight rows.
template <class AnyRows, class TY, class Taken>
void streams(const LoraLinearParams& p, const Taken& x, const float* low, int64_t begin, int64_t end) {
  constexpr int M = AnyRows::COUNT;
  const int64_t length = (end - begin + M - 1) / M;
  for (int64_t i = begin; i < begin + length; i++) {
    AnyRows w;
    for (int m = 0; m < M; m++)  // beyond the last row the last one stands in; its sums are dropped
      w.set(p, m, std::min(i + m * length, end - 1));
    for (int64_t row = 0; row < p.rows; row += ROWS) {
      float sums[ROWS][M];
      const int64_t rows = std::min<int64_t>(ROWS, p.rows - row);
      x.dot(row, rows, w, sums);
      for (int64_t r = 0; r < rows; r++)
        for (int m = 0; m < M && i + m * length < end; m++) finish<TY>(p, low, row + r, i + m * length, sums[r][m]);
    }
  }
}

// y from x as `taken` holds it, in the first part of the workspace; the adapter's sums stand behind it.
template <class AnyRows, class TW, class Taken>
void forward(const LoraLinearParams& p, Taken taken, float* low) {
  for_float_type(p.x.dtype, [&](auto v) {
    using TX = decltype(v);
    parallel_for(p.rows * p.in < ENOUGH ? 1 : p.threads, p.rows,
                 [&](int64_t row, int) { taken.take(p.x.at<TX>(row), row, TW{}); });
    if (p.task) project_down(p, low);
    parallel_parts(p.rows * p.in * p.out < ENOUGH ? 1 : p.threads, p.out,
                   [&](int64_t begin, int64_t end, int) { streams<AnyRows, TX>(p, taken, low, begin, end); });
  });
}

}  // namespace

void lora_linear_forward(const LoraLinearParams& p) {
  check(p.x && p.weight && p.y && p.workspace, "lora_linear: x, weight, y and workspace are needed");
  float* space = p.workspace.at<float>();
  const Floats floats{space, p.in};
  check(!p.amx || (may_use_tiles() && p.weight.dtype == DType::BF16),
        "lora_linear: amx needs matrix registers and bf16 weights");
#if defined(OM_AMX)
  if (p.amx) {
    const int threads = p.rows * p.in * p.out < ENOUGH ? 1 : p.threads;
    for_float_type(p.x.dtype, [&](auto x) {
      few_rows_by_tiles<decltype(x)>(p, threads, reinterpret_cast<char*>(space), [&](float* low) {
        if (p.task) project_down(p, low);
      });
    });
    return;
  }
#endif
  if (p.weight.dtype != DType::I8) {
    for_float_type(p.weight.dtype, [&](auto w) {
      using TW = decltype(w);
      float* low = space + p.rows * padded(p.in);
      constexpr int alone = W > 4 ? 2 * STREAMS : STREAMS;  // narrow vectors would not stay in registers
      p.rows == 1 ? forward<Rows<TW, alone>, TW>(p, floats, low) : forward<Rows<TW, STREAMS>, TW>(p, floats, low);
    });
    return;
  }
  check(bool(p.weight_scale), "lora_linear: int8 weights need weight_scale");
  for_float_type(p.weight_scale.dtype, [&](auto s) {
    using AnyRows = Int8Rows<decltype(s)>;
#if defined(OM_VNNI)
    static const bool has_vnni = cpu_features().avx512_vnni;
    const bool sums_bytes = p.vnni && has_vnni;
    const Digits digits{reinterpret_cast<DigitGroup*>(space), p.in};
    if (sums_bytes) return forward<AnyRows, int8_t>(p, digits, reinterpret_cast<float*>(digits.row(p.rows)));
#endif
    forward<AnyRows, int8_t>(p, floats, space + p.rows * padded(p.in));
  });
}

void int8_weight_dequantize(const Int8WeightParams& p) {
  check(p.dense && p.weight && p.weight_scale, "int8_weight_dequantize: dense, weight and weight_scale are needed");
  for_float_type(p.weight_scale.dtype, [&](auto s) {
    parallel_for(p.out * p.in < ENOUGH ? 1 : p.threads, p.out, [&](int64_t o, int) {
      const int8_t* w = p.weight.at<int8_t>(o);
      float* dense = p.dense.at<float>(o);
      for (int64_t begin = 0; begin < p.in; begin += kInt8Group) {
        const vf scale = splat(to_float(*p.weight_scale.at<decltype(s)>(o, begin / kInt8Group)));
        const int64_t end = std::min<int64_t>(begin + kInt8Group, p.in);
        for (int64_t k = begin; k < end; k += W) {
          const int n = static_cast<int>(std::min<int64_t>(W, end - k));
          store_some(dense + k, scale * (n == W ? load(w + k) : load_part(w + k, n)), n);
        }
      }
    });
  });
}

// ---- dropout ----

namespace {

// A bijection of 32-bit integers whose output bits all depend on all input bits.
OM_INLINE uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return h ^ (h >> 16);
}

template <class T>
void drop_row(const LoraDropoutParams& p, int64_t row) {
  const T* x = p.x.at<T>(row);
  float* y = p.y.at<float>(row);
  const uint64_t first = static_cast<uint64_t>(row) * static_cast<uint64_t>(p.width);
  for (int64_t begin = 0; begin < p.width;) {
    // The key changes with the counter's upper half: go on to the end of the row or of the half.
    const uint64_t counter = first + static_cast<uint64_t>(begin);
    const uint32_t key = mix(static_cast<uint32_t>(counter >> 32) ^ mix(p.seed)), low = static_cast<uint32_t>(counter);
    const int64_t count = std::min(p.width - begin, (int64_t{1} << 32) - static_cast<int64_t>(low));
    for (int64_t j = 0; j < count; j++) {
      const bool kept = mix((low + static_cast<uint32_t>(j)) ^ key) >= p.threshold;
      y[begin + j] = kept ? to_float(x[begin + j]) / p.keep : 0.0f;
    }
    begin += count;
  }
}

}  // namespace

void lora_dropout(const LoraDropoutParams& p) {
  check(p.x && p.y, "lora_dropout: x and y are needed");
  for_float_type(p.x.dtype, [&](auto x) {
    parallel_for(p.threads, p.rows, [&](int64_t row, int) { drop_row<decltype(x)>(p, row); });
  });
}

}  // namespace omnimamba
