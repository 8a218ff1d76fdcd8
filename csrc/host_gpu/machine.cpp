#include "machine.h"

#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <numeric>
#include <stdexcept>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace omnimamba::host_gpu {

Shared* watched = nullptr;

namespace {

std::string text(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

// What one launch needs while it runs.
struct Run {
  const Launch* launch;
  const std::function<void()>* body;
  Context scheduler;
  Thread* current = nullptr;
  std::string error;
  struct Action {
    Thread* asked_by;
    std::function<void()> act;
  };
  std::vector<Action> actions;                      // of the hardware, still to be done
  std::vector<Action> last_actions;                 // when nothing else can be
  std::vector<std::function<void()>> written_last;  // bulk stores that nobody waited for to the end
  Stack actor;                                      // they run on a fiber of their own
  std::function<void()>* acting = nullptr;
  uint64_t random;
  const Thread* slow = nullptr;  // one lane that lies behind its warp, for so many rounds
  unsigned slow_rounds = 0;
  enum { NOBODY, ONE, ALL_BUT_ONE } lagging;  // which warps of a cluster go on only when no other can
};

Run* run = nullptr;
std::string latest;   // the last kernel that was started
std::string started;  // all since they were asked for, a line each

uint64_t next_random() {  // xorshift64*
  uint64_t& s = run->random;
  s ^= s >> 12, s ^= s << 25, s ^= s >> 27;
  return s * 0x2545f4914f6cdd1d;
}

// Where a thread stands, for messages.
std::string place(const Thread& t) {
  return std::string(run->launch->kernel) + ", block " + text(t.block->index) + ", thread " + text(t.index);
}

[[noreturn]] void stop_with(const std::string& message) {
  run->error = message;
  Context given_up;
  switch_context(given_up, run->scheduler, true);
  __builtin_unreachable();
}

// Stops with an error where a thread ends while bulk stores still read its block's shared memory; what they read is written
// after all threads have ended.
void end_stores(Thread& t) {
  for (const auto& group : t.store_groups)
    if (!group.empty()) fail("ended before its bulk stores had read shared memory");
  for (const auto& group : t.read_groups)
    for (const Thread::Store& store : group) run->written_last.push_back(store.write);
}

// And where products run on, or a warp has left one out.
void end_products(Thread& t) {
  if (!t.warp->tiles.empty()) fail("ended before its products were complete");
  WarpGroup& group = t.block->groups[static_cast<std::size_t>(t.linear / 128)];
  if (++group.ended == 128 && !group.orders.empty()) fail("a warp of its warpgroup has left out a product");
}

void first_step() {
  entered(run->scheduler);
  (*run->body)();
  end_stores(*run->current);
  end_products(*run->current);
  run->current->done = true;
  switch_context(run->current->context, run->scheduler, true);
}

void resume(Thread& t) {
  run->current = &t;
  threadIdx = t.index;
  blockIdx = t.block->index;
  watched = t.block->shared.watched() ? &t.block->shared : nullptr;
  switch_context(run->scheduler, t.context);
  watched = nullptr;
  run->current = nullptr;
  if (!run->error.empty()) throw std::runtime_error(run->error);
}

void act() {
  entered(run->scheduler);
  (*run->acting)();
  Context ended;
  switch_context(ended, run->scheduler, true);
}

void one_action() {
  std::vector<Run::Action>& from = run->actions.empty() ? run->last_actions : run->actions;
  const std::size_t i = next_random() % from.size();
  Run::Action action = std::move(from[i]);
  from.erase(from.begin() + static_cast<std::ptrdiff_t>(i));
  run->acting = &action.act;
  run->current = action.asked_by;
  Context actor = run->actor.start(act);
  switch_context(run->scheduler, actor);
  run->current = nullptr;
  if (!run->error.empty()) throw std::runtime_error(run->error);
}

std::string deadlock(const std::vector<Thread*>& threads) {
  std::string message = std::string(run->launch->kernel) + ": deadlock:";
  int told = 0;
  const Thread* before = nullptr;
  for (const Thread* t : threads) {
    if (t->done) continue;
    const bool same = before && before->block == t->block && before->waits_for == t->waits_for &&
                      before->detail == t->detail && before->warp == t->warp;
    before = t;
    if (same) continue;
    if (told++ == 8) return message + " ...";
    message += (told > 1 ? "; block " : " block ") + text(t->block->index) + ", thread " + text(t->index) +
               " and its warp wait for " + t->waits_for + " " + std::to_string(t->detail);
  }
  const bool some_ended = std::any_of(threads.begin(), threads.end(), [](Thread* t) { return t->done; });
  return message + (some_ended ? "; other threads have ended" : "");
}

// Runs the threads of some blocks to their end.
void run_threads(const std::vector<Thread*>& threads) {
  std::vector<Thread*> order = threads;
  std::size_t alive = threads.size();
  const uint64_t laziness = uint64_t{4} << next_random() % 8;  // how seldom the hardware's own work is done
  while (alive) {
    for (std::size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[next_random() % i]);
    bool ran = false, paused = false;
    auto go_on = [&](bool lagging) {
      for (Thread* t : order) {
        if (t->done || t->warp->lags != lagging) continue;
        if (t->warp->pause || (t == run->slow && run->slow_rounds)) {
          paused = true;
          continue;
        }
        if (t->ready && !t->ready(t->ready_argument)) continue;
        t->ready = nullptr;
        ran = true;
        resume(*t);
        alive -= t->done;
        if (!run->actions.empty() && next_random() % laziness == 0) one_action();
      }
    };
    go_on(false);
    if (!ran && !paused && (run->actions.empty() || next_random() % 16 == 0)) go_on(true);
    const bool waiting = !run->actions.empty() || (!run->last_actions.empty() && !paused);
    if (!ran && waiting && (!paused || next_random() % 4)) {
      one_action();
      continue;
    }
    if (!ran && !paused) throw std::runtime_error(deadlock(threads));
    if (run->slow_rounds) run->slow_rounds--;
    if (!ran) run->slow_rounds = 0;
    if (ran && !run->slow_rounds && next_random() % 8 == 0) {
      run->slow = order[next_random() % order.size()];
      run->slow_rounds = static_cast<unsigned>(next_random() % 32);
    }
    for (Thread* t : threads) {
      if (t->linear % 32) continue;
      unsigned& pause = t->warp->pause;
      pause = !ran ? 0 : pause ? pause - 1 : next_random() % 32 == 0 ? static_cast<unsigned>(next_random() % 32) : 0;
    }
  }
  run->slow = nullptr;
  while (!run->actions.empty() || !run->last_actions.empty()) one_action();
  for (const auto& write : run->written_last) write();
  run->written_last.clear();
}

// ---- accesses that the processor refuses ----

struct sigaction previous;

void on_fault(int number, siginfo_t* info, void*) {
  if (!run || !run->current) {
    sigaction(number, &previous, nullptr);  // not a kernel's: happens again, for whoever handled it before
    return;
  }
  char address[32];
  snprintf(address, sizeof address, "%p", info->si_addr);
  const char* what =
      static_cast<char*>(info->si_addr) >= static_cast<const char*>(run->current->context.bottom) - 65536 &&
              info->si_addr < run->current->context.bottom
          ? "stack overflow"
          : "illegal memory access";
  stop_with(place(*run->current) + ": " + what + " at " + address);
}

// Handles faults while it lives, on a stack of its own.
struct FaultHandler {
  std::vector<char> memory = std::vector<char>(64 << 10);
  stack_t before{};
  FaultHandler() {
    stack_t stack{};
    stack.ss_sp = memory.data();
    stack.ss_size = memory.size();
    sigaltstack(&stack, &before);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &previous, nullptr);
    sigaltstack(&before, nullptr);
  }
};

std::vector<Stack>& stacks() {
  static auto* pool = new std::vector<Stack>;  // kept as long as the process
  return *pool;
}

// Blocks that are on the machine at once.
struct Resident {
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Thread>> owned;
  std::vector<Thread*> threads;

  void add(const Launch& launch, uint64_t number) {
    clusters.push_back(std::make_unique<Cluster>());
    const unsigned per_row = launch.grid.x / launch.cluster;
    for (unsigned rank = 0; rank < launch.cluster; rank++) {
      blocks.push_back(std::make_unique<Block>());
      Block& block = *blocks.back();
      block.index = dim3(static_cast<unsigned>(number % per_row) * launch.cluster + rank,
                         static_cast<unsigned>(number / per_row % launch.grid.y),
                         static_cast<unsigned>(number / per_row / launch.grid.y));
      block.rank = rank;
      block.cluster = clusters.back().get();
      block.cluster->blocks.push_back(&block);
      block.dynamic = launch.shared;
      fill(block, launch.block);
    }
    if (run->lagging != Run::NOBODY) choose_who_lags(*clusters.back());
  }

  static void choose_who_lags(const Cluster& cluster) {
    std::vector<Warp*> warps;
    for (Block* block : cluster.blocks)
      for (Warp& warp : block->warps) warps.push_back(&warp);
    for (Warp* warp : warps) warp->lags = run->lagging == Run::ALL_BUT_ONE;
    bool& chosen = warps[next_random() % warps.size()]->lags;
    chosen = !chosen;
  }

  void fill(Block& block, const dim3& size) {
    const unsigned count = size.x * size.y * size.z;
    block.warps.resize((count + 31) / 32);
    block.groups.resize((count + 127) / 128);
    for (Warp& warp : block.warps) warp.pause = next_random() % 2 ? static_cast<unsigned>(next_random() % 32) : 0;
    for (unsigned i = 0; i < count; i++) {
      owned.push_back(std::make_unique<Thread>());
      Thread& t = *owned.back();
      t.index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
      t.linear = static_cast<int>(i);
      t.block = &block;
      t.warp = &block.warps[i / 32];
      block.threads.push_back(&t);
      threads.push_back(&t);
      if (stacks().size() < threads.size()) stacks().emplace_back();
      t.context = stacks()[threads.size() - 1].start(first_step);
    }
  }
};

void check_launch(const Launch& launch) {
  const uint64_t count = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const std::string name = launch.kernel;
  if (count == 0 || count > 1024 || launch.block.z > 64)
    throw std::runtime_error(name + ": a block of " + text(launch.block) + " threads; at most 1024 fit");
  if (count % 32) throw std::runtime_error(name + ": a block of " + text(launch.block) + " threads is no whole warps");
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0 || launch.grid.x > 0x7fffffff ||
      launch.grid.y > 65535 || launch.grid.z > 65535)
    throw std::runtime_error(name + ": a grid of " + text(launch.grid) + " blocks is outside the limits");
  if (launch.cluster == 0 || launch.grid.x % launch.cluster || launch.cluster > 8)
    throw std::runtime_error(name + ": clusters of " + std::to_string(launch.cluster) + " do not fit the grid");
  if (launch.shared > most_shared())
    throw std::runtime_error(name + ": " + std::to_string(launch.shared) +
                             " bytes of shared memory, of which this chip has " + std::to_string(most_shared()));
}

}  // namespace

void run_grid(const Launch& launch, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  check_launch(launch);
  latest = launch.kernel;
  started += latest + "\n";
  Run mine{};
  mine.launch = &launch;
  mine.body = &body;
  mine.random = settings().seed * 0x9e3779b97f4a7c15 + 0x1234567;
  run = &mine;
  mine.lagging = settings().seed % 4 == 1 ? Run::ONE : settings().seed % 4 == 2 ? Run::ALL_BUT_ONE : Run::NOBODY;
  struct Forget {
    ~Forget() { run = nullptr; }
  } forget;
  FaultHandler handler;
  blockDim = launch.block;
  gridDim = launch.grid;
  std::vector<uint64_t> order(uint64_t{launch.grid.x / launch.cluster} * launch.grid.y * launch.grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  for (std::size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[next_random() % i]);
  for (std::size_t next = 0; next < order.size();) {
    Resident resident;
    const std::size_t end = std::min(order.size(), next + 1 + next_random() % 3);
    while (next < end) resident.add(launch, order[next++]);
    run_threads(resident.threads);
    for (const auto& block : resident.blocks)
      if (const char* what = block->shared.damaged())
        throw std::runtime_error(std::string(launch.kernel) + ", block " + text(block->index) + ": " + what);
  }
}

Thread& self() { return *run->current; }

void fail(const std::string& what) { stop_with(place(*run->current) + ": " + what); }

uint32_t random_below(uint32_t count) { return static_cast<uint32_t>(next_random() % count); }

void suspend(const char* waits_for, int64_t detail, bool (*ready)(void*), void* argument) {
  Thread& t = self();
  t.waits_for = waits_for;
  t.detail = detail;
  t.ready = ready;
  t.ready_argument = argument;
  switch_context(t.context, run->scheduler);
}

void maybe_yield() {
  if (random_below(2)) suspend("its turn", 0, nullptr, nullptr);
}

void later(std::function<void()> action, bool product) {
  const bool last = product && settings().seed / 3 % 2 == 1;
  (last ? run->last_actions : run->actions).push_back({run->current, std::move(action)});
}

void check_aligned(const void* p, std::size_t alignment, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignment)
    fail(std::string(what) + ": the address is no multiple of " + std::to_string(alignment) + " bytes");
}

void check_shared(const void* p, std::size_t bytes, const char* what) {
  if (!self().block->shared.contains(p, bytes)) fail(std::string(what) + ": the address is not in shared memory");
}

}  // namespace omnimamba::host_gpu

// For the tests, through ctypes: the name of the last kernel that was started.
extern "C" __attribute__((visibility("default"), used)) const char* omnimamba_emulator_latest() {
  return omnimamba::host_gpu::latest.c_str();
}

// Of all that were started since this was last called, a line each.
extern "C" __attribute__((visibility("default"), used)) const char* omnimamba_emulator_started() {
  static std::string found;
  found.swap(omnimamba::host_gpu::started);
  omnimamba::host_gpu::started.clear();
  return found.c_str();
}
