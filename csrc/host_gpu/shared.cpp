#include <sys/mman.h>

#include <cstring>
#include <new>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, size) (void)0
#define ASAN_UNPOISON_MEMORY_REGION(begin, size) (void)0
#endif

namespace omnimamba::host_gpu {
namespace {
constexpr char MARK = static_cast<char>(0xa5);
}

Shared::Shared() {
  void* memory = mmap(nullptr, CAPACITY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
}

Shared::~Shared() {
  ASAN_UNPOISON_MEMORY_REGION(memory_, CAPACITY);
  munmap(memory_, CAPACITY);
  if (async_) munmap(async_, CAPACITY);
}

void Shared::watch() {
  if (async_) return;
  void* memory = mmap(nullptr, CAPACITY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  async_ = static_cast<char*>(memory);
  for (const Array& a : arrays_) publish({static_cast<uint32_t>(a.begin), static_cast<uint32_t>(a.bytes)});
}

void Shared::publish(const Piece& piece) const {
  std::memcpy(async_ + piece.offset, memory_ + piece.offset, piece.bytes);
}

void Shared::gap(std::size_t begin, std::size_t end) {
  ASAN_UNPOISON_MEMORY_REGION(memory_ + begin, end - begin);  // it may begin in the gap behind the array before
  std::memset(memory_ + begin, MARK, end - begin);
  ASAN_POISON_MEMORY_REGION(memory_ + begin, end - begin);
}

// The array declared at `key`: NaN of every type when a thread of the block first comes by.
void* Shared::array(const void* key, std::size_t bytes, std::size_t alignment) {
  for (const Array& a : arrays_)
    if (a.key == key) return memory_ + a.begin;
  const std::size_t begin = (used_ + GAP + alignment - 1) / alignment * alignment;
  total_ += bytes;
  if (total_ > most_shared() || begin + bytes + GAP > CAPACITY) fail("more shared memory than a block can have");
  gap(used_, begin);
  std::memset(memory_ + begin, 0xff, bytes);
  if (async_) std::memset(async_ + begin, 0xff, bytes);
  gap(begin + bytes, begin + bytes + GAP);
  used_ = begin + bytes;
  arrays_.push_back({key, begin, bytes});
  return memory_ + begin;
}

bool Shared::contains(const void* p, std::size_t bytes) const {
  const auto* first = static_cast<const char*>(p);
  for (const Array& a : arrays_)
    if (first >= memory_ + a.begin && first + bytes <= memory_ + a.begin + a.bytes) return true;
  return false;
}

const char* Shared::damaged() const {
  std::size_t end = 0;
  const char* found = nullptr;
  ASAN_UNPOISON_MEMORY_REGION(memory_, CAPACITY);
  for (std::size_t i = 0; i <= arrays_.size(); i++) {
    const std::size_t begin = i < arrays_.size() ? arrays_[i].begin : arrays_.empty() ? 0 : end + GAP;
    for (std::size_t k = end; k < begin; k++)
      if (memory_[k] != MARK) found = "shared memory beside an array was overwritten";
    if (i < arrays_.size()) end = arrays_[i].begin + arrays_[i].bytes;
  }
  return found;
}

}  // namespace omnimamba::host_gpu
