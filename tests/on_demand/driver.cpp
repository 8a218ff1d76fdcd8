// Stands in for NVIDIA's driver: tells what it is asked for, one line a call, in the file "calls"; the kernel named
// "unknown" is not found, and a grid of 77 blocks is refused.
#include <cstdio>
#include <cstring>

namespace {

struct Config {
  unsigned blocks[3], threads[3], shared;
  void* stream;
  void* attributes;
  unsigned count;
};

template <class... Values>
int tell(const char* format, Values... values) {
  std::FILE* file = std::fopen("calls", "a");
  std::fprintf(file, format, values...);
  std::fclose(file);
  return 0;
}

}  // namespace

extern "C" {
int cuGetErrorString(int, const char** text) { return *text = "no such thing", 0; }
int cuCtxGetCurrent(void** context) { return *context = context, *context = reinterpret_cast<void*>(1), 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuDeviceGetAttribute(int* value, int, int) { return *value = 8, 0; }
int cuModuleLoadData(void** module, const void* image) {
  *module = reinterpret_cast<void*>(2);
  return tell("load %s\n", static_cast<const char*>(image));
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = reinterpret_cast<void*>(3);
  tell("find %s\n", name);
  return std::strcmp(name, "unknown") == 0 ? 500 : 0;
}
int cuFuncSetAttribute(void*, int attribute, int value) { return tell("set %d %d\n", attribute, value); }
int cuLaunchKernelEx(const Config* c, void*, void** parameters, void**) {
  void* first = nullptr;  // the first member of the first parameter: where x lies
  std::memcpy(&first, parameters[0], sizeof first);
  tell("launch %u %u %u, %u %u %u, shared %u, stream %zu, attributes %u, x %zu\n", c->blocks[0], c->blocks[1],
       c->blocks[2], c->threads[0], c->threads[1], c->threads[2], c->shared, reinterpret_cast<std::size_t>(c->stream),
       c->count, reinterpret_cast<std::size_t>(first));
  return c->blocks[0] == 77 ? 1 : 0;
}
}
