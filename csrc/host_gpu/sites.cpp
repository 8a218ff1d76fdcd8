// The places where kernels wait and fence, as tests know them: "name file:line", the file as its folder and name.
#include <set>
#include <string>

#include "machine.h"

namespace omnimamba::host_gpu {

bool sites_matter = false;

namespace {

std::set<std::string> noted;
std::string missing;  // the place that is left out

}  // namespace

bool Site::left_out() const {
  std::string place = file;
  if (const std::size_t name_at = place.rfind('/'); name_at != place.npos && name_at > 0)
    place = place.substr(place.rfind('/', name_at - 1) + 1);
  place = std::string(name) + " " + place + ":" + std::to_string(line);
  if (!missing.empty()) return place == missing;
  noted.insert(place);
  return false;
}

}  // namespace omnimamba::host_gpu

// For the tests, through ctypes: leaves out what stands at `place`; "" notes all places instead, null does neither.
extern "C" __attribute__((visibility("default"), used)) void omnimamba_emulator_leave_out(const char* place) {
  omnimamba::host_gpu::sites_matter = place != nullptr;
  omnimamba::host_gpu::missing = place ? place : "";
  if (place && !*place) omnimamba::host_gpu::noted.clear();
}

// What was noted, a line each.
extern "C" __attribute__((visibility("default"), used)) const char* omnimamba_emulator_places() {
  static std::string all;
  all.clear();
  for (const std::string& place : omnimamba::host_gpu::noted) all += place + "\n";
  return all.c_str();
}
