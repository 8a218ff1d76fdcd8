// Stands in for NVIDIA's driver: tells what it is asked for, one line a call, in the file "calls"; the kernel named
// "unknown" is not found, and a grid of 77 blocks is refused. As with NVIDIA's, a thread has no context until it gets one, and
// without one little can be done.
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

constexpr int NO_CONTEXT = 201;
thread_local void* current = nullptr;
thread_local int capture_mode = 0;

}  // namespace

extern "C" {
int cuGetErrorString(int, const char** text) { return *text = "no such thing", 0; }
int cuCtxGetCurrent(void** context) { return *context = current, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(static_cast<long>(device) + 1);
  return tell("retain %d\n", device);
}
int cuCtxSetCurrent(void* context) { return current = context, 0; }
int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return 0;
}
int cuCtxGetDevice(int* device) { return current ? (*device = 0, 0) : NO_CONTEXT; }
int cuDeviceGetAttribute(int* value, int, int) { return *value = 8, 0; }
int cuModuleLoadData(void** module, const void* image) {
  *module = reinterpret_cast<void*>(2);
  if (!current) return NO_CONTEXT;
  return tell("load %s, mode %d\n", static_cast<const char*>(image), capture_mode);
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = reinterpret_cast<void*>(3);
  tell("find %s\n", name);
  return std::strcmp(name, "unknown") == 0 ? 500 : 0;
}
int cuFuncSetAttribute(void*, int attribute, int value) { return tell("set %d %d\n", attribute, value); }
int cuLaunchKernelEx(const Config* c, void*, void** parameters, void**) {
  if (!current) return NO_CONTEXT;
  void* first = nullptr;  // the first member of the first parameter: where x lies
  std::memcpy(&first, parameters[0], sizeof first);
  tell("launch %u %u %u, %u %u %u, shared %u, stream %zu, attributes %u, mode %d, x %zu\n", c->blocks[0], c->blocks[1],
       c->blocks[2], c->threads[0], c->threads[1], c->threads[2], c->shared, reinterpret_cast<std::size_t>(c->stream),
       c->count, capture_mode, reinterpret_cast<std::size_t>(first));
  return c->blocks[0] == 77 ? 1 : 0;
}
}
