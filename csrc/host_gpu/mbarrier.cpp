// Barriers in shared memory, and the barrier of a cluster.
#include "../common/hopper.cuh"

namespace omnimamba::host_gpu {
namespace {

// An Mbarrier's 64 bits: a mark that it was set up, whether it was published, the phase, arrivals a phase, arrivals to come, bytes to come.
struct State {
  static constexpr uint64_t MARK = 0xb16;  // + 1: published
  uint64_t phase, expected, pending;
  int64_t bytes;
  bool published;

  explicit State(const Mbarrier* bar) {
    check_aligned(bar, 8, "mbarrier");
    if (bar->bits >> 53 != MARK >> 1) fail("mbarrier: used before mbarrier_init, or overwritten");
    published = bar->bits >> 52 & 1;
    phase = bar->bits >> 51 & 1;
    expected = bar->bits >> 36 & 0x7fff;
    pending = bar->bits >> 21 & 0x7fff;
    bytes = static_cast<int64_t>(bar->bits << 43) >> 43;
  }
  State(uint64_t count) : phase(0), expected(count), pending(count), bytes(0), published(false) {}

  void save(Mbarrier* bar) {
    if (pending == 0 && bytes == 0) {
      phase ^= 1;
      pending = expected;
    }
    bar->bits = (MARK | static_cast<uint64_t>(published)) << 52 | phase << 51 | expected << 36 | pending << 21 |
                (static_cast<uint64_t>(bytes) & 0x1fffff);
  }
};

}  // namespace

void mbarrier_init(Mbarrier* bar, int count) {
  check_shared(bar, sizeof *bar, "mbarrier_init");
  check_aligned(bar, 8, "mbarrier_init");
  if (count < 1 || count > 0x7fff) fail("mbarrier_init: a count of " + std::to_string(count));
  State(static_cast<uint64_t>(count)).save(bar);
  watch_shared();
  self().unpublished.push_back(bar);
}

void mbarrier_publish() {
  for (void* p : self().unpublished) {
    auto* bar = static_cast<Mbarrier*>(p);
    State s(bar);
    s.published = true;
    s.save(bar);
  }
  self().unpublished.clear();
}

void check_published(const Mbarrier* bar, const char* what) {
  if (!State(bar).published) fail(std::string(what) + ": its mbarrier was set up and not published");
}

void mbarrier_arrive(Mbarrier* bar, int bytes) {
  maybe_yield();
  State s(bar);
  if (s.pending == 0) fail("mbarrier_arrive: more arrivals than the phase expects");
  s.pending--;
  s.bytes += bytes;
  s.save(bar);
}

void mbarrier_complete(Mbarrier* bar, int bytes) {
  State s(bar);
  s.bytes -= bytes;
  if (s.bytes < -(1 << 20)) fail("mbarrier: more bytes arrived than were announced");
  s.save(bar);
}

void mbarrier_wait(Mbarrier* bar, int parity) {
  maybe_yield();
  wait_until("mbarrier phase of parity", parity, [&] { return State(bar).phase != static_cast<uint64_t>(parity & 1); });
}

Mbarrier* in_block(Mbarrier* bar, int rank) {
  Block& mine = *self().block;
  if (rank < 0 || rank >= static_cast<int>(mine.cluster->blocks.size()))
    fail("the cluster has no block " + std::to_string(rank));
  check_shared(bar, sizeof *bar, "mbarrier_arrive_at");
  const Block& other = *mine.cluster->blocks[static_cast<std::size_t>(rank)];
  check_alive(other, "mbarrier_arrive_at");
  auto* there = reinterpret_cast<Mbarrier*>(other.shared.at(mine.shared.offset(bar)));
  check_published(there, "mbarrier_arrive_at");
  return there;
}

void check_alive(const Block& block, const char* what) {
  for (const Thread* t : block.threads)
    if (!t->done) return;
  fail(std::string(what) + ": the block that it goes to has ended");
}

void cluster_sync() {
  Cluster& cluster = *self().block->cluster;
  Barrier& b = cluster.barrier;
  const uint64_t phase = b.phase;
  if (++b.arrived == static_cast<int>(cluster.blocks.size() * self().block->threads.size())) {
    b.arrived = 0;
    b.phase++;
  }
  wait_until("cluster_sync", 0, [&] { return b.phase != phase; });
}

}  // namespace omnimamba::host_gpu
