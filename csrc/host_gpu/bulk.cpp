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

// body(offset in the box, global address or null outside the tensor, bytes) for the pieces of 16 bytes of which the box's rows
// consist, and for each element of one that lies across an end of the tensor.
template <class Body>
void each_piece(const Map& m, const int* at, Body&& body) {
  constexpr int PIECE = 16;
  const int element = m.element, in_piece = PIECE / element;
  const auto width = static_cast<int64_t>(m.size[0]);
  uint64_t index[5] = {}, rows = 1;
  for (int d = 1; d < m.rank; d++) rows *= m.box[d];
  uint32_t offset = 0;
  for (uint64_t i = 0; i < rows; i++) {
    char* row = m.data;
    bool inside = true;
    for (int d = 1; d < m.rank; d++) {
      const int64_t c = at[d] + static_cast<int64_t>(index[d]);
      inside = inside && c >= 0 && c < static_cast<int64_t>(m.size[d]);
      row += c * static_cast<int64_t>(m.stride[d - 1]);
    }
    for (int x = 0; x < m.box[0]; x += in_piece, offset += PIECE) {
      const int64_t first = int64_t{at[0]} + x, last = first + in_piece;
      if (!inside || last <= 0 || first >= width) {
        body(offset, nullptr, PIECE);
      } else if (first >= 0 && last <= width) {
        body(offset, row + first * element, PIECE);
      } else {
        for (int64_t c = first; c < last; c++)
          body(offset + static_cast<uint32_t>((c - first) * element), c >= 0 && c < width ? row + c * element : nullptr,
               element);
      }
    }
    for (int d = 1; d < m.rank && ++index[d] == m.box[d]; d++) index[d] = 0;
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
  check_published(bar, "bulk_load");
  const Block& block = *self().block;
  later([=, &block] {
    const uint32_t to = block.shared.offset(shared);
    check_fenced(block, to, static_cast<std::size_t>(bytes), "bulk_load");
    std::memcpy(shared, global, static_cast<std::size_t>(bytes));
    block.shared.publish({to, static_cast<uint32_t>(bytes)});
    mbarrier_complete(bar, bytes);
  });
}

void tensor_load(uint16_t blocks, void* shared, const TensorMap& map, Mbarrier* bar, int rank, const int* at) {
  const Map m = decode(map);
  check_box(m, rank, shared, "tensor_load");
  check_shared(bar, sizeof *bar, "tensor_load, mbarrier");
  check_published(bar, "tensor_load");
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
      const auto bytes = static_cast<uint32_t>(bytes_of(m));
      auto* there = reinterpret_cast<Mbarrier*>(target.at(barrier));
      check_published(there, "tensor_load");
      check_fenced(block, to, bytes, "tensor_load");
      each_piece(m, start, [&](uint32_t offset, const char* from, int count) {
        char* place = target.at(swizzled(to + offset, Swizzle{m.swizzle}));
        const auto size = static_cast<std::size_t>(count);
        from ? std::memcpy(place, from, size) : std::memset(place, 0, size);
      });
      target.publish({to, bytes});
      mbarrier_complete(there, bytes_of(m));
    });
  }
  if (blocks >> mine.cluster->blocks.size()) fail("tensor_load_to: a block outside the cluster");
}

void tensor_store(const TensorMap& map, const void* shared, int rank, const int* at) {
  const Map m = decode(map);
  check_box(m, rank, shared, "tensor_store");
  watch_shared();
  Thread& t = self();
  const Shared& source = t.block->shared;
  const uint32_t from = source.offset(shared);
  std::array<int, 5> start{};
  std::copy(at, at + rank, start.begin());
  auto box = std::make_shared<std::vector<char>>(static_cast<std::size_t>(bytes_of(m)));
  const Thread::Store store{[=, &source] {
                              each_piece(m, start.data(), [&](uint32_t offset, const char*, int count) {
                                std::memcpy(box->data() + offset,
                                            source.async_at(swizzled(from + offset, Swizzle{m.swizzle})),
                                            static_cast<std::size_t>(count));
                              });
                            },
                            [=] {
                              each_piece(m, start.data(), [&](uint32_t offset, char* to, int count) {
                                if (to) std::memcpy(to, box->data() + offset, static_cast<std::size_t>(count));
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
