// Shared memory as bulk copies and wgmma see it: what threads wrote comes there by their async_fence().
#include <algorithm>

#include "machine.h"

namespace omnimamba::host_gpu {
namespace {

// Neighbours and repetitions become one.
void join(std::vector<Piece>& pieces) {
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.offset < b.offset; });
  std::size_t last = 0;
  for (const Piece& next : pieces) {
    Piece& here = pieces[last];
    if (next.offset <= here.offset + here.bytes)
      here.bytes = std::max(here.bytes, next.offset + next.bytes - here.offset);
    else
      pieces[++last] = next;
  }
  pieces.resize(std::min(pieces.size(), last + 1));
}

}  // namespace

void watch_shared() {
  Shared& shared = self().block->shared;
  shared.watch();
  watched = &shared;
}

void note_write(const void* p, std::size_t bytes) {
  constexpr std::size_t MANY = 256;
  const auto offset = static_cast<std::size_t>(static_cast<const char*>(p) - watched->at(0));
  if (offset >= Shared::CAPACITY) return;
  std::vector<Piece>& written = self().written;
  if (written.size() >= MANY && written.size() == written.capacity()) join(written);
  written.push_back({static_cast<uint32_t>(offset), static_cast<uint32_t>(bytes)});
}

void async_fence() {
  Thread& t = self();
  if (watched)
    for (const Piece& piece : t.written) watched->publish(piece);
  t.written.clear();
}

void check_fenced(const Block& block, uint32_t offset, std::size_t bytes, const char* what) {
  for (const Thread* t : block.threads)
    for (const Piece& piece : t->written)
      if (piece.offset < offset + bytes && offset < piece.offset + piece.bytes)
        fail(std::string(what) + ": over what thread " + std::to_string(t->linear) +
             " has written without an async_fence() since");
}

}  // namespace omnimamba::host_gpu
