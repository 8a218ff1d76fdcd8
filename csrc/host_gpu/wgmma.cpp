// The products of a warpgroup: they read shared memory at a random time between their issue and the wait, and their
// accumulators are NaN until then.
#include "../common/hopper.cuh"

#include <algorithm>
#include <cmath>
#include <limits>

namespace omnimamba::host_gpu {

// Accumulators (64 x n) of products that have not been waited for.
struct Tile {
  std::vector<float*> registers;  // of the 128 threads
  std::vector<float> values;
  int n = 0, pending = 0;
};

struct Issued {
  Product product;
  std::shared_ptr<Tile> tile;
  std::vector<float> a;  // (64 x 16), where it came in registers
  const Shared* shared;
  bool done = false;
};

namespace {

// compute(arguments) once for the 128 threads of this thread's warpgroup.
template <class Argument, class Compute>
void together_in_group(const char* name, Argument& mine, Compute compute) {
  Thread& t = self();
  Block& block = *t.block;
  const auto g = static_cast<std::size_t>(t.linear / 128);
  if (block.threads.size() < 128 * (g + 1)) fail(std::string(name) + ": a warpgroup is 128 threads");
  struct Posted {
    Argument* argument;
    bool done = false;
  } posted{&mine};
  WarpGroup::Arrived& arrived = block.groups[g].arrived;
  if (arrived.count == 0) {
    arrived.name = name;
    arrived.arguments.assign(128, nullptr);
  }
  if (std::strcmp(arrived.name, name) != 0)
    fail(std::string("divergence: ") + name + " while other threads of the warpgroup are at " + arrived.name);
  arrived.arguments[static_cast<std::size_t>(t.linear % 128)] = &posted;
  if (++arrived.count < 128) return wait_until(name, static_cast<int64_t>(g), [&] { return posted.done; });
  arrived.count = 0;
  std::vector<Argument*> arguments;
  for (void* p : arrived.arguments) arguments.push_back(static_cast<Posted*>(p)->argument);
  std::vector<void*> all = arrived.arguments;
  compute(arguments);
  for (void* p : all) static_cast<Posted*>(p)->done = true;
}

// Where element (mn, k) of a described matrix lies.
uint32_t place_of(uint64_t descriptor, bool mn_major, int mn, int k) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const auto s = Swizzle{static_cast<int>(descriptor >> 62)};
  const auto width = static_cast<uint32_t>(swizzle_width(s));
  const auto row = static_cast<uint32_t>(mn_major ? k : mn), column = static_cast<uint32_t>(mn_major ? mn : k);
  const uint32_t row_step = mn_major && s == Swizzle::NONE ? leading : stride;
  const uint32_t column_step = mn_major && s == Swizzle::NONE ? stride : leading;
  const uint32_t across = width / 2;  // elements in a row of the pattern
  uint32_t at = start + row / 8 * row_step + row % 8 * width + column % across * 2;
  at += column / across * column_step;
  return swizzled(at, s);
}

float read(const Issued& op, uint64_t descriptor, bool mn_major, int mn, int k) {
  const uint32_t at = place_of(descriptor, mn_major, mn, k);
  const char* p = op.shared->at(at);
  if (at + 2 > Shared::CAPACITY || !op.shared->contains(p, 2)) fail("wgmma: a descriptor leads out of shared memory");
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return op.product.widen(bits);
}

void perform(Issued& op) {
  if (op.done) return;
  op.done = true;
  const Product& p = op.product;
  const auto n = static_cast<std::size_t>(p.n);
  std::vector<float> a = op.a, b(16 * n);
  if (a.empty())
    for (int m = 0; m < 64; m++)
      for (int k = 0; k < 16; k++) a.push_back(read(op, p.descriptor_a, p.a_mn, m, k));
  for (int k = 0; k < 16; k++)
    for (int j = 0; j < p.n; j++)
      b[static_cast<std::size_t>(k) * n + static_cast<std::size_t>(j)] = read(op, p.descriptor_b, p.b_mn, j, k);
  for (std::size_t m = 0; m < 64; m++)
    for (std::size_t j = 0; j < n; j++) {
      float& d = op.tile->values[m * n + j];
      if (!p.add) d = 0.0f;
      for (std::size_t k = 0; k < 16; k++) d += a[m * 16 + k] * b[k * n + j];
    }
}

WarpGroup& group_of(Thread& t) { return t.block->groups[static_cast<std::size_t>(t.linear / 128)]; }

// All products of the group issued up to this one, in their order.
void perform_up_to(WarpGroup& group, const Issued* last) {
  for (auto& committed : group.groups)
    for (auto& op : committed) {
      perform(*op);
      if (op.get() == last) return;
    }
}

// body(thread, register, element of the 64 x n tile)
template <class Body>
void each_accumulator(int n, Body&& body) {
  for (int thread = 0; thread < 128; thread++)
    for (int i = 0; i < n / 2; i++)
      body(static_cast<std::size_t>(thread), i,
           static_cast<std::size_t>(wgmma_row(thread, i) * n + wgmma_column(thread, i)));
}

std::shared_ptr<Tile> tile_for(WarpGroup& group, const std::vector<Product*>& all) {
  for (auto& tile : group.tiles)
    if (tile->registers[0] == all[0]->d) return tile;
  auto tile = std::make_shared<Tile>();
  tile->n = all[0]->n;
  tile->values.resize(64 * static_cast<std::size_t>(tile->n));
  for (Product* p : all) tile->registers.push_back(p->d);
  each_accumulator(tile->n, [&](std::size_t thread, int i, std::size_t element) {
    float& d = tile->registers[thread][i];
    tile->values[element] = d;
    d = std::numeric_limits<float>::quiet_NaN();
  });
  group.tiles.push_back(tile);
  return tile;
}

}  // namespace

void wgmma(const Product& mine) {
  Product argument = mine;
  together_in_group("wgmma", argument, [](const std::vector<Product*>& all) {
    WarpGroup& group = group_of(self());
    auto op = std::make_shared<Issued>();
    op->product = *all[0];
    op->shared = &self().block->shared;
    for (const Product* p : all)
      if (p->n != all[0]->n || p->add != all[0]->add || p->descriptor_a != all[0]->descriptor_a ||
          p->descriptor_b != all[0]->descriptor_b)
        fail("wgmma: the threads of the warpgroup give different arguments");
    op->tile = tile_for(group, all);
    if (op->tile->n != all[0]->n) fail("wgmma: accumulators of another shape are still in flight");
    op->tile->pending++;
    if (all[0]->a) {
      op->a.resize(64 * 16);
      for (int thread = 0; thread < 128; thread++)
        for (int i = 0; i < 8; i++) {
          const Place at = fragment::a16(thread % 32, i);
          op->a[static_cast<std::size_t>((thread / 32 * 16 + at.row) * 16 + at.column)] =
              all[static_cast<std::size_t>(thread)]->a[i];
        }
    }
    group.groups.back().push_back(op);
    later([&group, op] { perform_up_to(group, op.get()); });
  });
}

void wgmma_fence() {
  int nothing = 0;
  together_in_group("wgmma_fence", nothing, [](const std::vector<int*>&) {});
}

void wgmma_commit() {
  int nothing = 0;
  together_in_group("wgmma_commit", nothing, [](const std::vector<int*>&) { group_of(self()).groups.emplace_back(); });
}

void wgmma_wait(int latest) {
  maybe_yield();
  int nothing = 0;
  WarpGroup& group = group_of(self());
  together_in_group("wgmma_wait", nothing, [](const std::vector<int*>&) {});
  // The products are done in their own time, and all see the same ones done.
  wait_until("wgmma groups but the latest", latest, [&group, latest] {
    for (std::size_t g = 0; static_cast<int>(g) < static_cast<int>(group.groups.size()) - 1 - latest; g++)
      for (auto& op : group.groups[g])
        if (!op->done) return false;
    return true;
  });
  together_in_group("wgmma_wait", nothing, [&group, latest](const std::vector<int*>&) {
    while (static_cast<int>(group.groups.size()) - 1 > latest) {
      for (auto& op : group.groups.front()) op->tile->pending--;
      group.groups.erase(group.groups.begin());
    }
    auto finished = [](const std::shared_ptr<Tile>& tile) {
      if (tile->pending) return false;
      each_accumulator(tile->n, [&](std::size_t thread, int i, std::size_t element) {
        tile->registers[thread][i] = tile->values[element];
      });
      return true;
    };
    group.tiles.erase(std::remove_if(group.tiles.begin(), group.tiles.end(), finished), group.tiles.end());
  });
}

}  // namespace omnimamba::host_gpu
