// Stands in for csrc/bindings.h where there is no Python: csrc/bindings.cpp beside it tells driver.cpp each kernel and the
// members of its Params by name.
#pragma once
#include <cstddef>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "common/types.h"
#include "kinds.h"

namespace omnimamba {

// ---- what of pybind11 is named there ----

namespace py {
struct dict {};
struct module_local {};
struct init {};
struct module_ {
  struct Attribute {
    template <class Value>
    void operator=(const Value&) {}
  };
  Attribute attr(const char*) { return {}; }
  template <class Function>
  void def(const char*, Function) {}
};
template <class>
struct class_ {
  class_(module_&, const char*, module_local) {}
  template <class... Arguments>
  class_& def(Arguments...) {
    return *this;
  }
  template <class Member>
  class_& def_readonly(const char*, Member) {
    return *this;
  }
};
}  // namespace py

struct Program {
  void add() {}
  void run() {}
};

// ---- kernels by name ----

struct Field {
  std::ptrdiff_t place;
  Kind kind;
};
using Fields = std::map<std::string, Field>;

struct Kernel {
  const Fields* fields;
  bool has_result;
  // A fresh Params struct, which `fill` fills; the kernel's result, or 0.
  int64_t (*run)(void (*function)(), int threads, void (*fill)(void*));
  void (*function)();
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

template <class Params>
struct FieldsOf {
  Fields all;

  template <class Member>
  FieldsOf& add(const char* name, Member Params::* member) {
    static Params params;
    const auto* at = reinterpret_cast<const char*>(&(params.*member));
    all[name] = {at - reinterpret_cast<const char*>(&params), kind_of<Member>()};
    return *this;
  }
};

template <class Params>
FieldsOf<Params>& params() {
  return *new FieldsOf<Params>;
}

template <class Params, class Result>
int64_t run_kernel(void (*function)(), int threads, void (*fill)(void*)) {
  Params p;
  fill(&p);
  p.threads = threads;
  const auto kernel = reinterpret_cast<Result (*)(const Params&)>(function);
  if constexpr (std::is_void_v<Result>) {
    kernel(p);
    return 0;
  } else {
    return kernel(p);
  }
}

template <class Params, class Result>
void kernel(py::module_&, const FieldsOf<Params>& fields, const char* name, Result (*function)(const Params&)) {
  kernels()[name] = {&fields.all, !std::is_void_v<Result>, run_kernel<Params, Result>,
                     reinterpret_cast<void (*)()>(function)};
}

}  // namespace omnimamba

#define PYBIND11_MODULE(name, module) void find_kernels(omnimamba::py::module_& module)
