#include "on_demand.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "launch_text.h"
#include "tensor_map.h"

namespace omnimamba::on_demand {
namespace {

// The driver's functions and structs, as its ABI has them: there may be no toolkit, so no cuda.h.
struct Attribute {
  int id;
  char padding[4];
  union {
    unsigned cluster[3];
    char all[64];
  };
};
struct Config {
  unsigned blocks[3], threads[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
};
constexpr int CLUSTER = 4, MOST_SHARED = 8;  // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC...
constexpr int MAJOR = 75, MINOR = 76;        // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
constexpr int RELAXED = 2;                   // CU_STREAM_CAPTURE_MODE_RELAXED

struct Driver {
  int (*error)(int status, const char** text) = nullptr;
  int (*context)(void** context) = nullptr;
  int (*retain)(void** context, int device) = nullptr;
  int (*enter)(void* context) = nullptr;
  int (*exchange)(int* capture_mode) = nullptr;
  int (*device)(int* device) = nullptr;
  int (*attribute)(int* value, int attribute, int device) = nullptr;
  int (*load)(void** module, const void* image) = nullptr;
  int (*find)(void** function, void* module, const char* name) = nullptr;
  int (*set)(void* function, int attribute, int value) = nullptr;
  int (*launch)(const Config* config, void* function, void** parameters, void** extra) = nullptr;
  EncodeTiled encode = nullptr;  // drivers before 12.0 have none
  std::string missing;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      missing = "the NVIDIA driver's libcuda.so.1 was not found";
      return;
    }
    take(library, error, "cuGetErrorString");
    take(library, context, "cuCtxGetCurrent");
    take(library, retain, "cuDevicePrimaryCtxRetain");
    take(library, enter, "cuCtxSetCurrent");
    take(library, exchange, "cuThreadExchangeStreamCaptureMode");
    take(library, device, "cuCtxGetDevice");
    take(library, attribute, "cuDeviceGetAttribute");
    take(library, load, "cuModuleLoadData");
    take(library, find, "cuModuleGetFunction");
    take(library, set, "cuFuncSetAttribute");
    take(library, launch, "cuLaunchKernelEx");
    encode = reinterpret_cast<EncodeTiled>(dlsym(library, "cuTensorMapEncodeTiled"));
  }

  void check(int status, const std::string& what) const {
    if (status == 0) return;
    const char* text = nullptr;
    error(status, &text);
    throw std::runtime_error("CUDA: " + what + ": " + (text ? text : "error " + std::to_string(status)));
  }

 private:
  template <class Function>
  void take(void* library, Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) missing = std::string("the NVIDIA driver is too old: it has no ") + name;
  }
};

const Driver& driver() {
  static const Driver one;
  return one;
}

const Driver& ready() {
  if (!driver().missing.empty()) throw std::runtime_error("CUDA: " + driver().missing);
  return driver();
}

std::vector<const Kernel*>& all() {
  static auto* kernels = new std::vector<const Kernel*>;
  return *kernels;
}

Compiler& compiler() {
  static auto* one = new Compiler;
  return *one;
}
CurrentDevice& current_device() {
  static auto* one = new CurrentDevice;
  return *one;
}

// The current context. A thread that has asked nothing of CUDA's runtime yet has none, such as autograd's at its first
// backward: it gets that of its device, as the runtime would give it.
void* context() {
  const Driver& cuda = ready();
  void* found = nullptr;
  cuda.check(cuda.context(&found), "the current context");
  if (found) return found;
  cuda.check(cuda.retain(&found, current_device()()), "the context of the device");
  cuda.check(cuda.enter(found), "the context of the device");
  return found;
}

// Also while the thread captures a graph, of which loading is no part.
void* load(const Code& code, const std::string& name) {
  const Driver& cuda = driver();
  int mode = RELAXED;
  cuda.check(cuda.exchange(&mode), "the mode of capture");
  void *module = nullptr, *function = nullptr;
  int status = cuda.load(&module, code.binary.c_str());
  if (status == 0) status = cuda.find(&function, module, code.symbol.c_str());
  cuda.check(cuda.exchange(&mode), "the mode of capture");
  cuda.check(status, name);
  return function;
}

// The kernel in the current context; loaded, and before that compiled, by whoever asks first.
void* loaded(const Kernel& kernel) {
  static auto* functions = new std::map<std::pair<const Kernel*, void*>, void*>;
  static std::mutex lock;
  void* const current = context();
  {
    const std::lock_guard<std::mutex> held(lock);
    const auto found = functions->find({&kernel, current});
    if (found != functions->end()) return found->second;
  }
  // Not under the lock: the compiler waits for Python's. Two threads may compile the same kernel; either will do.
  void* const function = load(compiler()(kernel.source, kernel.expression), kernel.expression);
  const std::lock_guard<std::mutex> held(lock);
  return functions->insert({{&kernel, current}, function}).first->second;
}

}  // namespace

void use(Compiler compile, CurrentDevice device) {
  compiler() = std::move(compile);
  current_device() = std::move(device);
}

const std::vector<const Kernel*>& kernels() { return all(); }

std::string why_no_driver() { return driver().missing; }

int capability() {
  context();
  const Driver& cuda = driver();
  int device = 0, major = 0, minor = 0;
  cuda.check(cuda.device(&device), "the current device");
  cuda.check(cuda.attribute(&major, MAJOR, device), "compute capability");
  cuda.check(cuda.attribute(&minor, MINOR, device), "compute capability");
  return 10 * major + minor;
}

Kernel::Kernel(const char* source, const std::string& pretty) : source(source), expression(kernel_in(pretty)) {
  all().push_back(this);
}

void Kernel::start(const Grid& grid, void** parameters) const {
  const Driver& cuda = ready();
  void* function = loaded(*this);
  const auto check = [&](int status) {
    if (status) cuda.check(status, launch_of(expression, grid.blocks, grid.threads, grid.shared, grid.cluster));
  };
  if (grid.shared > (48u << 10)) check(cuda.set(function, MOST_SHARED, static_cast<int>(grid.shared)));
  Attribute cluster{CLUSTER, {}, {{grid.cluster, 1, 1}}};
  const Config config{{grid.blocks[0], grid.blocks[1], grid.blocks[2]},
                      {grid.threads, 1, 1},
                      grid.shared,
                      reinterpret_cast<void*>(grid.stream),
                      &cluster,
                      grid.cluster > 1 ? 1u : 0u};
  check(cuda.launch(&config, function, parameters, nullptr));
}

}  // namespace omnimamba::on_demand

namespace omnimamba {

// Declared with the emulator's functions, whose headers the kernels are read with.
TensorMap tensor_map(const TensorLayout& t) { return encoded(on_demand::ready().encode, t); }

}  // namespace omnimamba
