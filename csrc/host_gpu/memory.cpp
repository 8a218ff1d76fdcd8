#include "memory.h"

#include <cmath>

namespace omnimamba::host_gpu {
namespace {

void land(const Thread::Copy& copy) {
  if (copy.live)
    std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.bytes));
  else
    std::memset(copy.to, 0, static_cast<std::size_t>(copy.bytes));
  wrote(copy.to, static_cast<std::size_t>(copy.bytes));
}

}  // namespace

void copy_async(void* shared, const void* global, int bytes, bool live) {
  const auto size = static_cast<std::size_t>(bytes);
  check_aligned(shared, size, "copy_async, shared");
  check_aligned(global, size, "copy_async, global");
  check_shared(shared, size, "copy_async");
  auto& groups = self().copy_groups;
  if (groups.empty()) groups.emplace_back();
  const Thread::Copy copy{shared, global, bytes, live};
  if (settings().early_copies)
    land(copy);
  else
    groups.back().push_back(copy);
}

void copy_async_commit() {
  auto& groups = self().copy_groups;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void copy_async_wait(int latest) {
  auto& groups = self().copy_groups;  // the last one is still open
  while (static_cast<int>(groups.size()) - 1 > latest) {
    for (const Thread::Copy& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

uint32_t bits_of(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}

uint16_t round_to_bf16(float a) {
  const uint32_t bits = bits_of(a);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

uint16_t round_to_f16(float a) {
  const uint32_t sign = bits_of(a) >> 16 & 0x8000u;
  const double size = std::fabs(static_cast<double>(a));
  if (std::isnan(a)) return 0x7fff;
  if (size == 0.0) return static_cast<uint16_t>(sign);
  if (size >= 65520.0) return static_cast<uint16_t>(sign | 0x7c00u);
  int exponent;
  std::frexp(size, &exponent);
  const int step = std::max(exponent - 11, -24);  // of the last place
  const double units = std::nearbyint(std::ldexp(size, -step));
  // Units of 2^-24 below 2^-14; above, 1024 of them a binade, into which a carry goes by itself.
  const auto bits = static_cast<uint32_t>(step + 24) * 1024u + static_cast<uint32_t>(units);
  return static_cast<uint16_t>(sign | bits);
}

float widen_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? float_of(0x7fc00000u) : sign * INFINITY;
  return exponent ? sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                  : sign * std::ldexp(static_cast<float>(fraction), -24);
}

}  // namespace omnimamba::host_gpu
