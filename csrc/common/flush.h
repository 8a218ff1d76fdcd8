// Results below 2^-126 become zero within a scope. Decays produce them by the million, and a processor takes over a
// hundred cycles for each. Values read from memory keep their meaning.
#pragma once
#include <cstdint>

namespace omnimamba {

class FlushTinyResults {
 public:
  FlushTinyResults() : before_(mode()) { set_mode(before_ | kFlush); }
  ~FlushTinyResults() { set_mode(before_); }
  FlushTinyResults(const FlushTinyResults&) = delete;
  FlushTinyResults& operator=(const FlushTinyResults&) = delete;

 private:
#if defined(__x86_64__)
  using Mode = unsigned;
  static constexpr Mode kFlush = 1u << 15;
  static Mode mode() { return __builtin_ia32_stmxcsr(); }
  static void set_mode(Mode m) { __builtin_ia32_ldmxcsr(m); }
#elif defined(__aarch64__)
  using Mode = uint64_t;
  static constexpr Mode kFlush = Mode{1} << 24;
  static Mode mode() {
    Mode m;
    asm volatile("mrs %0, fpcr" : "=r"(m));
    return m;
  }
  static void set_mode(Mode m) { asm volatile("msr fpcr, %0" : : "r"(m)); }
#else
  using Mode = unsigned;
  static constexpr Mode kFlush = 0;
  static Mode mode() { return 0; }
  static void set_mode(Mode) {}
#endif
  Mode before_;
};

}  // namespace omnimamba
