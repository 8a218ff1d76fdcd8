// What the small kernels that try the emulator share: memory that ends at an inaccessible page, and one entry a trial.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/hopper.cuh"
#include "common/reduce.cuh"

namespace trials {

using namespace omnimamba;

// `count` values of T, NaN at first, right before a page that nobody may touch.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::size_t count) : count_(count) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t bytes = count * sizeof(T), pages = (bytes + page - 1) / page;
    size_ = (pages + 1) * page;
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_ + pages * page, page, PROT_NONE);
    std::memset(memory_, 0xff, pages * page);
    first_ = reinterpret_cast<T*>(memory_ + pages * page - bytes);
  }
  ~Guarded() { munmap(memory_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  T& operator[](std::size_t i) { return first_[i]; }
  T* data() { return first_; }
  std::size_t size() const { return count_; }

 private:
  std::size_t count_, size_;
  char* memory_;
  T* first_;
};

// A small whole number for element i of matrix `which`: sums of their products are exact in every order.
inline float whole(std::size_t i, std::size_t which) {
  return static_cast<float>((i * 7 + which * 5 + i / 13) % 9) - 4.0f;
}

// The host's own conversions, exact for such numbers.
inline float wide(bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline void narrow(float a, float& to) { to = a; }
inline void narrow(float a, bf16& to) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  to.bits = static_cast<uint16_t>(bits >> 16);
}

template <class T>
inline void fill(Guarded<T>& to, std::size_t which) {
  for (std::size_t i = 0; i < to.size(); i++) narrow(whole(i, which), to[i]);
}

// A trial runs its kernel, whole or with its fault, and says whether the result is right; errors are thrown.
using Trial = std::function<bool(bool broken)>;

inline std::map<std::string, Trial>& all() {
  static auto* trials = new std::map<std::string, Trial>;
  return *trials;
}

struct Register {
  Register(const char* name, Trial trial) { all()[name] = std::move(trial); }
};

}  // namespace trials
