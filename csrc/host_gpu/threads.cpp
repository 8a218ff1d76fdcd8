#include "threads.h"

namespace omnimamba::host_gpu {

std::string kernel_name(const std::string& pretty) {
  const std::size_t start = pretty.find("KERNEL = ");
  std::string name = start == pretty.npos ? pretty : pretty.substr(start + 9);
  if (const std::size_t end = name.find_first_of("<;]", 1); end != name.npos) name.resize(end);
  if (const std::size_t end = name.rfind("::"); end != name.npos) name = name.substr(end + 2);
  return name;
}

unsigned char* dynamic_shared() {
  static char key;
  Block& block = *self().block;
  return static_cast<unsigned char*>(block.shared.array(&key, block.dynamic, 1024));
}

void barrier(int id, int count, bool wait) {
  Block& block = *self().block;
  const std::string name = "barrier " + std::to_string(id);
  if (id < 0 || id > 15) fail(name + ": there are barriers 0 to 15");
  if (count <= 0 || count % 32 || count > static_cast<int>(block.threads.size()))
    fail(name + ": a count of " + std::to_string(count) + " threads is no whole warps of this block");
  Barrier& b = block.barriers[id];
  if (b.arrived == 0) b.expected = count;
  if (b.expected != count)
    fail(name + ": called for " + std::to_string(count) + " threads while others wait for " +
         std::to_string(b.expected));
  const uint64_t phase = b.phase;
  if (++b.arrived == b.expected) {
    b.arrived = 0;
    b.phase++;
  }
  if (wait) wait_until("barrier", id, [&] { return b.phase != phase; });
}

bool gather(const char* name, uint32_t mask, void* argument, Together& all) {
  const Thread& t = self();
  const int lane = t.linear % 32;
  if (!(mask >> lane & 1)) fail(std::string(name) + ": the calling lane is not in its own mask");
  std::vector<Together>& open = t.warp->open;
  for (std::size_t i = 0; i < open.size(); i++) {
    Together& o = open[i];
    if (!(o.mask & mask)) continue;
    if (o.mask != mask || std::strcmp(o.name, name) != 0)
      fail(std::string("divergence: ") + name + " while other lanes of its mask are at " + o.name);
    o.arguments[lane] = argument;
    o.arrived |= 1u << lane;
    if (o.arrived != mask) return false;
    all = o;
    open.erase(open.begin() + static_cast<std::ptrdiff_t>(i));
    return true;
  }
  all = Together{name, mask, 1u << lane, {}};
  all.arguments[lane] = argument;
  if (mask == 1u << lane) return true;
  open.push_back(all);
  return false;
}

}  // namespace omnimamba::host_gpu
