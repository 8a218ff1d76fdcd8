// Bulk loads: done by the machine at a random time after they were issued. Bulk stores: done by whoever waits for them, first
// their reading of shared memory and then, apart, their writing; what nobody waits for is written last of all.
#include <algorithm>
#include <array>

#include "../common/hopper.cuh"

namespace omnimamba {
namespace host_gpu {

void mbarrier_complete(Mbarrier* bar, int bytes);

namespace {

// What the emulator keeps in a TensorMap.
struct Map {
  static constexpr uint32_t MARK = 0x7e4504a9;
  char* data;
  uint64_t size[5], stride[4];
  uint16_t box[5];
  uint8_t rank, element, swizzle;
  uint32_t mark;
};
static_assert(sizeof(Map) <= sizeof(TensorMap));

Map decode(const TensorMap& map) {
  Map m;
  std::memcpy(&m, &map, sizeof m);
  if (m.mark != Map::MARK) fail("the tensor map was not made by tensor_map()");
  return m;
}

// body(offset in the box, global address or null outside the tensor) for every element of the box.
template <class Body>
void each_element(const Map& m, const int* at, Body&& body) {
  uint64_t index[5] = {}, count = 1;
  for (int d = 0; d < m.rank; d++) count *= m.box[d];
  for (uint64_t i = 0; i < count; i++) {
    char* address = m.data;
    bool inside = true;
    for (int d = 0; d < m.rank; d++) {
      const int64_t c = at[d] + static_cast<int64_t>(index[d]);
      inside = inside && c >= 0 && c < static_cast<int64_t>(m.size[d]);
      address += c * static_cast<int64_t>(d == 0 ? m.element : m.stride[d - 1]);
    }
    body(static_cast<uint32_t>(i) * m.element, inside ? address : nullptr);
    for (int d = 0; d < m.rank && ++index[d] == m.box[d]; d++) index[d] = 0;
  }
}

int bytes_of(const Map& m) {
  int bytes = m.element;
  for (int d = 0; d < m.rank; d++) bytes *= m.box[d];
  return bytes;
}

void check_box(const Map& m, int rank, const void* shared, const char* what) {
  if (rank != m.rank) fail(std::string(what) + ": the map has " + std::to_string(m.rank) + " dimensions");
  check_aligned(shared, m.swizzle ? 8 * static_cast<std::size_t>(swizzle_width(Swizzle{m.swizzle})) : 128, what);
  check_shared(shared, static_cast<std::size_t>(bytes_of(m)), what);
}

// Of bulk stores that are not committed yet.
std::vector<Thread::Store>& open_group(Thread& t) {
  if (t.store_groups.empty()) t.store_groups.emplace_back();
  return t.store_groups.back();
}

}  // namespace

void bulk_load(void* shared, const void* global, int bytes, Mbarrier* bar) {
  check_aligned(shared, 16, "bulk_load, shared");
  check_aligned(global, 16, "bulk_load, global");
  if (bytes <= 0 || bytes % 16) fail("bulk_load: " + std::to_string(bytes) + " bytes are no multiple of 16");
  check_shared(shared, static_cast<std::size_t>(bytes), "bulk_load");
  check_shared(bar, sizeof *bar, "bulk_load, mbarrier");
  later([=] {
    std::memcpy(shared, global, static_cast<std::size_t>(bytes));
    mbarrier_complete(bar, bytes);
  });
}

void tensor_load(uint16_t blocks, void* shared, const TensorMap& map, Mbarrier* bar, int rank, const int* at) {
  const Map m = decode(map);
  check_box(m, rank, shared, "tensor_load");
  check_shared(bar, sizeof *bar, "tensor_load, mbarrier");
  Block& mine = *self().block;
  const uint32_t to = mine.shared.offset(shared), barrier = mine.shared.offset(bar);
  int start[5] = {};
  std::copy(at, at + rank, start);
  for (std::size_t r = 0; r < mine.cluster->blocks.size(); r++) {
    if (!(blocks >> r & 1)) continue;
    const Block& block = *mine.cluster->blocks[r];
    later([=, &block] {
      check_alive(block, "tensor_load");
      const Shared& target = block.shared;
      each_element(m, start, [&](uint32_t offset, const char* from) {
        char* place = target.at(swizzled(to + offset, Swizzle{m.swizzle}));
        from ? std::memcpy(place, from, m.element) : std::memset(place, 0, m.element);
      });
      mbarrier_complete(reinterpret_cast<Mbarrier*>(target.at(barrier)), bytes_of(m));
    });
  }
  if (blocks >> mine.cluster->blocks.size()) fail("tensor_load_to: a block outside the cluster");
}

void tensor_store(const TensorMap& map, const void* shared, int rank, const int* at) {
  const Map m = decode(map);
  check_box(m, rank, shared, "tensor_store");
  Thread& t = self();
  const Shared& source = t.block->shared;
  const uint32_t from = source.offset(shared);
  std::array<int, 5> start{};
  std::copy(at, at + rank, start.begin());
  auto box = std::make_shared<std::vector<char>>(static_cast<std::size_t>(bytes_of(m)));
  const Thread::Store store{[=, &source] {
                              each_element(m, start.data(), [&](uint32_t offset, const char*) {
                                std::memcpy(box->data() + offset,
                                            source.at(swizzled(from + offset, Swizzle{m.swizzle})), m.element);
                              });
                            },
                            [=] {
                              each_element(m, start.data(), [&](uint32_t offset, char* to) {
                                if (to) std::memcpy(to, box->data() + offset, m.element);
                              });
                            }};
  if (settings().early_copies) {
    store.read();
    store.write();
  } else {
    open_group(t).push_back(store);
  }
}

void bulk_commit() {
  Thread& t = self();
  open_group(t);
  t.store_groups.emplace_back();
}

// The oldest groups are read, or written, in the order in which they were committed.
void bulk_wait_read(int latest) {
  maybe_yield();
  Thread& t = self();
  while (static_cast<int>(t.store_groups.size()) - 1 > latest) {
    for (const Thread::Store& store : t.store_groups.front()) store.read();
    t.read_groups.push_back(std::move(t.store_groups.front()));
    t.store_groups.erase(t.store_groups.begin());
  }
}

void bulk_wait(int latest) {
  Thread& t = self();
  bulk_wait_read(latest);
  const int unread = std::max(static_cast<int>(t.store_groups.size()) - 1, 0);
  while (static_cast<int>(t.read_groups.size()) + unread > latest) {
    for (const Thread::Store& store : t.read_groups.front()) store.write();
    t.read_groups.erase(t.read_groups.begin());
  }
}

}  // namespace host_gpu

TensorMap tensor_map(const TensorLayout& t) {
  const int element = t.dtype == DType::F32 || t.dtype == DType::I32 ? 4 : t.dtype == DType::I64 ? 8 : 2;
  auto refuse = [](const char* why) { throw std::runtime_error(std::string("tensor map: ") + why); };
  if (t.rank < 1 || t.rank > 5) refuse("1 to 5 dimensions");
  if (reinterpret_cast<uintptr_t>(t.data) % 16) refuse("the data must lie at a multiple of 16 bytes");
  host_gpu::Map m{};
  m.data = static_cast<char*>(t.data);
  m.rank = static_cast<uint8_t>(t.rank);
  m.element = static_cast<uint8_t>(element);
  m.swizzle = static_cast<uint8_t>(t.swizzle);
  m.mark = host_gpu::Map::MARK;
  for (int d = 0; d < t.rank; d++) {
    if (t.size[d] < 1 || t.size[d] > (uint64_t{1} << 32)) refuse("sizes from 1 to 2^32");
    if (t.box[d] < 1 || t.box[d] > 256) refuse("a box of 1 to 256 elements along each dimension");
    if (d > 0 && (t.stride[d - 1] % 16 || t.stride[d - 1] >= (uint64_t{1} << 40)))
      refuse("strides must be multiples of 16 bytes");
    m.size[d] = t.size[d];
    m.box[d] = static_cast<uint16_t>(t.box[d]);
    if (d > 0) m.stride[d - 1] = t.stride[d - 1];
  }
  const int row = static_cast<int>(t.box[0]) * element;
  if (row % 16) refuse("the innermost box must be a multiple of 16 bytes");
  if (t.swizzle != Swizzle::NONE && row != swizzle_width(t.swizzle))
    refuse("the innermost box must fill the swizzle's width");
  TensorMap map{};
  std::memcpy(&map, &m, sizeof m);
  return map;
}

}  // namespace omnimamba
