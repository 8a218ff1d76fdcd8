// The only pybind11 file. A kernel takes one Params struct; Python gives its members by name, a torch tensor becoming a View.
// The module (OMNIMAMBA_MODULE names it) is compiled once for each instruction set, and with OMNIMAMBA_CUDA for the GPU: the
// same functions of the same structs, on another device. native.py and cuda.py load the one to use.
#include <pybind11/pybind11.h>

#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "causal_conv1d/causal_conv1d.h"
#include "common/types.h"
#include "gated_norm/gated_norm.h"
#include "state_update/state_update.h"
#if defined(OMNIMAMBA_CUDA)
#include "common/device.h"
#include "common/on_demand.h"
#else
#include "common/isa.h"
#include "common/simd.h"
#include "lora_linear/lora_linear.h"
#include "lora_linear/matmul.h"
#include "mamba_mixer/mamba_mixer.h"
#include "ssd_scan/ssd_scan.h"
#endif

namespace py = pybind11;
using namespace omnimamba;

namespace {

// torch's dtype objects, looked up once. They live as long as the process.
DType dtype_of(PyObject* torch_dtype) {
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
std::vector<PyObject*>& borrowed() {
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
PyObject* borrow(PyObject* array) {
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

void assign(View& view, PyObject* tensor) {
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

void assign(bool& flag, PyObject* value) { flag = PyObject_IsTrue(value) == 1; }

template <class Number, std::enable_if_t<std::is_arithmetic_v<Number>, int> = 0>
void assign(Number& number, PyObject* value) {
  if constexpr (std::is_floating_point_v<Number>)
    number = static_cast<Number>(PyFloat_AsDouble(value));
  else
    number = static_cast<Number>(PyLong_AsLongLong(value));
  if (PyErr_Occurred()) throw py::error_already_set();
}

// ---- a kernel as a Python function of keywords: kernels[name](x=x, batch=b, ...) ----

int torch_threads() {
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
std::map<std::string, std::function<Bound(const py::kwargs&)>>& binders() {
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

#define FIELD(name) .add<&Params::name>(#name)

void bind_causal_conv1d(py::module_& m) {
  {
    using Params = CausalConv1dParams;
    auto& fields = params<Params>() FIELD(x) FIELD(weight) FIELD(bias) FIELD(initial_states) FIELD(live) FIELD(seq_idx)
        FIELD(y) FIELD(dy) FIELD(dx) FIELD(dinitial_states) FIELD(dweight) FIELD(dbias) FIELD(workspace) FIELD(batch)
            FIELD(channels) FIELD(length) FIELD(width) FIELD(activation) FIELD(stream);
    kernel(m, fields, "causal_conv1d_forward", causal_conv1d_forward);
    kernel(m, fields, "causal_conv1d_backward", causal_conv1d_backward);
    kernel(m, fields, "causal_conv1d_workspace", causal_conv1d_workspace);
  }
  {
    using Params = CausalConv1dUpdateParams;
    auto& fields = params<Params>() FIELD(x) FIELD(conv_state) FIELD(weight) FIELD(bias) FIELD(cache_seqlens)
        FIELD(conv_state_indices) FIELD(y) FIELD(batch) FIELD(channels) FIELD(length) FIELD(width) FIELD(state_len)
            FIELD(activation) FIELD(stream);
    kernel(m, fields, "causal_conv1d_update", causal_conv1d_update);
  }
  {
    using Params = CausalConv1dVarlenParams;
    auto& fields = params<Params>() FIELD(x) FIELD(cu_seqlens) FIELD(states) FIELD(sequences) FIELD(channels)
        FIELD(state_len) FIELD(stream);
    kernel(m, fields, "causal_conv1d_varlen_states", causal_conv1d_varlen_states);
  }
}

void bind_state_update(py::module_& m) {
  using Params = StateUpdateParams;
  auto& fields = params<Params>() FIELD(state) FIELD(x) FIELD(dt) FIELD(A) FIELD(B) FIELD(C) FIELD(D) FIELD(z)
      FIELD(dt_bias) FIELD(state_batch_indices) FIELD(out) FIELD(batch) FIELD(heads) FIELD(width) FIELD(groups) FIELD(n)
          FIELD(dt_softplus) FIELD(stream);
  kernel(m, fields, "state_update_forward", state_update_forward);
}

void bind_gated_norm(py::module_& m) {
  using Params = GatedNormParams;
  auto& fields = params<Params>() FIELD(x) FIELD(z) FIELD(weight) FIELD(bias) FIELD(update) FIELD(y) FIELD(dy) FIELD(dx)
      FIELD(dz) FIELD(dweight) FIELD(dbias) FIELD(workspace) FIELD(outer) FIELD(inner) FIELD(width) FIELD(group_size)
          FIELD(eps) FIELD(norm_before_gate) FIELD(stream);
  kernel(m, fields, "gated_norm_forward", gated_norm_forward);
  kernel(m, fields, "gated_norm_backward", gated_norm_backward);
  kernel(m, fields, "gated_norm_workspace", gated_norm_workspace);
}

#if !defined(OMNIMAMBA_CUDA)
void bind_ssd_scan(py::module_& m) {
  using Params = SsdScanParams;
  auto& fields = params<Params>() FIELD(x) FIELD(dt) FIELD(A) FIELD(B) FIELD(C) FIELD(D) FIELD(z) FIELD(dt_bias)
      FIELD(initial_states) FIELD(chunks) FIELD(first_chunk) FIELD(y) FIELD(final_states) FIELD(varlen_states)
          FIELD(ungated) FIELD(states) FIELD(workspace) FIELD(dy) FIELD(dfinal_states) FIELD(dvarlen_states) FIELD(dx)
              FIELD(ddt) FIELD(dA) FIELD(dB) FIELD(dC) FIELD(dD) FIELD(dz) FIELD(ddt_bias) FIELD(dinitial_states)
                  FIELD(batch) FIELD(length) FIELD(heads) FIELD(headdim) FIELD(groups) FIELD(state) FIELD(max_chunks)
                      FIELD(dt_softplus) FIELD(dt_low) FIELD(dt_high);
  kernel(m, fields, "ssd_scan_state_floats", &ssd_scan_state_floats);
  kernel(m, fields, "ssd_scan_forward_workspace", &ssd_scan_forward_workspace);
  kernel(m, fields, "ssd_scan_forward", &ssd_scan_forward);
  kernel(m, fields, "ssd_scan_short", &ssd_scan_short);
  kernel(m, fields, "ssd_scan_backward_workspace", &ssd_scan_backward_workspace);
  kernel(m, fields, "ssd_scan_backward", &ssd_scan_backward);
}

void bind_lora_linear(py::module_& m) {
  {
    using Params = LoraLinearParams;
    auto& fields = params<Params>() FIELD(x) FIELD(weight) FIELD(weight_scale) FIELD(lora_A) FIELD(lora_B) FIELD(bias)
        FIELD(task) FIELD(y) FIELD(workspace) FIELD(rows) FIELD(in) FIELD(out) FIELD(rank) FIELD(scale);
    kernel(m, fields, "lora_linear_forward", lora_linear_forward);
  }
  {
    using Params = Int8WeightParams;
    auto& fields = params<Params>() FIELD(dense) FIELD(weight) FIELD(weight_scale) FIELD(out) FIELD(in);
    kernel(m, fields, "int8_weight_dequantize", int8_weight_dequantize);
  }
  {
    using Params = LoraDropoutParams;
    auto& fields = params<Params>() FIELD(x) FIELD(y) FIELD(rows) FIELD(width) FIELD(seed) FIELD(threshold) FIELD(keep)
        FIELD(accumulate);
    kernel(m, fields, "lora_dropout", lora_dropout);
  }
  {
    using Params = MatmulParams;
    auto& fields =
        params<Params>() FIELD(a) FIELD(b) FIELD(c) FIELD(workspace) FIELD(m) FIELD(n) FIELD(k) FIELD(accumulate);
    kernel(m, fields, "matmul", matmul);
  }
}

void bind_mamba_mixer(py::module_& m) {
  using Params = MambaMixerStepParams;
  auto& fields = params<Params>() FIELD(zxbcdt) FIELD(conv_state) FIELD(ssm_state) FIELD(conv1d_weight)
      FIELD(conv1d_bias) FIELD(dt_bias) FIELD(A) FIELD(D) FIELD(rmsnorm_weight) FIELD(state_batch_indices) FIELD(out)
          FIELD(workspace) FIELD(batch) FIELD(heads) FIELD(headdim) FIELD(groups) FIELD(state) FIELD(extra) FIELD(width)
              FIELD(state_len) FIELD(eps) FIELD(norm_before_gate) FIELD(activation) FIELD(headwise_D);
  kernel(m, fields, "mamba_mixer_step", mamba_mixer_step);
}
#endif

#undef FIELD

}  // namespace

PYBIND11_MODULE(OMNIMAMBA_MODULE, m) {
  m.attr("kernels") = py::dict();
  bind_causal_conv1d(m);
  bind_state_update(m);
  bind_gated_norm(m);
#if defined(OMNIMAMBA_CUDA)
  m.def("why_no_device", &why_no_device);
#if defined(OMNIMAMBA_ON_DEMAND)
  m.def("compile_with", [](const py::function& compile) {  // kept as long as the process lives
    on_demand::use([compile = compile.inc_ref().ptr()](const std::string& source, const std::string& expression) {
      const py::gil_scoped_acquire held;
      auto code = py::handle(compile)(source, expression).cast<std::pair<std::string, std::string>>();
      return on_demand::Code{std::move(code.first), std::move(code.second)};
    });
  });
  py::list instances;
  for (const on_demand::Kernel* kernel : on_demand::kernels())
    instances.append(py::make_tuple(kernel->source, kernel->expression));
  m.attr("instances") = instances;
#endif
#else
  m.attr("vector_width") = W;
  py::class_<CpuFeatures>(m, "CpuFeatures", py::module_local())
      .def_readonly("avx2", &CpuFeatures::avx2)
      .def_readonly("avx512", &CpuFeatures::avx512);
  m.def("cpu_features", &cpu_features);
  py::class_<Program>(m, "Program", py::module_local())
      .def(py::init())
      .def("add", &Program::add)
      .def("run", &Program::run);
  bind_ssd_scan(m);
  bind_lora_linear(m);
  bind_mamba_mixer(m);
#endif
}
