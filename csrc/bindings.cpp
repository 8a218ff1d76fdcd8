// The only pybind11 file. A kernel takes one Params struct; Python fills it by field name, a torch tensor becoming a View.
// The module is compiled once for each instruction set (OMNIMAMBA_MODULE names it); native.py loads the one to use.
#include <pybind11/pybind11.h>

#include "causal_conv1d/causal_conv1d.h"
#include "common/isa.h"
#include "common/simd.h"
#include "common/types.h"
#include "gated_norm/gated_norm.h"
#include "lora_linear/lora_linear.h"
#include "lora_linear/matmul.h"
#include "mamba_mixer/mamba_mixer.h"
#include "ssd_scan/ssd_scan.h"
#include "state_update/state_update.h"

namespace py = pybind11;
using namespace omnimamba;

namespace {

// torch's dtype objects, looked up once. They live as long as the process.
DType dtype_of(PyObject* torch_dtype) {
  static PyObject* known[5] = {};
  if (!known[0]) {
    py::module_ torch = py::module_::import("torch");
    const char* names[5] = {"float32", "bfloat16", "float16", "int32", "int64"};  // the order of DType
    for (int i = 4; i >= 0; i--) known[i] = py::object(torch.attr(names[i])).release().ptr();
  }
  for (int i = 0; i < 5; i++)
    if (known[i] == torch_dtype) return static_cast<DType>(i);
  throw py::type_error("native kernels take float32, bfloat16, float16, int32 and int64 tensors");
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<View> {
  PYBIND11_TYPE_CASTER(View, const_name("torch.Tensor | None"));

  bool load(handle tensor, bool) {
    value = View{};
    if (tensor.is_none()) return true;
    static PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* stride = PyUnicode_InternFromString("stride");
    static PyObject* dtype = PyUnicode_InternFromString("dtype");
    auto address = reinterpret_steal<object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
    auto strides = reinterpret_steal<object>(PyObject_CallMethodNoArgs(tensor.ptr(), stride));
    auto type = reinterpret_steal<object>(PyObject_GetAttr(tensor.ptr(), dtype));
    if (!address || !strides || !type) throw error_already_set();
    value.data = PyLong_AsVoidPtr(address.ptr());
    value.dtype = dtype_of(type.ptr());
    Py_ssize_t rank = PyTuple_Size(strides.ptr());
    if (rank < 0 || rank > 4) throw value_error("native kernels take tensors of at most 4 dimensions");
    for (Py_ssize_t i = 0; i < rank; i++) value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i));
    return true;
  }

  static handle cast(const View&, return_value_policy, handle) { return none().release(); }
};

}  // namespace pybind11::detail

namespace {

// A Params class, with the field that all of them have.
template <class Params>
py::class_<Params> params(py::module_& m, const char* name) {
  return py::class_<Params>(m, name, py::module_local()).def(py::init<>()).def_readwrite("threads", &Params::threads);
}

// kernels[name] = (Params class, function): what native.call looks up. The interpreter is free while a kernel runs.
template <class Params, class Result>
void kernel(py::module_& m, const char* name, Result (*function)(const Params&)) {
  py::dict kernels = m.attr("kernels");
  py::cpp_function call(function, py::call_guard<py::gil_scoped_release>());
  kernels[name] = py::make_tuple(py::type::of<Params>(), call);
}

#define FIELD(name) .def_readwrite(#name, &Params::name)

void bind_causal_conv1d(py::module_& m) {
  {
    using Params = CausalConv1dParams;
    params<Params>(m, "CausalConv1dParams") FIELD(x) FIELD(weight) FIELD(bias) FIELD(initial_states) FIELD(live)
        FIELD(y) FIELD(dy) FIELD(dx) FIELD(dinitial_states) FIELD(dweight) FIELD(dbias) FIELD(workspace) FIELD(batch)
            FIELD(channels) FIELD(length) FIELD(width) FIELD(activation);
    kernel(m, "causal_conv1d_forward", causal_conv1d_forward);
    kernel(m, "causal_conv1d_backward", causal_conv1d_backward);
    kernel(m, "causal_conv1d_workspace", causal_conv1d_workspace);
  }
  {
    using Params = CausalConv1dUpdateParams;
    params<Params>(m, "CausalConv1dUpdateParams") FIELD(x) FIELD(conv_state) FIELD(weight) FIELD(bias)
        FIELD(cache_seqlens) FIELD(conv_state_indices) FIELD(y) FIELD(batch) FIELD(channels) FIELD(length) FIELD(width)
            FIELD(state_len) FIELD(activation);
    kernel(m, "causal_conv1d_update", causal_conv1d_update);
  }
  {
    using Params = CausalConv1dVarlenParams;
    params<Params>(m, "CausalConv1dVarlenParams") FIELD(x) FIELD(cu_seqlens) FIELD(states) FIELD(sequences)
        FIELD(channels) FIELD(state_len);
    kernel(m, "causal_conv1d_varlen_states", causal_conv1d_varlen_states);
  }
}

void bind_ssd_scan(py::module_& m) {
  using Params = SsdScanParams;
  params<Params>(m, "SsdScanParams") FIELD(x) FIELD(dt) FIELD(A) FIELD(B) FIELD(C) FIELD(D) FIELD(z) FIELD(dt_bias)
      FIELD(initial_states) FIELD(chunks) FIELD(first_chunk) FIELD(y) FIELD(final_states) FIELD(varlen_states)
          FIELD(ungated) FIELD(states) FIELD(workspace) FIELD(dy) FIELD(dfinal_states) FIELD(dvarlen_states) FIELD(dx)
              FIELD(ddt) FIELD(dA) FIELD(dB) FIELD(dC) FIELD(dD) FIELD(dz) FIELD(ddt_bias) FIELD(dinitial_states)
                  FIELD(batch) FIELD(length) FIELD(heads) FIELD(headdim) FIELD(groups) FIELD(state) FIELD(max_chunks)
                      FIELD(dt_softplus) FIELD(dt_low) FIELD(dt_high);
  kernel(m, "ssd_scan_state_floats", &ssd_scan_state_floats);
  kernel(m, "ssd_scan_forward_workspace", &ssd_scan_forward_workspace);
  kernel(m, "ssd_scan_forward", &ssd_scan_forward);
  kernel(m, "ssd_scan_short", &ssd_scan_short);
  kernel(m, "ssd_scan_backward_workspace", &ssd_scan_backward_workspace);
  kernel(m, "ssd_scan_backward", &ssd_scan_backward);
}

void bind_state_update(py::module_& m) {
  using Params = StateUpdateParams;
  params<Params>(m, "StateUpdateParams") FIELD(state) FIELD(x) FIELD(dt) FIELD(A) FIELD(B) FIELD(C) FIELD(D) FIELD(z)
      FIELD(dt_bias) FIELD(state_batch_indices) FIELD(out) FIELD(batch) FIELD(heads) FIELD(width) FIELD(groups) FIELD(n)
          FIELD(dt_softplus);
  kernel(m, "state_update_forward", state_update_forward);
}

void bind_gated_norm(py::module_& m) {
  using Params = GatedNormParams;
  params<Params>(m, "GatedNormParams") FIELD(x) FIELD(z) FIELD(weight) FIELD(bias) FIELD(y) FIELD(dy) FIELD(dx)
      FIELD(dz) FIELD(dweight) FIELD(dbias) FIELD(workspace) FIELD(outer) FIELD(inner) FIELD(width) FIELD(group_size)
          FIELD(eps) FIELD(norm_before_gate);
  kernel(m, "gated_norm_forward", gated_norm_forward);
  kernel(m, "gated_norm_backward", gated_norm_backward);
  kernel(m, "gated_norm_workspace", gated_norm_workspace);
}

void bind_lora_linear(py::module_& m) {
  {
    using Params = LoraLinearParams;
    params<Params>(m, "LoraLinearParams") FIELD(x) FIELD(weight) FIELD(lora_A) FIELD(lora_B) FIELD(bias) FIELD(task)
        FIELD(y) FIELD(workspace) FIELD(rows) FIELD(in) FIELD(out) FIELD(rank) FIELD(scale);
    kernel(m, "lora_linear_forward", lora_linear_forward);
  }
  {
    using Params = LoraDropoutParams;
    params<Params>(m, "LoraDropoutParams") FIELD(x) FIELD(y) FIELD(rows) FIELD(width) FIELD(seed) FIELD(threshold)
        FIELD(keep) FIELD(accumulate);
    kernel(m, "lora_dropout", lora_dropout);
  }
  {
    using Params = MatmulParams;
    params<Params>(m, "MatmulParams") FIELD(a) FIELD(b) FIELD(c) FIELD(workspace) FIELD(m) FIELD(n) FIELD(k)
        FIELD(accumulate);
    kernel(m, "matmul", matmul);
  }
}

void bind_mamba_mixer(py::module_& m) {
  using Params = MambaMixerStepParams;
  params<Params>(m, "MambaMixerStepParams") FIELD(zxbcdt) FIELD(conv_state) FIELD(ssm_state) FIELD(conv1d_weight)
      FIELD(conv1d_bias) FIELD(dt_bias) FIELD(A) FIELD(D) FIELD(rmsnorm_weight) FIELD(state_batch_indices) FIELD(out)
          FIELD(workspace) FIELD(batch) FIELD(heads) FIELD(headdim) FIELD(groups) FIELD(state) FIELD(extra) FIELD(width)
              FIELD(state_len) FIELD(eps) FIELD(norm_before_gate) FIELD(activation) FIELD(headwise_D);
  kernel(m, "mamba_mixer_step", mamba_mixer_step);
}

#undef FIELD

}  // namespace

PYBIND11_MODULE(OMNIMAMBA_MODULE, m) {
  m.attr("kernels") = py::dict();
  m.attr("vector_width") = W;
  py::class_<CpuFeatures>(m, "CpuFeatures", py::module_local())
      .def_readonly("avx2", &CpuFeatures::avx2)
      .def_readonly("avx512", &CpuFeatures::avx512);
  m.def("cpu_features", &cpu_features);
  bind_causal_conv1d(m);
  bind_ssd_scan(m);
  bind_state_update(m);
  bind_gated_norm(m);
  bind_lora_linear(m);
  bind_mamba_mixer(m);
}
