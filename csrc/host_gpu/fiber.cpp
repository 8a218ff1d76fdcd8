#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define WHEN_SANITIZED(statement) statement
#else
#define WHEN_SANITIZED(statement)
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace omnimamba::host_gpu {
namespace {

std::size_t page() {
  static const std::size_t size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace

#if defined(__x86_64__)
// The registers that a called function must keep are pushed, the stack pointers exchanged, the others' popped.
extern "C" void omnimamba_switch_stack(void** save, void* load);
asm(R"(
.text
.type omnimamba_switch_stack, @function
omnimamba_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size omnimamba_switch_stack, .-omnimamba_switch_stack
)");
#endif

void switch_context(Context& from, Context& to, [[maybe_unused]] bool last) {
  WHEN_SANITIZED(__sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.size));
#if defined(__x86_64__)
  omnimamba_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  ucontext_t here;
  from.stack_pointer = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to.stack_pointer));
#endif
  WHEN_SANITIZED(__sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr));
}

void entered([[maybe_unused]] Context& from) {
  WHEN_SANITIZED(__sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.size));
}

Stack::Stack() {
  void* memory =
      mmap(nullptr, SIZE + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  if (mprotect(memory_, page(), PROT_NONE) != 0) throw std::bad_alloc();
}

Stack::~Stack() {
  if (memory_) munmap(memory_, SIZE + page());
}

bool Stack::guards(const void* address) const {
  const auto* a = static_cast<const char*>(address);
  return a >= memory_ && a < memory_ + page();
}

Context Stack::start(void (*entry)()) {
  char* bottom = memory_ + page();
  WHEN_SANITIZED(__asan_unpoison_memory_region(bottom, SIZE));
  Context context;
  context.bottom = bottom;
  context.size = SIZE;
#if defined(__x86_64__)
  // What the switch pops: six registers and the address to return to. A function starts with rsp = 8 mod 16.
  auto* top = reinterpret_cast<std::uintptr_t*>(bottom + SIZE - 56);
  top[0] = 0;  // where entry would return to
  top -= 1;
  top[0] = reinterpret_cast<std::uintptr_t>(entry);
  for (int i = 1; i <= 6; i++) top[-i] = 0;
  context.stack_pointer = top - 6;
#else
  static_assert(sizeof(ucontext_t) < 4096);
  auto* fresh = reinterpret_cast<ucontext_t*>(bottom + SIZE - 4096);
  getcontext(fresh);
  fresh->uc_stack.ss_sp = bottom;
  fresh->uc_stack.ss_size = SIZE - 4096;
  fresh->uc_link = nullptr;
  makecontext(fresh, entry, 0);
  context.stack_pointer = fresh;
#endif
  return context;
}

}  // namespace omnimamba::host_gpu
