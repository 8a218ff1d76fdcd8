// From Python values to the members of a Params struct, and from a kernel that takes one to a Python function of keywords.
#pragma once
#include <pybind11/pybind11.h>

#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "common/types.h"

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

inline void assign(bool& flag, PyObject* value) { flag = PyObject_IsTrue(value) == 1; }

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

// The members of a Params struct by name. It lives as long as the process, as the kernels that refer to it do.
template <class Params>
struct Fields {
  struct Field {
    PyObject* name;
    void (*set)(Params&, PyObject*);
  };
  std::vector<Field> all;

  template <auto member>
  Fields& add(const char* name) {
    all.push_back({PyUnicode_InternFromString(name), [](Params& p, PyObject* value) { assign(p.*member, value); }});
    return *this;
  }

  // Keywords written in Python source are interned, so the first loop nearly always finds them.
  void set(Params& p, PyObject* name, PyObject* value) const {
    for (const Field& field : all)
      if (field.name == name) return field.set(p, value);
    for (const Field& field : all)
      if (PyUnicode_Compare(field.name, name) == 0) return field.set(p, value);
    throw py::type_error("this kernel has no field " + py::handle(name).cast<std::string>());
  }
};

template <class Params, class Result>
struct Kernel {
  const Fields<Params>* fields;
  Result (*function)(const Params&);
  PyMethodDef definition;

  static PyObject* call(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    try {
      auto* kernel = static_cast<Kernel*>(PyCapsule_GetPointer(self, nullptr));
      if (positional) throw py::type_error("kernels take keywords only");
      Params p;
      const Return at_the_end;
      for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); i++)
        kernel->fields->set(p, PyTuple_GET_ITEM(names, i), values[i]);
      p.threads = torch_threads();
      return run(kernel->function, p).release().ptr();
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

  // The interpreter is free for other threads while a kernel runs.
  static py::object run(Result (*function)(const Params&), const Params& p) {
    auto released = [&] {
      py::gil_scoped_release free;
      return function(p);
    };
    if constexpr (std::is_void_v<Result>) {
      released();
      return py::none();
    } else {
      return py::cast(released());
    }
  }
};

// ---- kernels in a row, their arguments fixed beforehand: program.add(name, x=x, batch=b, ...), program.run() ----

using Bound = std::function<void(int threads)>;

// What fixes the arguments of a kernel without a result, by name.
inline std::map<std::string, std::function<Bound(const py::kwargs&)>>& binders() {
  static auto* all = new std::map<std::string, std::function<Bound(const py::kwargs&)>>;
  return *all;
}

struct Program {
  std::vector<Bound> steps;

  // Whether the kernel was added; one with a result (the size of a workspace) is called at once instead.
  bool add(const std::string& name, const py::kwargs& values) {
    const auto binder = binders().find(name);
    if (binder == binders().end()) return false;
    steps.push_back(binder->second(values));
    return true;
  }

  void run() const {
    const int threads = torch_threads();
    py::gil_scoped_release free;
    for (const Bound& step : steps) step(threads);
  }
};

template <class Params>
Fields<Params>& params() {
  return *new Fields<Params>;
}

template <class Params, class Result>
void kernel(py::module_& m, const Fields<Params>& fields, const char* name, Result (*function)(const Params&)) {
  using Called = Kernel<Params, Result>;
  auto call = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Called::call));
  auto* bound = new Called{&fields, function, {name, call, METH_FASTCALL | METH_KEYWORDS, nullptr}};
  auto self = py::reinterpret_steal<py::object>(PyCapsule_New(bound, nullptr, nullptr));
  py::dict kernels = m.attr("kernels");
  kernels[name] = py::reinterpret_steal<py::object>(PyCFunction_New(&bound->definition, self.ptr()));
  if constexpr (std::is_void_v<Result>)
    binders()[name] = [&fields, function](const py::kwargs& values) -> Bound {
      Params p;
      const Return at_the_end;
      for (const auto& [key, value] : values) fields.set(p, key.ptr(), value.ptr());
      return [p, function](int threads) mutable {
        p.threads = threads;
        function(p);
      };
    };
}

}  // namespace omnimamba
