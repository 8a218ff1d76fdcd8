// All that Python sees. A kernel takes one Params struct; Python gives its members by name, a torch tensor becoming a View.
// Compiled once for all instruction sets (module.cpp gives each module its name), so nothing here may depend on one; and
// with OMNIMAMBA_CUDA for the GPU, in a module that OMNIMAMBA_MODULE names: the same functions of the same structs, on
// another device. native.py and cuda.py load the one to use.
#include "bindings.h"

#include "causal_conv1d/causal_conv1d.h"
#include "gated_norm/gated_norm.h"
#include "lora_linear/gpu.h"
#include "mamba_mixer/mamba_mixer.h"
#include "ssd_scan/ssd_scan.h"
#include "state_update/state_update.h"
#if defined(OMNIMAMBA_CUDA)
#include "common/device.h"
#include "common/on_demand.h"
#else
#include "common/isa.h"
#include "lora_linear/matmul.h"
#endif

using namespace omnimamba;

namespace {

#define FIELD(name) .add(#name, &Params::name)

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
        FIELD(conv_state_indices) FIELD(y) FIELD(batch) FIELD(slots) FIELD(channels) FIELD(length) FIELD(width)
            FIELD(state_len) FIELD(activation) FIELD(stream);
    kernel(m, fields, "causal_conv1d_update", causal_conv1d_update);
  }
  {
    using Params = CausalConv1dVarlenParams;
    auto& fields = params<Params>() FIELD(x) FIELD(cu_seqlens) FIELD(states) FIELD(total) FIELD(sequences)
        FIELD(channels) FIELD(state_len) FIELD(stream);
    kernel(m, fields, "causal_conv1d_varlen_states", causal_conv1d_varlen_states);
  }
}

void bind_state_update(py::module_& m) {
  using Params = StateUpdateParams;
  auto& fields = params<Params>() FIELD(state) FIELD(x) FIELD(dt) FIELD(A) FIELD(B) FIELD(C) FIELD(D) FIELD(z)
      FIELD(dt_bias) FIELD(state_batch_indices) FIELD(out) FIELD(batch) FIELD(slots) FIELD(heads) FIELD(width)
          FIELD(groups) FIELD(n) FIELD(dt_softplus) FIELD(stream);
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

void bind_lora_linear(py::module_& m) {
  {
    using Params = LoraLinearParams;
    auto& fields = params<Params>() FIELD(x) FIELD(weight) FIELD(weight_scale) FIELD(lora_A) FIELD(lora_B) FIELD(bias)
        FIELD(task) FIELD(y) FIELD(workspace) FIELD(low) FIELD(rows) FIELD(in) FIELD(out) FIELD(tasks) FIELD(rank)
            FIELD(scale) FIELD(project) FIELD(dropout) FIELD(seed) FIELD(threshold) FIELD(keep) FIELD(vnni) FIELD(amx)
                FIELD(stream);
    kernel(m, fields, "lora_linear_forward", lora_linear_forward);
#if defined(OMNIMAMBA_CUDA)
    kernel(m, fields, "lora_linear_low", lora_linear_low);
#endif
  }
  {
    using Params = Int8WeightParams;
    auto& fields = params<Params>() FIELD(dense) FIELD(weight) FIELD(weight_scale) FIELD(out) FIELD(in) FIELD(stream);
    kernel(m, fields, "int8_weight_dequantize", int8_weight_dequantize);
  }
#if defined(OMNIMAMBA_CUDA)
  {
    using Params = LoraMatmulParams;
    auto& fields = params<Params>() FIELD(a) FIELD(b) FIELD(c) FIELD(bias) FIELD(low) FIELD(up) FIELD(m) FIELD(n)
        FIELD(k) FIELD(tasks) FIELD(rank) FIELD(dropout) FIELD(seed) FIELD(threshold) FIELD(keep) FIELD(multiprocessors)
            FIELD(stream);
    kernel(m, fields, "lora_matmul", lora_matmul);
  }
  {
    using Params = LoraOuterParams;
    auto& fields = params<Params>() FIELD(v) FIELD(low) FIELD(gradient) FIELD(dbias) FIELD(workspace) FIELD(rows)
        FIELD(width) FIELD(tasks) FIELD(rank) FIELD(dropout) FIELD(seed) FIELD(threshold) FIELD(keep) FIELD(stream);
    kernel(m, fields, "lora_outer_workspace", lora_outer_workspace);
    kernel(m, fields, "lora_outer", lora_outer);
  }
#else
  {
    using Params = LoraDropoutParams;
    auto& fields = params<Params>() FIELD(x) FIELD(y) FIELD(rows) FIELD(width) FIELD(seed) FIELD(threshold) FIELD(keep);
    kernel(m, fields, "lora_dropout", lora_dropout);
  }
  {
    using Params = MatmulParams;
    auto& fields =
        params<Params>() FIELD(a) FIELD(b) FIELD(c) FIELD(start) FIELD(workspace) FIELD(m) FIELD(n) FIELD(k) FIELD(amx);
    kernel(m, fields, "matmul", matmul);
  }
#endif
}

void bind_mamba_mixer(py::module_& m) {
  using Params = MambaMixerStepParams;
  auto& fields = params<Params>() FIELD(zxbcdt) FIELD(conv_state) FIELD(ssm_state) FIELD(conv1d_weight)
      FIELD(conv1d_bias) FIELD(dt_bias) FIELD(A) FIELD(D) FIELD(rmsnorm_weight) FIELD(state_batch_indices) FIELD(out)
          FIELD(workspace) FIELD(tickets) FIELD(batch) FIELD(slots) FIELD(heads) FIELD(headdim) FIELD(groups)
              FIELD(state) FIELD(extra) FIELD(width) FIELD(state_len) FIELD(eps) FIELD(norm_before_gate)
                  FIELD(activation) FIELD(headwise_D) FIELD(stream);
  kernel(m, fields, "mamba_mixer_step", mamba_mixer_step);
#if defined(OMNIMAMBA_CUDA)
  kernel(m, fields, "mamba_mixer_step_workspace", mamba_mixer_step_workspace);
#endif
}

void bind_ssd_scan(py::module_& m) {
  using Params = SsdScanParams;
  auto& fields = params<Params>() FIELD(x) FIELD(dt) FIELD(A) FIELD(B) FIELD(C) FIELD(D) FIELD(z) FIELD(dt_bias)
      FIELD(initial_states) FIELD(chunks) FIELD(first_chunk) FIELD(y) FIELD(final_states) FIELD(varlen_states)
          FIELD(ungated) FIELD(states) FIELD(workspace) FIELD(dy) FIELD(dfinal_states) FIELD(dvarlen_states) FIELD(dx)
              FIELD(ddt) FIELD(dA) FIELD(dB) FIELD(dC) FIELD(dD) FIELD(dz) FIELD(ddt_bias) FIELD(dinitial_states)
                  FIELD(batch) FIELD(length) FIELD(heads) FIELD(headdim) FIELD(groups) FIELD(state) FIELD(max_chunks)
                      FIELD(dt_softplus) FIELD(dt_low) FIELD(dt_high) FIELD(seq_idx) FIELD(cu_seqlens) FIELD(steps)
                          FIELD(used) FIELD(ends) FIELD(decays) FIELD(dstates) FIELD(sums) FIELD(sequences)
                              FIELD(segments) FIELD(multiprocessors) FIELD(shared_limit) FIELD(stream);
  kernel(m, fields, "ssd_scan_forward", &ssd_scan_forward);
  kernel(m, fields, "ssd_scan_backward", &ssd_scan_backward);
#if defined(OMNIMAMBA_CUDA)
  kernel(m, fields, "ssd_scan_segments", &ssd_scan_segments);
  kernel(m, fields, "ssd_scan_parts", &ssd_scan_parts);
#else
  kernel(m, fields, "ssd_scan_state_floats", &ssd_scan_state_floats);
  kernel(m, fields, "ssd_scan_forward_workspace", &ssd_scan_forward_workspace);
  kernel(m, fields, "ssd_scan_short", &ssd_scan_short);
  kernel(m, fields, "ssd_scan_backward_workspace", &ssd_scan_backward_workspace);
#endif
}

#undef FIELD

}  // namespace

PYBIND11_MODULE(OMNIMAMBA_MODULE, m) {
  m.attr("kernels") = py::dict();
  bind_causal_conv1d(m);
  bind_state_update(m);
  bind_gated_norm(m);
  bind_lora_linear(m);
  bind_mamba_mixer(m);
  bind_ssd_scan(m);
#if defined(OMNIMAMBA_CUDA)
  m.def("why_no_device", &why_no_device);
#if defined(OMNIMAMBA_ON_DEMAND)
  m.def("compile_with",
        [](const py::function& compile, const py::function& device) {  // kept as long as the process lives
          on_demand::use(
              [compile = compile.inc_ref().ptr()](const std::string& source, const std::string& expression) {
                const py::gil_scoped_acquire held;
                auto code = py::handle(compile)(source, expression).cast<std::pair<std::string, std::string>>();
                return on_demand::Code{std::move(code.first), std::move(code.second)};
              },
              [device = device.inc_ref().ptr()] {
                const py::gil_scoped_acquire held;
                return py::handle(device)().cast<int>();
              });
        });
  py::list instances;
  for (const on_demand::Kernel* kernel : on_demand::kernels())
    instances.append(py::make_tuple(kernel->source, kernel->expression));
  m.attr("instances") = instances;
#endif
#else
  m.attr("vector_width") = vector_width();
  py::class_<CpuFeatures>(m, "CpuFeatures", py::module_local())
      .def_readonly("avx2", &CpuFeatures::avx2)
      .def_readonly("avx512", &CpuFeatures::avx512)
      .def_readonly("avx512_vnni", &CpuFeatures::avx512_vnni)
      .def_readonly("amx_bf16", &CpuFeatures::amx_bf16);
  m.def("cpu_features", &cpu_features);
  m.def("may_use_tiles", &may_use_tiles);
  py::class_<Program>(m, "Program", py::module_local())
      .def(py::init())
      .def("add", &Program::add)
      .def("run", &Program::run);
#endif
}
