// The products of a warpgroup, as its four warps each issue them: nothing says that one warp waits for another. A warp has 16
// of their 64 rows. They read shared memory, as bulk copies see it, at a random time between their issue and that warp's
// wait, and its accumulators are NaN until then.
#include "../common/hopper.cuh"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace omnimamba::host_gpu {

constexpr int ROWS = 16, DEPTH = 16;  // of a warp's part

// A warp's accumulators (16 x n) of products that have not been waited for.
struct Tile {
  std::vector<float*> registers;  // of the 32 lanes
  std::vector<float> values;
  int n = 0, pending = 0;
};

struct Issued {
  Product product;
  std::shared_ptr<Tile> tile;
  std::vector<float> a;  // (16 x 16), where it came in registers
  const Shared* shared;
  int row;  // the first of the warp's
  bool done = false;
};

namespace {

// Stops with an error where the registers of A are not what an earlier product since the last wgmma_fence() read there.
void check_held(Warp& warp, const uint32_t* registers, const std::vector<float>& a) {
  const auto known =
      std::find_if(warp.held.begin(), warp.held.end(), [=](const Held& h) { return h.registers == registers; });
  if (known == warp.held.end())
    warp.held.push_back({registers, a});
  else if (std::memcmp(known->values.data(), a.data(), a.size() * sizeof(float)) != 0)  // NaN is what it was
    fail("wgmma: no wgmma_fence() since the registers of A were written");
}

template <class Argument, class Compute>
void together_in_warp(const char* name, Argument& mine, Compute compute) {
  const Thread& t = self();
  if (t.block->threads.size() < 128 * static_cast<std::size_t>(t.linear / 128 + 1))
    fail(std::string(name) + ": a warpgroup is 128 threads");
  together(name, 0xffffffffu, mine, compute);
}

// Stops with an error where this is not what the other warps of the warpgroup issue at this place.
void check_order(const Product& p) {
  Thread& t = self();
  Block& block = *t.block;
  const auto g = static_cast<std::size_t>(t.linear / 128);
  WarpGroup& group = block.groups[g];
  const int flags = (p.a ? 8 : 0) + (p.add ? 4 : 0) + (p.a_mn ? 2 : 0) + (p.b_mn ? 1 : 0);
  const WarpGroup::Order mine{p.descriptor_a, p.descriptor_b, p.n, flags};
  const uint64_t place = t.warp->products++ - group.before;
  if (place == group.orders.size())
    group.orders.push_back(mine);
  else if (!(group.orders[place] == mine))
    fail("wgmma: the warps of the warpgroup give different arguments");
  uint64_t least = t.warp->products;
  for (std::size_t w = 4 * g; w < 4 * g + 4; w++) least = std::min(least, block.warps[w].products);
  group.orders.erase(group.orders.begin(), group.orders.begin() + static_cast<std::ptrdiff_t>(least - group.before));
  group.before = least;
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

// put(mn, k, value) for `count` rows or columns from `first` on of a described matrix: eight neighbours lie in 16 bytes.
template <class Put>
void read(const Issued& op, uint64_t descriptor, bool mn_major, int first, int count, Put&& put) {
  constexpr int PIECE = 8;
  for (int mn = 0; mn < count; mn += mn_major ? PIECE : 1)
    for (int k = 0; k < DEPTH; k += mn_major ? 1 : PIECE) {
      const uint32_t at = place_of(descriptor, mn_major, first + mn, k);
      if (at + 16 > Shared::CAPACITY || !op.shared->contains(op.shared->at(at), 16))
        fail("wgmma: a descriptor leads out of shared memory");
      uint16_t bits[PIECE];
      std::memcpy(bits, op.shared->async_at(at), sizeof bits);
      for (int i = 0; i < PIECE; i++)
        put(static_cast<std::size_t>(mn_major ? mn + i : mn), static_cast<std::size_t>(mn_major ? k : k + i),
            op.product.widen(bits[i]));
    }
}

void perform(Issued& op) {
  if (op.done) return;
  op.done = true;
  const Product& p = op.product;
  const auto n = static_cast<std::size_t>(p.n);
  std::vector<float> a = op.a, b(DEPTH * n);
  if (a.empty()) {
    a.resize(ROWS * DEPTH);
    read(op, p.descriptor_a, p.a_mn, op.row, ROWS,
         [&](std::size_t m, std::size_t k, float v) { a[m * DEPTH + k] = v; });
  }
  read(op, p.descriptor_b, p.b_mn, 0, p.n, [&](std::size_t j, std::size_t k, float v) { b[k * n + j] = v; });
  for (std::size_t m = 0; m < ROWS; m++) {
    float* d = &op.tile->values[m * n];
    if (!p.add) std::fill(d, d + n, 0.0f);
    for (std::size_t k = 0; k < DEPTH; k++) {
      const float factor = a[m * DEPTH + k];
      const float* row = &b[k * n];
      for (std::size_t j = 0; j < n; j++) d[j] += factor * row[j];
    }
  }
}

// What the warp has issued and the hardware has not done, in order.
std::vector<Issued*> left_of(const Warp& warp) {
  std::vector<Issued*> left;
  for (const auto& committed : warp.groups)
    for (const auto& op : committed)
      if (!op->done) left.push_back(op.get());
  return left;
}

// The hardware does some of a warp's products, and the others later.
void work_off(Warp& warp) {
  const std::vector<Issued*> left = left_of(warp);
  const std::size_t some = left.empty() ? 0 : 1 + random_below(static_cast<uint32_t>(left.size()));
  for (std::size_t i = 0; i < some; i++) perform(*left[i]);
  warp.working = some < left.size();
  if (warp.working) later([&warp] { work_off(warp); }, true);
}

// body(lane, register, element of the 16 x n tile)
template <class Body>
void each_accumulator(int n, Body&& body) {
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < n / 2; i++)
      body(static_cast<std::size_t>(lane), i, static_cast<std::size_t>(wgmma_row(lane, i) * n + wgmma_column(lane, i)));
}

std::shared_ptr<Tile> tile_for(Warp& warp, Product** all) {
  for (auto& tile : warp.tiles)
    if (tile->registers[0] == all[0]->d) return tile;
  if (!warp.fenced) fail("wgmma: no wgmma_fence() since these accumulators could be read and written");
  auto tile = std::make_shared<Tile>();
  tile->n = all[0]->n;
  tile->values.resize(ROWS * static_cast<std::size_t>(tile->n));
  for (int lane = 0; lane < 32; lane++) tile->registers.push_back(all[lane]->d);
  each_accumulator(tile->n, [&](std::size_t lane, int i, std::size_t element) {
    float& d = tile->registers[lane][i];
    tile->values[element] = d;
    d = std::numeric_limits<float>::quiet_NaN();
  });
  warp.tiles.push_back(tile);
  return tile;
}

}  // namespace

void wgmma(const Product& mine) {
  Product argument = mine;
  watch_shared();
  together_in_warp("wgmma", argument, [](Product** all) {
    const Thread& t = self();
    Warp& warp = *t.warp;
    const Product& first = *all[0];
    for (int lane = 1; lane < 32; lane++) {
      const Product& p = *all[lane];
      if (p.n != first.n || p.add != first.add || p.descriptor_a != first.descriptor_a ||
          p.descriptor_b != first.descriptor_b)
        fail("wgmma: the threads of the warp give different arguments");
    }
    check_order(first);
    auto op = std::make_shared<Issued>();
    op->product = first;
    op->shared = &t.block->shared;
    op->row = t.linear / 32 % 4 * ROWS;
    op->tile = tile_for(warp, all);
    if (op->tile->n != first.n) fail("wgmma: accumulators of another shape are still in flight");
    op->tile->pending++;
    if (first.a) {
      op->a.resize(ROWS * DEPTH);
      for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 8; i++) {
          const Place at = fragment::a16(lane, i);
          op->a[static_cast<std::size_t>(at.row * DEPTH + at.column)] = all[lane]->a[i];
        }
      check_held(warp, first.registers, op->a);
    }
    warp.groups.back().push_back(op);
    if (!warp.working) later([&warp] { work_off(warp); }, true);
    warp.working = true;
  });
}

void wgmma_fence() {
  int nothing = 0;
  together_in_warp("wgmma_fence", nothing, [](int**) {
    self().warp->fenced = true;
    self().warp->held.clear();
  });
}

void wgmma_commit() {
  int nothing = 0;
  together_in_warp("wgmma_commit", nothing, [](int**) { self().warp->groups.emplace_back(); });
}

void wgmma_wait(int latest) {
  maybe_yield();
  int nothing = 0;
  Warp& warp = *self().warp;
  together_in_warp("wgmma_wait", nothing, [](int**) {});
  // The products are done in their own time, and all lanes see the same ones done.
  wait_until("wgmma groups but the latest", latest, [&warp, latest] {
    for (std::size_t g = 0; static_cast<int>(g) < static_cast<int>(warp.groups.size()) - 1 - latest; g++)
      for (auto& op : warp.groups[g])
        if (!op->done) return false;
    return true;
  });
  together_in_warp("wgmma_wait", nothing, [&warp, latest](int**) {
    warp.fenced = false;
    while (static_cast<int>(warp.groups.size()) - 1 > latest) {
      for (auto& op : warp.groups.front()) op->tile->pending--;
      warp.groups.erase(warp.groups.begin());
    }
    auto finished = [](const std::shared_ptr<Tile>& tile) {
      if (tile->pending) return false;
      each_accumulator(tile->n, [&](std::size_t lane, int i, std::size_t element) {
        tile->registers[lane][i] = tile->values[element];
      });
      return true;
    };
    warp.tiles.erase(std::remove_if(warp.tiles.begin(), warp.tiles.end(), finished), warp.tiles.end());
  });
}

}  // namespace omnimamba::host_gpu
