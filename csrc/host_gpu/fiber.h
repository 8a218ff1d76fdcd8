// A fiber: a stack of its own that runs until it switches back. One CUDA thread is one fiber.
#pragma once
#include <cstddef>

namespace omnimamba::host_gpu {

// Where execution stopped: a stack pointer, or what the system needs instead.
struct Context {
  void* stack_pointer = nullptr;
  const void* bottom = nullptr;  // of the stack, for the address sanitizer
  std::size_t size = 0;
  void* fake_stack = nullptr;
};

// Stops in `from` and goes on in `to`. `last`: `from` is never resumed.
void switch_context(Context& from, Context& to, bool last = false);

// A stack with an inaccessible page below it, used again after its fiber has ended or was given up.
class Stack {
 public:
  static constexpr std::size_t SIZE = 256 << 10;
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  Stack(Stack&& other) noexcept : memory_(other.memory_) { other.memory_ = nullptr; }

  // A context that calls entry() when it is first switched to; entry must not return.
  Context start(void (*entry)());
  // Whether an address lies in the page below the stack.
  bool guards(const void* address) const;

 private:
  char* memory_;
};

// The first thing an entry function does.
void entered(Context& from);

}  // namespace omnimamba::host_gpu
