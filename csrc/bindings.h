// From Python values to the members of a Params struct, and from a kernel that takes one to a Python function of keywords.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "common/types.h"
#include "kinds.h"

namespace omnimamba {

namespace py = pybind11;

// torch's dtype objects, looked up once. They live as long as the process.
inline DType dtype_of(PyObject* torch_dtype) {
  constexpr int count = 6;
  static PyObject* known[count] = {};
  if (!known[0]) {
    py::module_ torch = py::module_::import("torch");
    const char* names[count] = {"float32", "bfloat16", "float16", "int32", "int64", "int8"};  // the order of DType
    for (int i = count - 1; i >= 0; i--) known[i] = py::object(torch.attr(names[i])).release().ptr();
  }
  for (int i = 0; i < count; i++)
    if (known[i] == torch_dtype) return static_cast<DType>(i);
  throw py::type_error("native kernels take float32, bfloat16, float16, int32, int64 and int8 tensors");
}

// ---- from a Python value to a member of a Params struct ----

#if defined(OMNIMAMBA_CUDA) && (defined(OMNIMAMBA_ON_DEMAND) || !defined(OMNIMAMBA_EMULATED))
constexpr bool ON_GPU = true;
#else
constexpr bool ON_GPU = false;
#endif

// What torch made of arrays of other libraries, kept until the thread's kernel call ends.
inline std::vector<PyObject*>& borrowed() {
  thread_local std::vector<PyObject*> all;
  return all;
}

struct Return {
  std::size_t before = borrowed().size();
  ~Return() {
    for (; borrowed().size() > before; borrowed().pop_back()) Py_DECREF(borrowed().back());
  }
};

// Any other array that speaks DLPack (NumPy's, CuPy's, ...) as a tensor of torch on the same memory.
inline PyObject* borrow(PyObject* array) {
  static PyObject* from_dlpack = py::object(py::module_::import("torch").attr("from_dlpack")).release().ptr();
  if (!PyObject_HasAttrString(array, "__dlpack__")) {
    std::string type = Py_TYPE(array)->tp_name;
    throw py::type_error("kernels take torch tensors and arrays with __dlpack__, not " + type);
  }
  auto tensor = py::reinterpret_steal<py::object>(PyObject_CallOneArg(from_dlpack, array));
  if (!tensor) throw py::error_already_set();
  if (tensor.attr("is_cuda").cast<bool>() != ON_GPU)
    throw py::type_error(std::string("these kernels take arrays in the memory of ") + (ON_GPU ? "the GPU" : "the CPU"));
  borrowed().push_back(tensor.inc_ref().ptr());
  return tensor.ptr();
}

inline void assign(View& view, PyObject* tensor) {
  view = View{};
  if (tensor == Py_None) return;
  static PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* stride = PyUnicode_InternFromString("stride");
  static PyObject* dtype = PyUnicode_InternFromString("dtype");
  auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, data_ptr));
  if (!address && PyErr_ExceptionMatches(PyExc_AttributeError)) {
    PyErr_Clear();
    return assign(view, borrow(tensor));
  }
  if (!address) throw py::error_already_set();
  auto strides = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, stride));
  if (!strides) throw py::error_already_set();
  auto type = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, dtype));
  if (!type) throw py::error_already_set();
  view.data = PyLong_AsVoidPtr(address.ptr());
  view.dtype = dtype_of(type.ptr());
  Py_ssize_t rank = PyTuple_Size(strides.ptr());
  if (rank < 0 || rank > 4) throw py::value_error("native kernels take tensors of at most 4 dimensions");
  for (Py_ssize_t i = 0; i < rank; i++) view.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i));
}

inline void assign(bool& flag, PyObject* value) {
  flag = PyObject_IsTrue(value) == 1;
  if (PyErr_Occurred()) throw py::error_already_set();
}

template <class Number, std::enable_if_t<std::is_arithmetic_v<Number>, int> = 0>
void assign(Number& number, PyObject* value) {
  if constexpr (std::is_floating_point_v<Number>)
    number = static_cast<Number>(PyFloat_AsDouble(value));
  else
    number = static_cast<Number>(PyLong_AsLongLong(value));
  if (PyErr_Occurred()) throw py::error_already_set();
}

// ---- a kernel as a Python function of keywords: kernels[name](x=x, batch=b, ...) ----

inline int torch_threads() {
  static PyObject* get_num_threads = py::object(py::module_::import("torch").attr("get_num_threads")).release().ptr();
  return py::reinterpret_steal<py::object>(PyObject_CallNoArgs(get_num_threads)).cast<int>();
}

inline void assign(Kind kind, void* member, PyObject* value) {
  switch (kind) {
    case Kind::VIEW: return assign(*static_cast<View*>(member), value);
    case Kind::FLAG: return assign(*static_cast<bool*>(member), value);
    case Kind::INT: return assign(*static_cast<int32_t*>(member), value);
    case Kind::LONG: return assign(*static_cast<int64_t*>(member), value);
    case Kind::UNSIGNED_LONG: return assign(*static_cast<uint64_t*>(member), value);
    case Kind::FLOAT: return assign(*static_cast<float*>(member), value);
  }
}

// The members of a Params struct by name. It lives as long as the process, as the kernels that refer to it do.
struct Fields {
  struct Field {
    PyObject* name;
    std::ptrdiff_t place;
    Kind kind;
  };
  std::vector<Field> all;

  // Keywords written in Python source are interned, so the first loop nearly always finds them.
  void set(void* params, PyObject* name, PyObject* value) const {
    for (const Field& field : all)
      if (field.name == name) return assign(field.kind, static_cast<char*>(params) + field.place, value);
    for (const Field& field : all)
      if (PyUnicode_Compare(field.name, name) == 0)
        return assign(field.kind, static_cast<char*>(params) + field.place, value);
    throw py::type_error("this kernel has no field " + py::handle(name).cast<std::string>());
  }
};

template <class Params>
struct FieldsOf : Fields {
  static_assert(std::is_trivially_copyable_v<Params>);

  template <class Member>
  FieldsOf& add(const char* name, Member Params::* member) {
    static Params params;
    const auto* at = reinterpret_cast<const char*>(&(params.*member));
    all.push_back({PyUnicode_InternFromString(name), at - reinterpret_cast<const char*>(&params), kind_of<Member>()});
    return *this;
  }
};

// ---- kernels in a row, their arguments fixed beforehand: program.add(name, x=x, batch=b, ...), program.run() ----

using Bound = std::function<void(int threads)>;

// A kernel whatever its Params. What knows these is kept small: it is compiled for each kernel.
struct Kernel {
  const Fields* fields;
  void (*function)();
  PyObject* (*start)(const Kernel&, PyObject* const* values, PyObject* names);
  Bound (*bind)(const Kernel&, const py::kwargs& values);  // null: it has a result
  PyMethodDef definition;

  void set(void* params, PyObject* const* values, PyObject* names) const {
    for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); i++)
      fields->set(params, PyTuple_GET_ITEM(names, i), values[i]);
  }

  void set(void* params, const py::kwargs& values) const {
    for (const auto& [key, value] : values) fields->set(params, key.ptr(), value.ptr());
  }

  static PyObject* call(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    try {
      auto* kernel = static_cast<Kernel*>(PyCapsule_GetPointer(self, nullptr));
      if (positional) throw py::type_error("kernels take keywords only");
      const Return at_the_end;
      return kernel->start(*kernel, values, names);
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }
};

// The kernels without a result by name.
inline std::map<std::string, const Kernel*>& bindable() {
  static auto* all = new std::map<std::string, const Kernel*>;
  return *all;
}

struct Program {
  std::vector<Bound> steps;
  int most_threads = std::numeric_limits<int>::max();  // workspaces are as large as the threads at the time need

  // Whether the kernel was added; one with a result (the size of a workspace) is called at once instead.
  bool add(const std::string& name, const py::kwargs& values) {
    const auto kernel = bindable().find(name);
    if (kernel == bindable().end()) return false;
    const Return at_the_end;
    most_threads = std::min(most_threads, torch_threads());
    steps.push_back(kernel->second->bind(*kernel->second, values));
    return true;
  }

  void run() const {
    const int threads = std::min(most_threads, torch_threads());
    py::gil_scoped_release free;
    for (const Bound& step : steps) step(threads);
  }
};

inline void publish(py::module_& m, Kernel* kernel) {
  auto self = py::reinterpret_steal<py::object>(PyCapsule_New(kernel, nullptr, nullptr));
  auto function = py::reinterpret_steal<py::object>(PyCFunction_New(&kernel->definition, self.ptr()));
  py::object kernels = m.attr("kernels");
  if (PyDict_SetItemString(kernels.ptr(), kernel->definition.ml_name, function.ptr())) throw py::error_already_set();
  if (kernel->bind) bindable()[kernel->definition.ml_name] = kernel;
}

template <class Params>
FieldsOf<Params>& params() {
  return *new FieldsOf<Params>;
}

// The interpreter is free for other threads while a kernel runs.
template <class Params, class Result>
PyObject* start(const Kernel& kernel, PyObject* const* values, PyObject* names) {
  const auto function = reinterpret_cast<Result (*)(const Params&)>(kernel.function);
  Params p;
  kernel.set(&p, values, names);
  p.threads = torch_threads();
  if constexpr (std::is_void_v<Result>) {
    {
      const py::gil_scoped_release free;
      function(p);
    }
    Py_RETURN_NONE;
  } else {
    static_assert(std::is_integral_v<Result>);
    Result result;
    {
      const py::gil_scoped_release free;
      result = function(p);
    }
    return PyLong_FromLongLong(result);
  }
}

template <class Params>
Bound bind(const Kernel& kernel, const py::kwargs& values) {
  Params p;
  kernel.set(&p, values);
  return [p, function = reinterpret_cast<void (*)(const Params&)>(kernel.function)](int threads) mutable {
    p.threads = threads;
    function(p);
  };
}

template <class Params, class Result>
void kernel(py::module_& m, const FieldsOf<Params>& fields, const char* name, Result (*function)(const Params&)) {
  auto call = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Kernel::call));
  const auto binder = std::is_void_v<Result> ? bind<Params> : nullptr;
  publish(m, new Kernel{&fields,
                        reinterpret_cast<void (*)()>(function),
                        start<Params, Result>,
                        binder,
                        {name, call, METH_FASTCALL | METH_KEYWORDS, nullptr}});
}

}  // namespace omnimamba
