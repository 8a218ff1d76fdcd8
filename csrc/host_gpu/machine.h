// Runs a grid of CUDA threads on one CPU thread, each thread a fiber, in an order shuffled by a seed.
//
// A thread runs until it must wait, for a barrier, for the lanes of its warp, for a copy; then another one goes on. Now
// and then a warp or a lane pauses; with half of the seeds one warp of a cluster, or all but one, go on only when nobody else can.
// What the hardware does beside the threads (bulk loads, wgmma) is done late, at a random time; bulk stores read shared
// memory and write to global memory when they are issued, or no sooner than somebody waits for it. Both see of shared memory
// what was written by them, or by store_pack, store_matrices and copy_async before an async_fence(). Blocks run in random
// order, a few at once. The first error ends the launch and names kernel, block and thread.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace omnimamba::host_gpu {

struct Settings {
  // By its rest modulo 4 one warp of a cluster lags (1), all but one (2), none (3, 0); by that of its third modulo 2 wgmma
  // reads memory at any time (0), or when nothing else can go on (1).
  uint64_t seed = 1;
  bool early_copies = false;  // cp.async and bulk stores land when they are issued, not when they are waited for
  int capability = 80;        // of the chip that the host's code sees: 90 for 9.0
};
Settings& settings();
// Bytes of shared memory that a block of that chip may ask for.
std::size_t most_shared();

struct Block;
struct Warp;

// Bytes of a block's shared memory.
struct Piece {
  uint32_t offset, bytes;
};

// One operation that several lanes do together: the last of them does it for all.
struct Together {
  const char* name;
  uint32_t mask, arrived;
  void* arguments[32];
};

struct Thread {
  dim3 index;
  int linear = 0;  // in its block
  Block* block = nullptr;
  Warp* warp = nullptr;
  Context context;
  bool done = false;
  bool (*ready)(void*) = nullptr;  // null: it can go on at once
  void* ready_argument = nullptr;
  const char* waits_for = nullptr;
  int64_t detail = 0;
  struct Copy {
    void* to;
    const void* from;
    int bytes, live;
  };
  std::vector<std::vector<Copy>> copy_groups;  // cp.async: committed groups, then the open one
  struct Store {
    std::function<void()> read, write;  // of shared memory, to global memory
  };
  std::vector<std::vector<Store>> store_groups;  // bulk stores not read yet: committed groups, then the open one
  std::vector<std::vector<Store>> read_groups;   // read, and not written yet
  std::vector<Piece> written;                    // of shared memory, since its last async_fence()
  std::vector<void*> unpublished;                // barriers that it set up since its last mbarrier_publish()
};

struct Tile;
struct Issued;

// Registers of A of the first lane, and what was in those of all lanes (16 x 16).
struct Held {
  const uint32_t* registers;
  std::vector<float> values;
};

struct Warp {
  std::vector<Together> open;
  unsigned pause = 0;  // rounds it misses
  bool lags = false;   // goes on only when no other warp can
  // Its quarter of the products of its warpgroup, which wait for no other warp.
  std::vector<std::vector<std::shared_ptr<Issued>>> groups{1};  // committed ones, then the open one
  std::vector<std::shared_ptr<Tile>> tiles;
  std::vector<Held> held;  // registers that its products have read since its last wgmma_fence()
  uint64_t products = 0;   // that it issued
  bool fenced = false;     // since it last waited for any
  bool working = false;    // some are left for the hardware to do
};

// Four warps issue the same products, each in its own time.
struct WarpGroup {
  struct Order {
    uint64_t a, b;
    int n, flags;
    bool operator==(const Order& o) const { return a == o.a && b == o.b && n == o.n && flags == o.flags; }
  };
  std::vector<Order> orders;  // of products that not all of its warps have issued yet
  uint64_t before = 0;        // issued by all
  int ended = 0;              // threads
};

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t phase = 0;
};

// A block's shared memory. Every declaration has a gap before and after it, which nothing may overwrite. From the first bulk
// copy, mbarrier or product of the block on it exists twice: as threads see it, and as bulk copies and wgmma do, who learn of
// what a thread wrote when that thread calls async_fence().
class Shared {
 public:
  static constexpr std::size_t CAPACITY = 256 << 10, GAP = 64;
  Shared();
  ~Shared();
  void* array(const void* key, std::size_t bytes, std::size_t alignment);
  bool contains(const void* p, std::size_t bytes) const;
  uint32_t offset(const void* p) const { return static_cast<uint32_t>(static_cast<const char*>(p) - memory_); }
  char* at(uint32_t offset) const { return memory_ + offset; }
  char* async_at(uint32_t offset) const { return async_ + offset; }
  void watch();
  bool watched() const { return async_ != nullptr; }
  void publish(const Piece& piece) const;
  const char* damaged() const;  // the name of what was overwritten, or null

 private:
  struct Array {
    const void* key;
    std::size_t begin, bytes;
  };
  void gap(std::size_t begin, std::size_t end);
  char *memory_, *async_ = nullptr;
  std::size_t used_ = 0, total_ = 0;
  std::vector<Array> arrays_;
};

struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
};

struct Block {
  dim3 index;
  unsigned rank = 0;  // in its cluster
  Cluster* cluster = nullptr;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  std::vector<WarpGroup> groups;
  Barrier barriers[16];
  Shared shared;
  std::size_t dynamic = 0;  // bytes
};

struct Launch {
  const char* kernel;
  dim3 grid, block;
  unsigned cluster = 1;  // blocks along x
  std::size_t shared = 0;
};

// Runs body() once for every thread. Throws std::runtime_error for what the threads did wrong.
void run_grid(const Launch& launch, const std::function<void()>& body);

// ---- for the thread that is running ----

Thread& self();
[[noreturn]] void fail(const std::string& what);
uint32_t random_below(uint32_t count);
// Lets the others go on until ready() holds.
void suspend(const char* waits_for, int64_t detail, bool (*ready)(void*), void* argument);
// Lets the others go on, now and then.
void maybe_yield();
// Something the hardware does on its own, at a random later time; its errors name the thread that asked for it.
void later(std::function<void()> action, bool product = false);

template <class Ready>
void wait_until(const char* waits_for, int64_t detail, Ready ready) {
  if (ready()) return;
  suspend(waits_for, detail, [](void* f) { return (*static_cast<Ready*>(f))(); }, &ready);
}

// The shared memory of the running thread's block, where it is watched.
extern Shared* watched;
// Keeps the running thread's shared memory twice from now on.
void watch_shared();
// The running thread has written there, which may be anywhere.
void note_write(const void* p, std::size_t bytes);
inline void wrote(const void* p, std::size_t bytes) {
  if (watched) note_write(p, bytes);
}
// What the running thread wrote is there for bulk copies and wgmma.
void async_fence();

// Where a kernel waits or fences. Tests leave out one such place after another, and look what comes of it.
struct Site {
  const char *name, *file;
  int line;
  bool left_out() const;
};
extern bool sites_matter;  // they are noted, or one is left out
#define OM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline bool left_out(const char* name, const char* file, int line) {
  return sites_matter && Site{name, file, line}.left_out();
}
// Stops with an error where a thread of the block wrote there without a fence since.
void check_fenced(const Block& block, uint32_t offset, std::size_t bytes, const char* what);

// Stops with an error unless p is a multiple of `alignment`.
void check_aligned(const void* p, std::size_t alignment, const char* what);
// Stops with an error unless p .. p + bytes lies in this block's shared memory.
void check_shared(const void* p, std::size_t bytes, const char* what);

}  // namespace omnimamba::host_gpu

// CUDA's own names for where a thread stands.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
